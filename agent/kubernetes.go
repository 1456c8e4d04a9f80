package agent

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"

	"causeway/agent/api"
	"causeway/k8s"
	"causeway/kvstore"
)

// setupKubernetes makes the source of this cluster's services, if they are Kubernetes'. Its API server need not answer now.
func (a *agent) setupKubernetes() (err error) {
	k := a.cfg.Kubernetes
	if !k.Enabled() {
		return nil
	}
	a.kubernetes, err = k8s.Connect(k8s.Config{
		Kubeconfig: k.Kubeconfig, Context: k.Context, InCluster: k.InCluster,
		Node: a.cfg.Node.Name, Cluster: a.cfg.Cluster.Name, ClusterID: uint8(a.cfg.Cluster.ID),
		Tables: a.tables, Refusals: a.refusals, Version: Version, Log: a.log,
	})
	if err == nil {
		a.problems = append(a.problems, a.kubernetes.Problems)
	}
	return err
}

// followKubernetes starts following the API server.
func (a *agent) followKubernetes(ctx context.Context, tasks *errgroup.Group) {
	if a.kubernetes != nil {
		tasks.Go(func() error { return a.kubernetes.Run(ctx) })
	}
}

// ownStoreSynced notes that this cluster's store has been read in full. Where its services are Kubernetes', what is left of them in the kernel
// from before, when the agent did not run, is not known to be stale until Kubernetes has been read too.
func (a *agent) ownStoreSynced(ctx context.Context) {
	a.local.After(ctx, func() { wakeUp(a.life.complete) })
	if a.kubernetes == nil {
		a.markSynced(ctx, a.cfg.Cluster.ID)
		return
	}
	go func() { // the caller goes on following the store
		select {
		case <-a.kubernetes.Synced():
			a.markSynced(ctx, a.cfg.Cluster.ID)
		case <-ctx.Done():
		}
	}()
}

// exported is told what this cluster's store has of services and slices for other clusters: here they come from Kubernetes.
func (a *agent) exported(batch kvstore.Batch) {
	a.log.Debug("the store has services for other clusters", "entries", len(batch.Events))
}

// errFromKubernetes says why the local API declares no services.
var errFromKubernetes = errors.New("this cluster's services come from Kubernetes: use kubectl apply and kubectl delete")

// kubernetesStatus is nil without Kubernetes.
func kubernetesStatus(source *k8s.Source) *api.Kubernetes {
	if source == nil {
		return nil
	}
	s := source.Status()
	return &api.Kubernetes{Connected: s.Connected, Synced: s.Synced, Server: s.Server, Version: s.Version, LastError: s.LastError}
}
