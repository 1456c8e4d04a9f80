package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
	"causeway/lb"
)

// identityTimeout bounds how long a new endpoint waits for the store to give its labels a number.
var identityTimeout = 5 * time.Second // a variable for tests

// knownIdentityTimeout is the same where another node of the cluster uses the labels already.
const knownIdentityTimeout = time.Second

// endpoints is the source of the endpoints table: pods that the local API (or a CNI plugin through it)
// asks for. It makes their links, gives them addresses and identities, and keeps them over restarts.
type endpoints struct {
	tables   *clustermesh.Tables
	identity *identity.Allocator
	mtu      int
	file     string // where endpoints are kept over restarts
	cluster  string
	id       identity.ClusterID // of the cluster
	log      *slog.Logger
	// away tells that the store is known not to answer.
	away func() bool
	// tunnels: addresses of the first pod range are ends of encrypted tunnels.
	tunnels bool
	links   podLinks
	// source knows the pods of Kubernetes; nil: the node is in no Kubernetes cluster.
	source podSource

	mu sync.Mutex
	// byID are the endpoints that exist, pools have their addresses.
	byID  map[string]identity.Endpoint
	pools addressPools
	// relabelled are the labels that endpoints, by their IDs, have now and have no identity for yet, with what has failed so far.
	relabelled map[string]relabelling
	// relabel gets a token when there are more of them.
	relabel chan struct{}
}

func newEndpoints(tables *clustermesh.Tables, alloc *identity.Allocator, cfg Config, mtu int, log *slog.Logger) *endpoints {
	return &endpoints{
		tables: tables, identity: alloc, mtu: mtu, cluster: cfg.Cluster.Name, id: cfg.Cluster.ID, log: log,
		file: filepath.Join(cfg.StateDir, "endpoints.json"),
		byID: map[string]identity.Endpoint{}, pools: newAddressPools(cfg.Node.PodCIDRs), links: kernelLinks{},
		tunnels:    cfg.Encryption.Mode != identity.EncryptOff,
		relabelled: map[string]relabelling{}, relabel: make(chan struct{}, 1),
	}
}

// releaseTimeout bounds how long the last user of an identity waits for the store to take it back; maintainIdentities
// tries again.
const releaseTimeout = 5 * time.Second

// Add connects a network namespace as a pod and returns when its packets can flow. If they cannot, or if who
// asked waits no more, nothing stays.
func (e *endpoints) Add(ctx context.Context, req api.EndpointRequest) (identity.Endpoint, error) {
	ep, err := checkEndpoint(req)
	if err != nil {
		return ep, err
	}
	if ep.Sandbox != "" {
		return e.addSandbox(ctx, ep)
	}
	if old, ok := e.get(ep.ID()); ok {
		return ep, conflict("endpoint %s exists already, with address %s", ep.ID(), listed(old.Addresses()))
	}
	return e.add(ctx, ep)
}

// add connects an endpoint whose labels are known.
func (e *endpoints) add(ctx context.Context, ep identity.Endpoint) (_ identity.Endpoint, err error) {
	ep.Identity, err = e.allocate(ctx, ep.Labels)
	if err != nil {
		return ep, err
	}
	ep, err = e.connect(ep)
	if err != nil {
		e.release(ctx, ep.Labels)
		return ep, err
	}
	if err := e.waitReconciled(ctx, ep); err != nil {
		return ep, errors.Join(err, e.undo(ctx, ep))
	}
	return ep, nil
}

// undo takes back an endpoint that was added in vain, unless it was deleted meanwhile.
func (e *endpoints) undo(ctx context.Context, ep identity.Endpoint) error {
	e.mu.Lock()
	now, ok := e.byID[ep.ID()]
	if !ok || now.Address != ep.Address || !now.Created.Equal(ep.Created) {
		e.mu.Unlock()
		return nil
	}
	err := e.disconnect(now)
	e.mu.Unlock()
	e.release(ctx, now.Labels)
	return err
}

// release gives back one use of an identity. Who asked may be gone by now: the use is over all the same.
func (e *endpoints) release(ctx context.Context, labels identity.Labels) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if err := e.identity.Release(ctx, labels); err != nil {
		// It is tried again by maintainIdentities.
		e.log.Info("identity not released yet", "labels", labels.String(), "error", err)
	}
}

// allocate returns the identity of labels: from the store, or while that is away from what is known. Whoever
// has that to fall back on waits less.
func (e *endpoints) allocate(ctx context.Context, labels identity.Labels) (identity.Number, error) {
	timeout := identityTimeout
	known, isKnown := e.tables.IdentityOf(e.tables.DB.ReadTxn(), e.cluster, labels)
	if isKnown && e.away != nil && e.away() {
		return e.identity.Adopt(ctx, labels, known) // the store would only keep it waiting
	}
	if isKnown {
		timeout = min(timeout, knownIdentityTimeout)
	}
	patience, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	number, err := e.identity.Allocate(patience, labels)
	if err == nil {
		return number, nil
	}
	if isKnown {
		return e.identity.Adopt(ctx, labels, known)
	}
	return 0, fmt.Errorf("no identity for labels %q: %w (labels that are in use already would work without the store)", labels, err)
}

// connect gives the endpoint its addresses and its link, and writes it down.
func (e *endpoints) connect(ep identity.Endpoint) (identity.Endpoint, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.byID[ep.ID()]; ok {
		return ep, conflict("endpoint %s exists already", ep.ID())
	}
	if err := e.pools.next(&ep); err != nil {
		return ep, err
	}
	ep.MTU, ep.HostLink, ep.Created = e.mtu, hostLink(ep.ID()), time.Now()
	if err := checkNetNS(ep.NetNS); err != nil {
		return ep, err
	}
	link, err := e.links.Create(ep)
	if err != nil {
		return ep, err
	}
	ep.IfIndex, ep.HostMAC, ep.MAC = link.IfIndex, link.HostMAC, link.MAC
	e.byID[ep.ID()] = ep
	e.pools.take(ep.Addresses())
	if err := e.save(); err != nil {
		e.forget(ep)
		return ep, errors.Join(err, e.links.Delete(ep.HostLink))
	}
	return ep, e.insert(ep)
}

func checkNetNS(path string) error {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return invalid("netns %s does not exist; is the pod gone already?", path)
	}
	return nil
}

// hostLink names the node's end of a pod's veth: link names hold 15 bytes.
func hostLink(id string) string {
	sum := sha256.Sum256([]byte(id))
	return "cw" + hex.EncodeToString(sum[:])[:12]
}

// SetState changes what an endpoint is good for.
func (e *endpoints) SetState(id string, state identity.EndpointState) (identity.Endpoint, error) {
	if !validState(state) {
		return identity.Endpoint{}, invalid("state %q: want ready, not-ready or terminating", state)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	ep, ok := e.byID[id]
	if !ok {
		return ep, missing("endpoint %s does not exist on this node", id)
	}
	if ep.Sandbox != "" {
		return ep, conflict("endpoint %s is a pod of Kubernetes: its EndpointSlices say whether it is a backend, by its readiness", id)
	}
	ep.State = state
	e.byID[id] = ep
	if err := e.save(); err != nil {
		return ep, err
	}
	return ep, e.insert(ep)
}

// Delete disconnects an endpoint; what it had is free again.
func (e *endpoints) Delete(ctx context.Context, id string) error {
	e.mu.Lock()
	ep, ok := e.byID[id]
	if !ok {
		e.mu.Unlock()
		return missing("endpoint %s does not exist on this node", id)
	}
	err := e.disconnect(ep)
	e.mu.Unlock()
	e.release(ctx, ep.Labels)
	return err
}

// disconnect removes everything of an endpoint but the use of its identity. Needs mu.
func (e *endpoints) disconnect(ep identity.Endpoint) error {
	e.forget(ep)
	return errors.Join(e.save(), e.remove(ep), e.links.Delete(ep.HostLink))
}

// Renumber gives endpoints the identity that their labels have now.
func (e *endpoints) Renumber(change identity.Renumbered) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for id, ep := range e.byID {
		if ep.Identity != change.Old || ep.Labels.String() != change.Labels.String() {
			continue
		}
		ep.Identity = change.New
		e.byID[id] = ep
		if err := e.insert(ep); err != nil {
			return err
		}
	}
	return e.save()
}

func (e *endpoints) get(id string) (identity.Endpoint, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ep, ok := e.byID[id]
	return ep, ok
}

func (e *endpoints) forget(ep identity.Endpoint) {
	delete(e.byID, ep.ID())
	delete(e.relabelled, ep.ID())
	e.pools.give(ep.Addresses())
}

func (e *endpoints) insert(ep identity.Endpoint) error {
	txn := e.tables.DB.WriteTxn(e.tables.Endpoints)
	defer txn.Abort()
	_, _, err := e.tables.Endpoints.Insert(txn, clustermesh.NewRow(ep))
	txn.Commit()
	return err
}

func (e *endpoints) remove(ep identity.Endpoint) error {
	txn := e.tables.DB.WriteTxn(e.tables.Endpoints)
	defer txn.Abort()
	err := clustermesh.Remove(txn, e.tables.Endpoints, ep.ID())
	txn.Commit()
	return err
}

// waitReconciled returns when the kernel has the endpoint, or says why not.
func (e *endpoints) waitReconciled(ctx context.Context, ep identity.Endpoint) error {
	id := ep.ID()
	for {
		row, _, changed, ok := e.tables.Endpoints.GetWatch(e.tables.DB.ReadTxn(), e.tables.Endpoints.ByKey(id))
		switch {
		case !ok || row.Object.Address != ep.Address: // or added again since
			return missing("endpoint %s was deleted meanwhile", id)
		case row.Status.Kind == clustermesh.Done:
			return nil
		case row.Status.Kind == clustermesh.Failed:
			return fmt.Errorf("endpoint %s: %s", id, row.Status.Error)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func checkEndpoint(req api.EndpointRequest) (identity.Endpoint, error) {
	ep := identity.Endpoint{
		Namespace: cmp.Or(req.Namespace, "default"), Name: req.Name, NetNS: req.NetNS, State: cmp.Or(req.State, identity.EndpointReady), Labels: identity.Labels{},
		Sandbox: req.Sandbox, UID: req.UID, Interface: cmp.Or(req.Interface, datapath.DefaultPodInterface),
	}
	if !validState(ep.State) {
		return ep, invalid("state %q: want ready, not-ready or terminating", req.State)
	}
	if !filepath.IsAbs(req.NetNS) {
		return ep, invalid("netns %q: want the absolute path of a network namespace", req.NetNS)
	}
	if err := datapath.CheckInterfaceName(ep.Interface); err != nil {
		return ep, invalid("%w", err)
	}
	if err := lb.CheckEndpoint(ep.ID()); err != nil {
		return ep, invalid("%w", err)
	}
	if req.Sandbox != "" {
		return ep, checkSandbox(req)
	}
	if req.UID != "" {
		return ep, invalid("uid %q without a sandbox: only pods of Kubernetes have one", req.UID)
	}
	maps.Copy(ep.Labels, req.Labels)
	ep.Labels[identity.NamespaceLabel] = ep.Namespace
	if err := identity.CheckLabels(ep.Labels); err != nil {
		return ep, invalid("%w", err)
	}
	return ep, nil
}

func validState(s identity.EndpointState) bool {
	return s == identity.EndpointReady || s == identity.EndpointNotReady || s == identity.EndpointTerminating
}
