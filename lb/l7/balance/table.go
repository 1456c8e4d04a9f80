package balance

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"
	"time"

	"causeway/lb"
	"causeway/lb/l7/state"
)

// table is what the state says, by name. Connections look a frontend up in it, requests never do.
type table struct {
	mu        sync.RWMutex
	now       func() time.Time
	node      state.Self
	frontends map[netip.AddrPort]held[lb.Frontend]
	services  map[lb.PortKey]*service
	clients   map[netip.Addr]held[state.Client]
	// trips are the clusters' round trips.
	trips map[string]held[time.Duration]
	// generation counts the whole states that have begun; what is of an older one goes when one is complete.
	generation int
	synced     bool
	change     chan struct{}
}

// held is something of the state, and the whole state that has named it last.
type held[T any] struct {
	it         T
	generation int
}

// service is a port's route and targets, whichever came first.
type service struct {
	route   *held[*lb.Route]
	targets map[lb.TargetKey]held[*lb.Target]
	live    *Port // as long as there is a route
}

func newTable() *Table {
	return &Table{table{
		now:       time.Now,
		frontends: map[netip.AddrPort]held[lb.Frontend]{}, services: map[lb.PortKey]*service{},
		clients: map[netip.Addr]held[state.Client]{}, trips: map[string]held[time.Duration]{},
		change: make(chan struct{}),
	}}
}

func (t *table) apply(updates []state.Update) {
	t.mu.Lock()
	defer t.mu.Unlock()
	touched := map[*Port]struct{}{}
	for i := range updates {
		t.take(&updates[i], touched)
	}
	for p := range touched {
		p.rebuild()
	}
	close(t.change)
	t.change = make(chan struct{})
}

// take takes one update, and notes the ports that it changes.
func (t *table) take(u *state.Update, touched map[*Port]struct{}) {
	switch {
	case u.Reset:
		t.generation++
	case u.Synced:
		t.forget(touched)
		t.synced = true
	case u.Self != nil:
		t.node = *u.Self
		t.touchAll(touched)
	case u.Frontend != nil:
		t.frontends[netip.AddrPortFrom(u.Frontend.Address, u.Frontend.Port)] = held[lb.Frontend]{*u.Frontend, t.generation}
	case u.FrontendGone != nil:
		delete(t.frontends, netip.AddrPortFrom(u.FrontendGone.Address, u.FrontendGone.Port))
	case u.Route != nil:
		t.putRoute(u.Route, touched)
	case u.RouteGone != nil:
		t.dropRoute(*u.RouteGone)
	case u.Target != nil:
		t.putTarget(u.Target, touched)
	case u.TargetGone != nil:
		t.dropTarget(*u.TargetGone, touched)
	case u.Client != nil:
		t.clients[u.Client.Address] = held[state.Client]{*u.Client, t.generation}
	case u.ClientGone != nil:
		delete(t.clients, *u.ClientGone)
	case u.Cluster != nil:
		t.trips[u.Cluster.Name] = held[time.Duration]{u.Cluster.RTT, t.generation}
		t.touchNearest(touched)
	}
}

func (t *table) service(key lb.PortKey) *service {
	s := t.services[key]
	if s == nil {
		s = &service{targets: map[lb.TargetKey]held[*lb.Target]{}}
		t.services[key] = s
	}
	return s
}

func (t *table) putRoute(r *lb.Route, touched map[*Port]struct{}) {
	s := t.service(r.Port)
	s.route = &held[*lb.Route]{r, t.generation}
	if s.live == nil {
		s.live = newPort(t, r)
		for _, target := range s.targets {
			s.live.put(target.it, !t.synced)
		}
	}
	s.live.current.Store(r)
	touched[s.live] = struct{}{}
}

// dropRoute ends a port. What is under way on it goes on with the endpoints that it has.
func (t *table) dropRoute(key lb.PortKey) {
	s := t.services[key]
	if s == nil || s.route == nil {
		return
	}
	close(s.live.gone)
	s.route, s.live = nil, nil
	t.tidy(key, s)
}

func (t *table) putTarget(target *lb.Target, touched map[*Port]struct{}) {
	s := t.service(target.Port)
	s.targets[target.TargetKey] = held[*lb.Target]{target, t.generation}
	if s.live != nil {
		s.live.put(target, !t.synced)
		touched[s.live] = struct{}{}
	}
}

func (t *table) dropTarget(key lb.TargetKey, touched map[*Port]struct{}) {
	s := t.services[key.Port]
	if s == nil {
		return
	}
	delete(s.targets, key)
	if s.live != nil {
		s.live.drop(key)
		touched[s.live] = struct{}{}
	}
	t.tidy(key.Port, s)
}

func (t *table) tidy(key lb.PortKey, s *service) {
	if s.route == nil && len(s.targets) == 0 {
		delete(t.services, key)
	}
}

// forget removes what the whole state that is complete now has not named.
func (t *table) forget(touched map[*Port]struct{}) {
	for key, s := range t.services {
		for k, target := range s.targets {
			if target.generation != t.generation {
				t.dropTarget(k, touched)
			}
		}
		if s.route != nil && s.route.generation != t.generation {
			t.dropRoute(key)
		}
	}
	forgetOld(t.frontends, t.generation)
	forgetOld(t.clients, t.generation)
	forgetOld(t.trips, t.generation)
}

func forgetOld[K comparable, V any](m map[K]held[V], generation int) {
	for k, v := range m {
		if v.generation != generation {
			delete(m, k)
		}
	}
}

func (t *table) touchAll(touched map[*Port]struct{}) {
	for _, s := range t.services {
		if s.live != nil {
			touched[s.live] = struct{}{}
		}
	}
}

// touchNearest notes the ports that depend on round trips.
func (t *table) touchNearest(touched map[*Port]struct{}) {
	for _, s := range t.services {
		if s.live != nil && s.route.it.Options.Affinity == lb.AffinityNearest {
			touched[s.live] = struct{}{}
		}
	}
}

// tick has time pass: ejections end, starts speed up, retries are allowed anew.
func (t *table) tick(now time.Time) {
	t.mu.RLock()
	ports := make([]*Port, 0, len(t.services))
	for _, s := range t.services {
		if s.live != nil {
			ports = append(ports, s.live)
		}
	}
	t.mu.RUnlock()
	for _, p := range ports {
		if p.tick(now) {
			t.mu.RLock()
			p.rebuild()
			t.mu.RUnlock()
		}
	}
}

func (t *table) frontend(a netip.AddrPort) (*Port, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	f, ok := t.frontends[a]
	if !ok {
		return nil, false
	}
	s := t.services[f.it.Target]
	if s == nil || s.live == nil {
		return nil, false
	}
	return s.live, true
}

func (t *table) ports() []*Port {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var list []*Port
	for _, s := range t.services {
		if s.live != nil {
			list = append(list, s.live)
		}
	}
	slices.SortFunc(list, func(a, b *Port) int { return cmp.Compare(a.key.String(), b.key.String()) })
	return list
}

func (t *table) changed() <-chan struct{} {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.change
}

func (t *table) self() state.Self {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.node
}

func (t *table) client(a netip.Addr) state.Client {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if c, ok := t.clients[a]; ok {
		return c.it
	}
	return state.Client{Address: a, Identity: t.node.HostIdentity}
}
