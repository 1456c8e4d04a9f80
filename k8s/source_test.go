package k8s

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"causeway/clustermesh"
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

const patience = 30 * time.Second

func (h *harness) waitSynced() {
	h.t.Helper()
	select {
	case <-h.Synced():
	case <-time.After(patience):
		h.t.Fatalf("not synced: %+v", h.Status())
	}
}

func TestSmoke(t *testing.T) {
	api := startAPIServer(t)
	h := newHarness(t, api, api.kubeconfig(t, adminToken)).run()
	h.waitSynced()
	t.Logf("%+v %v", h.Status(), h.Problems())
	for row := range h.tables.Services.All(h.tables.DB.ReadTxn()) {
		t.Logf("%+v", row.Object)
	}
}
