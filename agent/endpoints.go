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
const identityTimeout = 5 * time.Second

// endpoints is the source of the endpoints table: pods that the local API (or a CNI plugin through it)
// asks for. It makes their links, gives them addresses and identities, and keeps them over restarts.
type endpoints struct {
	tables   *clustermesh.Tables
	identity *identity.Allocator
	mtu      int
	file     string // where endpoints are kept over restarts
	cluster  string
	log      *slog.Logger

	mu sync.Mutex
	// byID are the endpoints that exist, pool has their addresses.
	byID map[string]identity.Endpoint
	pool *addressPool
}

func newEndpoints(tables *clustermesh.Tables, alloc *identity.Allocator, cfg Config, mtu int, log *slog.Logger) *endpoints {
	return &endpoints{
		tables: tables, identity: alloc, mtu: mtu, cluster: cfg.Cluster.Name, log: log,
		file: filepath.Join(cfg.StateDir, "endpoints.json"),
		byID: map[string]identity.Endpoint{}, pool: newAddressPool(cfg.Node.PodCIDR),
	}
}

// Add connects a network namespace as a pod and returns when its packets can flow.
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
		return ep, errors.Join(err, e.identity.Release(ctx, ep.Labels))
	}
	return ep, e.waitReconciled(ctx, ep.ID())
}

// allocate returns the identity of labels: from the store, or while that is away from what is known.
func (e *endpoints) allocate(ctx context.Context, labels identity.Labels) (identity.Number, error) {
	ctx, cancel := context.WithTimeout(ctx, identityTimeout)
	defer cancel()
	number, err := e.identity.Allocate(ctx, labels)
	if err == nil {
		return number, nil
	}
	if known, ok := e.tables.IdentityOf(e.tables.DB.ReadTxn(), e.cluster, labels); ok {
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
	link, err := datapath.CreatePodLink(datapath.PodLinkConfig{NetNS: ep.NetNS, HostLink: ep.HostLink, Address: ep.Address, MTU: ep.MTU})
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
	e.forget(ep)
	err := errors.Join(e.save(), e.remove(ep), datapath.DeletePodLink(ep.HostLink))
	e.mu.Unlock()
	if failed := e.identity.Release(ctx, ep.Labels); failed != nil {
		// It is tried again by maintainIdentities; the endpoint's removal is done.
		e.log.Info("identity not released yet", "labels", ep.Labels.String(), "error", failed)
	}
	return err
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
		if !e.restore(ep) {
			e.log.Info("endpoint went away while the agent was down", "endpoint", ep.ID(), "address", ep.Address)
		}
	}
	return e.save()
}

func (e *endpoints) restore(ep identity.Endpoint) bool {
	link, ok, err := datapath.PodLinkExists(ep.HostLink)
	if err != nil || !ok || !e.pool.cidr.Contains(ep.Address) {
		return false
	}
	ep.IfIndex, ep.HostMAC = link.IfIndex, link.HostMAC // the pod's MAC is only seen from inside of it
	e.byID[ep.ID()] = ep
	e.pool.take(ep.Address)
	number, err := e.identity.Adopt(context.Background(), ep.Labels, ep.Identity)
	if err != nil {
		e.log.Warn("endpoint keeps its identity unconfirmed", "endpoint", ep.ID(), "error", err)
		number = ep.Identity
	}
	ep.Identity = number
	return e.insert(ep) == nil
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
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
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
func (e *endpoints) waitReconciled(ctx context.Context, id string) error {
	for {
		row, _, changed, ok := e.tables.Endpoints.GetWatch(e.tables.DB.ReadTxn(), e.tables.Endpoints.ByKey(id))
		switch {
		case !ok:
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
