package testbed

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"causeway/agent"
	"causeway/agent/api"
	"causeway/identity"
	"causeway/identity/pki"
	"causeway/kvstore"

	"go.uber.org/goleak"
	"sigs.k8s.io/yaml"
)

// The test's own binary plays the clustermesh of its beds: real stores, and agents that only answer.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "kvstore":
			os.Exit(report(playKVStore(flags(os.Args[2:]))))
		case "agent":
			os.Exit(report(playAgent(flags(os.Args[2:])["config"])))
		case "serve":
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
			defer stop()
			os.Exit(report(Serve(ctx, os.Args[2], os.Args[3], nil)))
		case "here":
			socket, _ := SocketHere()
			fmt.Print(socket)
			os.Exit(0)
		case "up":
			_, err := Up(context.Background(), Options{Dir: os.Args[2], Clusters: []string{"east", "west"}, Nodes: 2, Unconnected: true})
			os.Exit(report(err))
		}
	}
	dir, err := os.MkdirTemp("", "clustermesh")
	if err != nil {
		panic(err)
	}
	binaryDir = dir
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if err := takeKubernetesDown(); err != nil {
			code = max(code, report(err))
		}
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// binaryDir is there for what tests build.
var binaryDir string

func report(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func flags(args []string) map[string]string {
	m := map[string]string{}
	for i := 0; i+1 < len(args); i += 2 {
		m[strings.TrimPrefix(args[i], "--")] = args[i+1]
	}
	return m
}

func playKVStore(f map[string]string) error {
	host, _, err := net.SplitHostPort(f["listen-client"])
	if err != nil {
		return err
	}
	if _, err := pki.Ensure(f["pki"], f["cluster"], []string{host}, time.Now()); err != nil {
		return err
	}
	file := func(name string) string { return filepath.Join(f["pki"], name) }
	return kvstore.Serve(context.Background(), kvstore.ServerConfig{
		DataDir: f["data-dir"], ListenClient: f["listen-client"], CAFile: file("ca.crt"), CertFile: file("server.crt"), KeyFile: file("server.key"), UnsafeNoFsync: true,
	})
}

// playAgent answers on the socket like an agent that is well. A label "refuse" makes it refuse an endpoint.
func playAgent(config string) error {
	b, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	var cfg agent.Config
	if err := yaml.UnmarshalStrict(b, &cfg); err != nil {
		return err
	}
	status := api.Status{OK: true, Cluster: cfg.Cluster.Name, Node: cfg.Node.Name, Stores: []api.Store{{Cluster: cfg.Cluster.Name, Synced: true}}}
	next := cfg.Node.PodCIDRs[0].Addr().Next()
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathStatus, func(w http.ResponseWriter, r *http.Request) { answer(w, 200, status) })
	mux.HandleFunc("POST "+api.PathEndpoints, func(w http.ResponseWriter, r *http.Request) {
		var req api.EndpointRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		if req.Labels["refuse"] != "" {
			answer(w, 400, api.Error{Message: "refused as asked"})
			return
		}
		next = next.Next()
		answer(w, 200, api.Endpoint{Endpoint: identity.Endpoint{Namespace: req.Namespace, Name: req.Name, Address: next, State: req.State}})
	})
	mux.HandleFunc(api.PathEndpoints+"/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Println(r.Method, r.URL.Path)
		answer(w, 200, api.Endpoint{})
	})
	ln, err := net.Listen("unix", cfg.Socket)
	if err != nil {
		return err
	}
	return http.Serve(ln, mux)
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

// needRoot skips a test that makes namespaces, loudly; where CI is set leaving out is a failure.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("this test needs root")
}

// bedDir returns a directory for a bed. What a failing test leaves is removed, and a test that passes must leave nothing.
func bedDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := Clean(ctx, dir); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
		wantNothing(t, dir)
		os.Remove(dir)
	})
	return dir
}

// wantNothing checks that nothing of a bed is on this machine, processes included.
func wantNothing(t *testing.T, dir string) {
	t.Helper()
	left, err := Leftovers(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v (%v)", left, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) > 0 {
		t.Errorf("left in %s: %v", dir, entries)
	}
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		cmdline, _ := os.ReadFile("/proc/" + p.Name() + "/cmdline")
		if strings.HasPrefix(string(cmdline), dir+"/") {
			t.Errorf("process %s still runs: %q", p.Name(), cmdline)
		}
	}
}

func mustUp(t *testing.T, o Options) *Bed {
	t.Helper()
	needRoot(t)
	if o.Dir == "" {
		o.Dir = bedDir(t)
	}
	if o.Clusters == nil {
		o.Clusters = []string{"east", "west"}
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	// A played agent cannot be joined with others.
	o.Unconnected = o.Unconnected || o.Binary == ""
	b, err := Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
