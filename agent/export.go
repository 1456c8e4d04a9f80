package agent

import (
	"context"

	"golang.org/x/sync/errgroup"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/k8s"
)

// setupExporter makes this agent's part in publishing the services of Kubernetes that are for other clusters.
func (a *agent) setupExporter() {
	if a.kubernetes == nil {
		return
	}
	a.settledChanged = make(chan struct{}, 1)
	a.prunes = append(a.prunes, func() { wakeUp(a.settledChanged) })
	a.exporter = clustermesh.NewExporter(clustermesh.ExporterConfig{
		Cluster: a.cfg.info(), Node: a.cfg.Node.Name, Store: a.own().store, Tables: a.tables, Synced: a.kubernetes.Synced(), Log: a.log,
		Tell:      func(n clustermesh.News) { a.life.tell(n) },
		Meanwhile: a.leading,
	})
	a.problems = append(a.problems, func() []string { return exporterProblems(a.exporter.State()) })
}

// leading is what one agent of a cluster does besides publishing, until ctx ends.
func (a *agent) leading(ctx context.Context) {
	tasks, ctx := errgroup.WithContext(ctx)
	f := &findings{tables: a.tables, view: a.balancer.view, tell: a.kubernetes.Event, grace: findingGrace}
	tasks.Go(func() error { return f.Run(ctx) })
	tasks.Go(func() error {
		return a.kubernetes.Mirror(ctx, k8s.MirrorConfig{View: a.balancer.view, Settled: a.settled, Changed: a.settledChanged})
	})
	if err := tasks.Wait(); err != nil {
		a.log.Error("what is to be said in Kubernetes of other clusters is not", "error", err)
	}
}

// settled tells whether the tables have all that another cluster has, which is nothing if it is no peer.
func (a *agent) settled(cluster string) bool {
	if c := a.channels.get(cluster); c != nil {
		return a.isSynced(c.id)
	}
	return a.channels.noPeer(cluster)
}

// export runs it.
func (a *agent) export(ctx context.Context, tasks *errgroup.Group) {
	if a.exporter != nil {
		tasks.Go(func() error { return a.exporter.Run(ctx) })
	}
}

// exporterProblems says what is not published.
func exporterProblems(s clustermesh.ExporterState) []string {
	if s.LastError == "" {
		return nil
	}
	return []string{"what this cluster has for others is not all published: " + s.LastError}
}

// exporterStatus is nil without Kubernetes.
func exporterStatus(e *clustermesh.Exporter) *api.Exporter {
	if e == nil {
		return nil
	}
	s := e.State()
	return &api.Exporter{Leader: s.Leader, Self: s.Self, Since: s.Since, Keys: s.Keys, LastError: s.LastError}
}
