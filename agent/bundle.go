package agent

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"strings"
	"time"

	"causeway/datapath"
)

// maxBundleLog is how much of the end of the agent's log goes into a bundle, in bytes.
const maxBundleLog = 4 << 20

// bundle writes what is needed to understand a problem on this node as a gzipped tar: state, tables, maps, counters, the agent's own metrics and
// log. Nothing secret is in it: it has what the API shows, which holds no key, and the log with what looks like a secret blacked out.
func (s *server) bundle(w http.ResponseWriter, _ *http.Request) {
	name := fmt.Sprintf("causeway-%s-%s-%s", s.agent.cfg.Cluster.Name, s.agent.cfg.Node.Name, time.Now().UTC().Format("20060102T150405Z"))
	w.Header().Set("Content-Type", "application/gzip")
	w.Header().Set("Content-Disposition", `attachment; filename="`+name+`.tar.gz"`)
	packed := gzip.NewWriter(w)
	b := &bundle{tar: tar.NewWriter(packed), dir: name, at: time.Now()}
	s.fill(b)
	// An error now can only cut the tar short, which its reader notices.
	if err := b.tar.Close(); err != nil || b.err != nil {
		return
	}
	_ = packed.Close()
}

type bundle struct {
	tar *tar.Writer
	dir string
	at  time.Time
	err error
}

// add writes a file. What could not be gathered is said in its place.
func (b *bundle) add(name string, data []byte, err error) {
	if err != nil {
		name, data = name+".error", []byte(err.Error()+"\n")
	}
	if b.err != nil {
		return
	}
	if b.err = b.tar.WriteHeader(&tar.Header{Name: b.dir + "/" + name, Mode: 0o600, Size: int64(len(data)), ModTime: b.at}); b.err == nil {
		_, b.err = b.tar.Write(data)
	}
}

func (b *bundle) addJSON(name string, v any, err error) {
	var data []byte
	if err == nil {
		data, err = json.MarshalIndent(v, "", "  ")
	}
	b.add(name+".json", append(data, '\n'), err)
}

// addList adds what a listing of the API shows.
func addList[T any](b *bundle, name string, of listing[T]) {
	v, _, err := of()
	b.addJSON(name, v, err)
}

func (s *server) fill(b *bundle) {
	a := s.agent
	b.add("README", []byte(bundleReadme), nil)
	b.addJSON("config", a.cfg, nil) // names files of keys, and holds none
	addList(b, "status", s.tables.status)
	addList(b, "peers", func() (any, []<-chan struct{}, error) { return a.view.all(), nil, nil })
	addList(b, "certs", a.certs.list)
	addList(b, "members", s.tables.members)
	addList(b, "encryption", s.tables.encryption)
	addList(b, "tables/nodes", s.tables.nodes)
	addList(b, "tables/endpoints", s.tables.endpoints)
	addList(b, "tables/identities", s.tables.identities)
	addList(b, "tables/addresses", s.tables.addresses)
	addList(b, "tables/services", s.tables.services)
	b.addJSON("tables/publications", s.publications(), nil)
	addList(b, "maps/lb", s.tables.bpfLB)
	addList(b, "maps/addresses", s.tables.bpfAddresses)
	addList(b, "maps/drops", s.tables.bpfDrops)
	b.addJSON("maps/summary", datapathSummary(a.datapath), nil)
	b.addJSON("metrics", s.metrics(), nil)
	b.add("goroutines.txt", goroutines(), nil)
	s.addLog(b)
}

const bundleReadme = `What a node's agent knows, for a bug report. No key, token or certificate's private part is in it; names, labels and
addresses of pods are.

config.json     the agent's configuration as it is in force
status.json     its account of itself, peers.json of each peer, members.json of who is alive, encryption.json of tunnels (public keys only), certs.json of certificates
tables/         the desired state, with how far each row has got
maps/           what is in the kernel
metrics.json    the agent's own memory and goroutines
log.txt         the end of its log, if it knows where that goes
`

// publications lists what this node keeps in the store by key: values are in the store.
func (s *server) publications() map[string]string {
	out := map[string]string{}
	for row := range s.tables.tables.Publications.All(s.tables.read()) {
		out[row.Object.Key] = string(row.Status.Kind)
		if row.Status.Error != "" {
			out[row.Object.Key] += ": " + row.Status.Error
		}
	}
	return out
}

func datapathSummary(d *datapath.Datapath) map[string]any {
	return map[string]any{"attach": d.Attach()}
}

// metrics of the agent's process.
func (s *server) metrics() map[string]any {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return map[string]any{
		"goroutines": runtime.NumGoroutine(), "heapAllocBytes": m.HeapAlloc, "heapObjects": m.HeapObjects, "sysBytes": m.Sys,
		"gcCycles": m.NumGC, "gcPauseTotalNs": m.PauseTotalNs, "go": runtime.Version(), "kernel": kernelRelease(), "uptimeSeconds": time.Since(s.tables.started).Seconds(),
	}
}

func kernelRelease() string {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(release))
}

func goroutines() []byte {
	var text strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&text, 1)
	return []byte(text.String())
}

// secrets are what looks like one in a log: nothing of ours writes any, and a bundle goes to others.
var secrets = regexp.MustCompile(`cm1\.[A-Za-z0-9_-]+|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*-----END [A-Z ]*PRIVATE KEY-----|\b[A-Za-z0-9+/]{43}=`)

// addLog adds the end of the agent's log, if it goes to a file.
func (s *server) addLog(b *bundle) {
	path, err := os.Readlink("/proc/self/fd/2")
	if err != nil || !filepath.IsAbs(path) {
		b.add("log.txt", []byte("the agent's log does not go to a file: see journalctl, or kubectl logs\n"), nil)
		return
	}
	data, err := tailOf(path, maxBundleLog)
	b.add("log.txt", secrets.ReplaceAll(data, []byte("[removed]")), err)
}

// tailOf returns at most so many bytes of the end of a file.
func tailOf(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return []byte("the agent's log does not go to a file: see journalctl, or kubectl logs\n"), nil
	}
	if size := info.Size(); size > most {
		if _, err := f.Seek(size-most, io.SeekStart); err != nil {
			return nil, err
		}
	}
	return io.ReadAll(io.LimitReader(f, most))
}
