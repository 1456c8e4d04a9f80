package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"causeway/identity"
)

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
		if e.pools.of(ep.Address) == nil {
			e.log.Warn("endpoint is forgotten, since its address is in none of this node's pod ranges any more; add the pod anew", "endpoint", ep.ID(), "address", ep.Address)
			continue
		}
		back, err := e.restore(e.withinRanges(ep))
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

// withinRanges takes from a kept endpoint what the node's ranges do not have any more. One that has an address of one range only, since it
// is older than the other range, stays as it is: its pod is not changed while it runs.
func (e *endpoints) withinRanges(ep identity.Endpoint) identity.Endpoint {
	if ep.Address6.IsValid() && e.pools.of(ep.Address6) == nil {
		e.log.Warn("endpoint loses an address that is in none of this node's pod ranges any more", "endpoint", ep.ID(), "address", ep.Address6)
		ep.Address6 = netip.Addr{}
	}
	if len(ep.Addresses()) < len(e.pools) {
		e.log.Info("endpoint has an address of one family only, add the pod anew to give it both", "endpoint", ep.ID(), "address", ep.Address)
	}
	return ep
}

// restore brings back one endpoint; false if its link is gone. An error says that this is not known, so that nothing may be forgotten.
func (e *endpoints) restore(ep identity.Endpoint) (bool, error) {
	link, ok, err := e.links.Find(ep.HostLink)
	if err != nil || !ok {
		return false, err
	}
	ep.IfIndex, ep.HostMAC = link.IfIndex, link.HostMAC // the pod's MAC is only seen from inside of it
	if err := e.links.Repair(ep); err != nil {
		e.log.Warn("endpoint's link is not repaired", "endpoint", ep.ID(), "error", err)
	}
	e.byID[ep.ID()] = ep
	e.pools.take(ep.Addresses())
	number, err := e.readopt(ep)
	if err != nil {
		e.log.Warn("endpoint keeps its identity unconfirmed", "endpoint", ep.ID(), "error", err)
		number = ep.Identity
	}
	ep.Identity = number
	return true, e.insert(ep)
}

// problems tells what is not as it should be with pods, and which row does not show.
func (e *endpoints) problems() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append(e.tunnelAddresses(), e.labelProblems()...)
}

// tunnelAddresses tells which pods have an address from before it was the end of a tunnel: other pods reach them all the same, but the node takes
// the address for its own. Needs mu.
func (e *endpoints) tunnelAddresses() (problems []string) {
	if !e.tunnels {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(e.byID)) {
		ep := e.byID[id]
		for _, a := range ep.Addresses() {
			if pool := e.pools.of(a); pool != nil && pool.reserves(a) {
				problems = append(problems, fmt.Sprintf("endpoint %s has the address %s, which is this node's own in its tunnels: pods reach it, the node does not; delete the pod and add it anew", id, a))
			}
		}
	}
	return problems
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
