package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
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

	mu sync.Mutex
	// byID are the endpoints that exist, pool has their addresses.
	byID map[string]identity.Endpoint
	pool *addressPool
}

func newEndpoints(tables *clustermesh.Tables, alloc *identity.Allocator, cfg Config, mtu int, log *slog.Logger) *endpoints {
	return &endpoints{
		tables: tables, identity: alloc, mtu: mtu, cluster: cfg.Cluster.Name, id: cfg.Cluster.ID, log: log,
		file: filepath.Join(cfg.StateDir, "endpoints.json"),
		byID: map[string]identity.Endpoint{}, pool: newAddressPool(cfg.Node.PodCIDRs[0]),
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
	if old, ok := e.get(ep.ID()); ok {
		return ep, conflict("endpoint %s exists already, with address %s", ep.ID(), old.Address)
	}
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
	err := e.disconnect(ep)
	e.mu.Unlock()
	e.release(ctx, ep.Labels)
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

// connect gives the endpoint an address and its link, and writes it down.
func (e *endpoints) connect(ep identity.Endpoint) (identity.Endpoint, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.byID[ep.ID()]; ok {
		return ep, conflict("endpoint %s exists already", ep.ID())
	}
	address, err := e.pool.next()
	if err != nil {
		return ep, err
	}
	ep.Address, ep.MTU, ep.HostLink, ep.Created = address, e.mtu, hostLink(ep.ID()), time.Now()
	if _, err := os.Stat(ep.NetNS); errors.Is(err, fs.ErrNotExist) {
		return ep, invalid("netns %s does not exist; is the pod gone already?", ep.NetNS)
	}
	link, err := datapath.CreatePodLink(datapath.PodLinkConfig{NetNS: ep.NetNS, HostLink: ep.HostLink, Address: ep.Address, Address6: ep.Address6, MTU: ep.MTU})
	if err != nil {
		return ep, err
	}
	ep.IfIndex, ep.HostMAC, ep.MAC = link.IfIndex, link.HostMAC, link.MAC
	e.byID[ep.ID()] = ep
	e.pool.take(ep.Address)
	if err := e.save(); err != nil {
		e.forget(ep)
		return ep, errors.Join(err, datapath.DeletePodLink(ep.HostLink))
	}
	return ep, e.insert(ep)
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
	return errors.Join(e.save(), e.remove(ep), datapath.DeletePodLink(ep.HostLink))
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

// Restore brings back the endpoints of the agent's earlier life, as far as their links still exist.
func (e *endpoints) Restore() error {
	data, err := os.ReadFile(e.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var kept []identity.Endpoint
	if err := json.Unmarshal(data, &kept); err != nil {
		return fmt.Errorf("%s is damaged: %w; remove it to start without the endpoints it holds", e.file, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ep := range kept {
		back, err := e.restore(ep)
		if err != nil {
			return fmt.Errorf("bringing back endpoint %s: %w", ep.ID(), err)
		}
		if !back {
			e.log.Info("endpoint went away while the agent was down", "endpoint", ep.ID(), "address", ep.Address)
		}
	}
	return e.save()
}

// readopt returns the identity of an endpoint of an earlier life: the one that it had, or a new one if the cluster has been assigned another ID since.
func (e *endpoints) readopt(ep identity.Endpoint) (identity.Number, error) {
	if ep.Identity.Cluster() == e.id {
		return e.identity.Adopt(context.Background(), ep.Labels, ep.Identity)
	}
	ctx, cancel := context.WithTimeout(context.Background(), idPatience)
	defer cancel()
	return e.identity.Allocate(ctx, ep.Labels)
}

// restore brings back one endpoint; false if its link is gone, or its address is not this node's any more. An error says
// that this is not known, so that nothing may be forgotten.
func (e *endpoints) restore(ep identity.Endpoint) (bool, error) {
	link, ok, err := datapath.PodLinkExists(ep.HostLink)
	if err != nil || !ok || !e.pool.cidr.Contains(ep.Address) {
		return false, err
	}
	ep.IfIndex, ep.HostMAC = link.IfIndex, link.HostMAC // the pod's MAC is only seen from inside of it
	if err := datapath.RepairPodLink(datapath.PodLinkConfig{HostLink: ep.HostLink, Address: ep.Address, Address6: ep.Address6, MTU: ep.MTU}, ep.MAC); err != nil {
		e.log.Warn("endpoint's link is not repaired", "endpoint", ep.ID(), "error", err)
	}
	e.byID[ep.ID()] = ep
	e.pool.take(ep.Address)
	number, err := e.readopt(ep)
	if err != nil {
		e.log.Warn("endpoint keeps its identity unconfirmed", "endpoint", ep.ID(), "error", err)
		number = ep.Identity
	}
	ep.Identity = number
	return true, e.insert(ep)
}

func (e *endpoints) get(id string) (identity.Endpoint, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ep, ok := e.byID[id]
	return ep, ok
}

func (e *endpoints) forget(ep identity.Endpoint) {
	delete(e.byID, ep.ID())
	e.pool.give(ep.Address)
}

// save writes the endpoints down, so that either the old or the new file is there.
func (e *endpoints) save() error {
	kept := make([]identity.Endpoint, 0, len(e.byID))
	for _, id := range slices.Sorted(maps.Keys(e.byID)) {
		kept = append(kept, e.byID[id])
	}
	data, err := json.Marshal(kept)
	if err != nil {
		return err
	}
	return writeFile(e.file, data)
}

func writeFile(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := writeSynced(path+".new", data); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// writeSynced returns when the file is on the disk: a rename may get there earlier than what it renames, and an
// agent does not start with a damaged file.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
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
	ep := identity.Endpoint{Namespace: req.Namespace, Name: req.Name, NetNS: req.NetNS, State: req.State, Labels: identity.Labels{}}
	if ep.Namespace == "" {
		ep.Namespace = "default"
	}
	if ep.State == "" {
		ep.State = identity.EndpointReady
	}
	if !validState(ep.State) {
		return ep, invalid("state %q: want ready, not-ready or terminating", req.State)
	}
	if !filepath.IsAbs(req.NetNS) {
		return ep, invalid("netns %q: want the absolute path of a network namespace", req.NetNS)
	}
	maps.Copy(ep.Labels, req.Labels)
	ep.Labels[identity.NamespaceLabel] = ep.Namespace
	for what, name := range map[string]string{"namespace": ep.Namespace, "name": ep.Name} {
		if err := lb.CheckName(what, name); err != nil {
			return ep, invalid("%w", err)
		}
	}
	if err := identity.CheckLabels(ep.Labels); err != nil {
		return ep, invalid("%w", err)
	}
	return ep, nil
}

func validState(s identity.EndpointState) bool {
	return s == identity.EndpointReady || s == identity.EndpointNotReady || s == identity.EndpointTerminating
}
