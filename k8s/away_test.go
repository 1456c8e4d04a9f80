package k8s

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/statedb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"causeway/lb"
)

// path is a way to an API server that can be cut.
type path struct {
	address string
	mu      sync.Mutex
	cut     bool
	silent  chan struct{} // closed when nothing more is let through
	conns   map[net.Conn]struct{}
}

// pathTo leads to an address until the test ends.
func pathTo(t testing.TB, to string) *path {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &path{address: l.Addr().String(), conns: map[net.Conn]struct{}{}, silent: make(chan struct{})}
	var running sync.WaitGroup
	running.Add(1)
	go func() {
		defer running.Done()
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil || !p.add(in, out) {
				in.Close()
				continue
			}
			running.Add(2)
			go func() { defer running.Done(); p.pipe(in, out) }()
			go func() { defer running.Done(); p.pipe(out, in) }()
		}
	}()
	t.Cleanup(func() { l.Close(); p.setCut(true); running.Wait() })
	return p
}

func (p *path) add(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		if p.cut {
			c.Close()
			continue
		}
		p.conns[c] = struct{}{}
	}
	return !p.cut
}

func (p *path) pipe(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if closed(p.silent) {
			_, _ = io.Copy(io.Discard, from) // until it is cut
			return
		}
		if _, failed := to.Write(buffer[:n]); err != nil || failed != nil {
			return
		}
	}
}

// setCut ends all connections, and refuses new ones, or lets them through again.
func (p *path) setCut(cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = cut
	for c := range p.conns {
		c.Close()
		delete(p.conns, c)
	}
}

// waitStatus returns when the source's state is as ok says.
func (h *harness) waitStatus(what string, ok func(Status) bool) {
	h.t.Helper()
	end := time.Now().Add(patience)
	for !ok(h.Status()) {
		if time.Now().After(end) {
			h.t.Fatalf("%s: %+v", what, h.Status())
		}
		time.Sleep(5 * time.Millisecond) // nothing tells of it but asking
	}
}

// TestAway has the API server go away and come back, in all ways.
func TestAway(t *testing.T) {
	api := startAPIServer(t)
	path := pathTo(t, api.address)
	direct := api.address
	api.address = path.address
	kubeconfig := api.kubeconfig(t, adminToken)
	api.address = direct
	setup := newHarness(t, api, kubeconfig)
	namespace := setup.namespace("away")
	services, slices := api.client.CoreV1().Services(namespace), api.client.DiscoveryV1().EndpointSlices(namespace)
	apply := func(name, address string) {
		t.Helper()
		if _, err := services.Create(t.Context(), plainService(name), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := slices.Create(t.Context(), newSlice(name, name, endpoint(address, "")), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(name string) {
		t.Helper()
		if err := services.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := slices.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	named := func(name string) lb.Name { return lb.Name{Namespace: namespace, Name: name} }
	apply("stays", "10.1.0.1")
	apply("goes", "10.1.0.2")
	apply("goes-later", "10.1.0.3")

	h := newHarness(t, api, kubeconfig)
	h.api = api
	h.Source.api.pace = pace{quiet: 300 * time.Millisecond, look: 50 * time.Millisecond, answer: 300 * time.Millisecond}
	_, first := h.tables.Services.AllWatch(h.tables.DB.ReadTxn())
	h.run()
	<-first
	if read := h.tables.DB.ReadTxn(); len(h.backends(read, named("stays"))) == 0 {
		t.Error("services are there before their backends")
	}
	h.waitSynced()
	h.waitBackends(named("stays"), "10.1.0.1 stays")

	gone := func(name string) func(statedb.ReadTxn) string {
		return func(read statedb.ReadTxn) string {
			if h.service(read, named(name)) != nil || len(h.backends(read, named(name))) > 0 {
				return name + " is still there"
			}
			return ""
		}
	}
	revision := func() [2]statedb.Revision {
		read := h.tables.DB.ReadTxn()
		return [2]statedb.Revision{h.tables.Services.Revision(read), h.tables.Backends.Revision(read)}
	}
	away, back := func(s Status) bool { return !s.Connected }, func(s Status) bool { return s.Connected }

	t.Run("an agent that starts while it is away", func(t *testing.T) {
		path.setCut(true)
		late := newHarness(t, api, kubeconfig).run()
		late.waitStatus("it does not say why", func(s Status) bool { return !s.Connected && s.LastError != "" })
		if closed(late.Synced()) || late.tables.Services.NumObjects(late.tables.DB.ReadTxn()) != 0 {
			t.Error("it has read something")
		}
		path.setCut(false)
		late.waitSynced()
		late.waitBackends(named("stays"), "10.1.0.1 stays")
		late.stop()
	})
	t.Run("cut off, while something is deleted and made", func(t *testing.T) {
		path.setCut(true)
		h.waitStatus("still connected", away)
		before := revision()
		remove("goes")
		apply("comes", "10.1.0.4")
		h.waitBackends(named("goes"), "10.1.0.2 goes")
		if revision() != before {
			t.Error("the tables have changed while the API server was away")
		}
		path.setCut(false)
		h.wait(gone("goes"))
		h.waitBackends(named("comes"), "10.1.0.4 comes")
		h.waitStatus("not connected", back)
	})
	t.Run("cut off, while it is replaced by one that knows nothing of the past", func(t *testing.T) {
		path.setCut(true)
		h.waitStatus("still connected", away)
		remove("goes-later")
		apply("comes-later", "10.1.0.5")
		api.kill()
		api.start(t)
		path.setCut(false)
		h.wait(gone("goes-later"))
		h.waitBackends(named("comes-later"), "10.1.0.5 comes-later")
	})
	t.Run("killed and started", func(t *testing.T) {
		before := revision()
		api.kill()
		h.waitStatus("still connected", away)
		// Not before it has been away for a while is it a problem.
		end := time.Now().Add(patience)
		for len(h.Problems()) == 0 {
			if time.Now().After(end) {
				t.Fatal("it is no problem")
			}
			time.Sleep(10 * time.Millisecond)
		}
		if got := h.Problems()[0]; !strings.Contains(got, "does not answer since") || !strings.Contains(got, "stays in force") {
			t.Errorf("the problem is %q", got)
		}
		api.start(t)
		h.waitStatus("not connected", back)
		apply("after", "10.1.0.6")
		h.waitBackends(named("after"), "10.1.0.6 after")
		h.wait(func(read statedb.ReadTxn) string {
			if h.service(read, named("after")) == nil {
				return "the new Service does not come"
			}
			return ""
		})
		if now := revision(); now[0] != before[0]+1 || now[1] != before[1]+1 {
			t.Errorf("rows that did not change were written: revisions %v, then %v", before, now)
		}
		if got := fmt.Sprint(h.Problems()); !strings.Contains(got, "no Node node1") || strings.Contains(got, "answer") {
			t.Errorf("problems: %s", got)
		}
	})
	t.Run("silent", func(t *testing.T) {
		close(path.silent)
		h.waitStatus("it is not noticed", func(s Status) bool { return !s.Connected && s.LastError != "" })
		h.waitBackends(named("stays"), "10.1.0.1 stays")
	})
}

// TestWatchExpires has an API server without streams of lists, whose watches expire: what was deleted meanwhile is only in what the next list has not.
func TestWatchExpires(t *testing.T) {
	var lists atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		kind, api, items := "", "v1", ""
		switch {
		case strings.HasSuffix(r.URL.Path, "/services"):
			kind, items = "Service", `{"metadata":{"namespace":"web","name":"stays"},"spec":{"clusterIP":"10.96.0.2","clusterIPs":["10.96.0.2"]}}`
		case strings.HasSuffix(r.URL.Path, "/endpointslices"):
			kind, api = "EndpointSlice", "discovery.k8s.io/v1"
		case strings.HasSuffix(r.URL.Path, "/pods"):
			kind = "Pod"
		case strings.HasSuffix(r.URL.Path, "/nodes"):
			kind = "Node"
		default:
			fmt.Fprint(w, `{"gitVersion":"v1.2.3"}`)
			return
		}
		q := r.URL.Query()
		switch {
		case q.Get("sendInitialEvents") != "":
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"BadRequest","code":400}`)
		case q.Get("watch") != "" && kind == "Service" && q.Get("resourceVersion") == "1":
			fmt.Fprint(w, `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","message":"too old resource version","code":410}}`)
		case q.Get("watch") != "":
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			version := 1
			if kind == "Service" {
				if version = int(lists.Add(1)); version == 1 {
					items += `,{"metadata":{"namespace":"web","name":"goes"},"spec":{"clusterIP":"10.96.0.3","clusterIPs":["10.96.0.3"]}}`
				}
			}
			fmt.Fprintf(w, `{"kind":"%sList","apiVersion":"%s","metadata":{"resourceVersion":"%d"},"items":[%s]}`, kind, api, version, items)
		}
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte("clusters: [{name: c, cluster: {server: \""+server.URL+"\"}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := newHarness(t, nil, file).run().waitSynced()
	h.wait(func(read statedb.ReadTxn) string {
		stays, goes := h.service(read, lb.Name{Namespace: "web", Name: "stays"}), h.service(read, lb.Name{Namespace: "web", Name: "goes"})
		if stays == nil || goes != nil || lists.Load() < 2 {
			return fmt.Sprintf("after %d lists: stays %v, goes %v", lists.Load(), stays, goes)
		}
		return ""
	})
	h.waitStatus("its version is not known", func(s Status) bool { return s.Connected && s.Version == "v1.2.3" && s.LastError == "" })
	h.stop()
}
