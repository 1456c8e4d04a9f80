package tunnel

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"causeway/identity"
)

// Update makes the node's keys peers, with routes to its tunnel addresses, if its mode is wireguard; otherwise it removes them. A key or tunnel address
// that is another node's is an error, and changes nothing for the other one.
func (w *WireGuard) Update(_ context.Context, t identity.Tunnel) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.peers.set(t, w.own())
	return errors.Join(err, w.apply(d, time.Now()))
}

// Delete removes the node's peers and routes.
func (w *WireGuard) Delete(_ context.Context, t identity.Tunnel) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.remove(t)
}

func (w *WireGuard) remove(t identity.Tunnel) error {
	t.Mode = identity.TunnelClosed
	d, err := w.peers.set(t, w.own())
	return errors.Join(err, w.apply(d, time.Now()))
}

// Prune removes the peers and routes of nodes that aren't desired, of clusters that have synced.
func (w *WireGuard) Prune(_ context.Context, desired iter.Seq[identity.Tunnel], synced func(identity.ClusterID) bool) error {
	keep := map[identity.NodeName]bool{}
	for t := range desired {
		keep[t.NodeName()] = true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for name, n := range w.peers.nodes {
		if !keep[name] && synced(n.row.ClusterID) {
			errs = append(errs, w.remove(n.row))
		}
	}
	if !w.pruned {
		w.pruned = true
		for _, s := range w.inUse() {
			s.checked = time.Time{}
		}
		w.wake()
	}
	return errors.Join(errs...)
}

// apply writes a difference to the devices. One that isn't there gets all of it when it is.
func (w *WireGuard) apply(d difference, now time.Time) error {
	var errs []error
	for _, s := range w.inUse() {
		if s.ready && !d.empty() {
			if err := w.applyTo(s, d, now); err != nil {
				w.fail(s, err, now)
			}
		}
		if !s.ready {
			errs = append(errs, fmt.Errorf("device %s is not there yet: %w", s.name, s.problem))
		}
	}
	if !d.empty() {
		w.saved.change(now)
		w.wake()
	}
	return errors.Join(errs...)
}

// applyTo costs one call of WireGuard, and one for each route.
func (w *WireGuard) applyTo(s *slot, d difference, now time.Time) error {
	var list []wgtypes.PeerConfig
	for _, p := range d.gone {
		list = append(list, wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.key), Remove: true})
		w.drop(s, p)
	}
	for _, c := range d.changed {
		list = append(list, w.changePeer(s, c)...)
	}
	for _, p := range d.added {
		list = append(list, w.peerConfig(p, p.goesTo()))
		first := s.goesFirst(p) && p.goesTo().IsValid()
		if first {
			list = append(list, w.askFor(p)...)
		}
		w.expect(s, p, now, first)
	}
	if err := s.set(wgtypes.Config{Peers: list}); err != nil {
		return err
	}
	return w.applyRoutes(s, d)
}

// changePeer returns what makes the old peer the new one, which has the same key.
func (w *WireGuard) changePeer(s *slot, c changedPeer) []wgtypes.PeerConfig {
	if c.old.remote != c.new.remote {
		x := s.sessions[c.old.key]
		w.view.set(pair{c.old.node, s.number, c.old.remote}, false)
		w.view.set(pair{c.new.node, s.number, c.new.remote}, x != nil && x.shaken)
	}
	cfg := w.peerConfig(c.new, c.new.endpoint)
	if c.old.endpoint == c.new.endpoint {
		cfg.Endpoint = nil // It may have roamed.
	}
	return []wgtypes.PeerConfig{cfg}
}

// drop forgets a peer's session.
func (w *WireGuard) drop(s *slot, p *peer) {
	delete(s.sessions, p.key)
	w.view.set(pair{p.node, s.number, p.remote}, false)
}

func (w *WireGuard) applyRoutes(s *slot, d difference) error {
	want := map[slotRoute]bool{}
	family := familyOf(w.cfg.Tunnel[s.number])
	add := func(p *peer) error {
		if familyOf(p.address) != family {
			return nil
		}
		for _, r := range w.peerRoutes(s, p) {
			want[slotRoute{p.address, r.Tos}] = true
			if err := w.setRoute(r); err != nil {
				return err
			}
		}
		return nil
	}
	for _, p := range d.added {
		if err := add(p); err != nil {
			return err
		}
	}
	old := d.gone
	for _, c := range d.changed {
		old = append(old[:len(old):len(old)], c.old)
		if err := add(c.new); err != nil {
			return err
		}
	}
	for _, p := range old {
		if familyOf(p.address) != family {
			continue
		}
		for _, r := range w.peerRoutes(s, p) {
			if want[slotRoute{p.address, r.Tos}] {
				continue
			}
			if err := w.removeRoute(r); err != nil {
				return err
			}
		}
	}
	return nil
}
