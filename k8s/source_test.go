package k8s

import (
	"context"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"causeway/clustermesh"
	"causeway/lb"
)

// harness is a Source that runs against a real API server.
type harness struct {
	*Source
	t        testing.TB
	api      *apiServer
	tables   *clustermesh.Tables
	refusals *clustermesh.Refusals
	stop     func()
}

func newHarness(t testing.TB, api *apiServer, kubeconfig string) *harness {
	t.Helper()
	tables, err := clustermesh.NewTables()
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{t: t, api: api, tables: tables, refusals: clustermesh.NewRefusals()}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("CAUSEWAY_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	h.Source, err = Connect(Config{
		Kubeconfig: kubeconfig, Node: "node1", Cluster: "east", ClusterID: 1, Tables: tables, Refusals: h.refusals, Version: "test", Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// run runs the source until the test ends, or stop is called.
func (h *harness) run() *harness {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Source.Run(ctx) }()
	stopped := false
	h.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			h.t.Error(err)
		}
	}
	h.t.Cleanup(h.stop)
	return h
}

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

func (h *harness) waitSynced() *harness {
	h.t.Helper()
	select {
	case <-h.Synced():
	case <-time.After(patience):
		h.t.Fatalf("not synced: %+v", h.Status())
	}
	return h
}

// wait returns when the tables are as ok says, which explains what is missing.
func (h *harness) wait(ok func(statedb.ReadTxn) (missing string)) {
	h.t.Helper()
	end := time.After(patience)
	for {
		read := h.tables.DB.ReadTxn()
		_, services := h.tables.Services.AllWatch(read)
		_, backends := h.tables.Backends.AllWatch(read)
		missing := ok(read)
		if missing == "" {
			return
		}
		select {
		case <-services:
		case <-backends:
		case <-time.After(20 * time.Millisecond): // what is refused is in no table
		case <-end:
			h.t.Fatal(missing)
		}
	}
}

func (h *harness) service(read statedb.ReadTxn, name lb.Name) *lb.Service {
	row, _, ok := h.tables.Services.Get(read, h.tables.Services.ByKey("east/"+name.String()))
	if !ok {
		return nil
	}
	return &row.Object
}

// backends lists those of a service, ordered by address.
func (h *harness) backends(read statedb.ReadTxn, name lb.Name) []lb.Backend {
	list := h.tables.BackendsOf(read, name)
	slices.SortFunc(list, func(a, b lb.Backend) int { return a.Address.Compare(b.Address) })
	return list
}

// refusal is what stands refused of a Service; "" if nothing does.
func (h *harness) refusal(name lb.Name) string {
	for _, r := range h.refusals.List() {
		if r.Key == refusalKey(name) {
			return r.Reason
		}
	}
	return ""
}

// namespace makes one for a test.
func (h *harness) namespace(name string) string {
	h.t.Helper()
	_, err := h.api.client.CoreV1().Namespaces().Create(h.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	return name
}

// TestAgainstAPIServer shows what becomes of objects that are applied at a real API server.
func TestAgainstAPIServer(t *testing.T) {
	api := startAPIServer(t)
	h := newHarness(t, api, api.kubeconfig(t, adminToken)).run().waitSynced()
	t.Run("Services", func(t *testing.T) { testServices(t, h) })
	t.Run("Annotations", func(t *testing.T) { testAnnotations(t, h) })
	t.Run("EndpointSlices", func(t *testing.T) { testEndpointSlices(t, h) })
	t.Run("LargeSlice", func(t *testing.T) { testLargeSlice(t, h) })
	t.Run("Pods", func(t *testing.T) { testPods(t, h) })
	t.Run("Refused", func(t *testing.T) { testRefused(t, api) })
}

func TestConnectRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		file := dir + "/" + name
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	const good = `{apiVersion: v1, kind: Config, clusters: [{name: c, cluster: {server: "https://user:hidden@127.0.0.1:1/prefix"}}], ` +
		`users: [{name: u, user: {token: hidden}}], contexts: [{name: east, context: {cluster: c, user: u}}], current-context: east}`
	for name, tc := range map[string]struct {
		cfg  Config
		want string
	}{
		"no file":      {Config{Kubeconfig: dir + "/none"}, "no such file"},
		"not one":      {Config{Kubeconfig: write("bad", "users: [{user: {token: [hidden]}}]")}, "is not a kubeconfig"},
		"context":      {Config{Kubeconfig: write("good", good), Context: "west"}, `context "west" does not exist; it has the contexts east`},
		"both":         {Config{Kubeconfig: dir + "/good", InCluster: true}, "remove one"},
		"in a cluster": {Config{InCluster: true}, "give a kubeconfig"},
	} {
		_, err := Connect(tc.cfg)
		switch {
		case err == nil || !strings.Contains(err.Error(), tc.want):
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		case strings.Contains(err.Error(), "hidden"):
			t.Errorf("%s: a secret is in the error: %v", name, err)
		}
	}
	s, err := Connect(Config{Kubeconfig: dir + "/good", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Status(); got.Server != "https://127.0.0.1:1/prefix" || got.Connected || got.Synced {
		t.Errorf("got %+v", got)
	}
}
