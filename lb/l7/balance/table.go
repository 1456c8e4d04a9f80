package balance

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"

	"causeway/lb"
	"causeway/lb/l7/state"
)

// A first, simple inside, that the engines' tests can run on.

type table struct {
	mu        sync.RWMutex
	node      state.Self
	frontends map[netip.AddrPort]*lb.Frontend
	byKey     map[lb.PortKey]*Port
	targets   map[lb.PortKey]map[lb.TargetKey]*Endpoint
	clients   map[netip.Addr]state.Client
	change    chan struct{}
}

type port struct {
	key     lb.PortKey
	current atomic.Pointer[lb.Route]
	gone    chan struct{}
	all     atomic.Pointer[[]*Endpoint]
	next    atomic.Uint64
}

type endpoint struct {
	of      *Port
	address netip.AddrPort
	row     atomic.Pointer[lb.Target]
	removed chan struct{}
	active  atomic.Int64
	sick    atomic.Pointer[string]
	mu      sync.Mutex
	kept    [kinds]atomic.Pointer[any]
}

func newTable() *Table {
	t := &Table{}
	t.reset()
	t.change = make(chan struct{})
	return t
}

func (t *table) reset() {
	t.frontends, t.byKey = map[netip.AddrPort]*lb.Frontend{}, map[lb.PortKey]*Port{}
	t.targets, t.clients = map[lb.PortKey]map[lb.TargetKey]*Endpoint{}, map[netip.Addr]state.Client{}
}

func (t *table) apply(updates []state.Update) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, u := range updates {
		switch {
		case u.Self != nil:
			t.node = *u.Self
		case u.Frontend != nil:
			t.frontends[netip.AddrPortFrom(u.Frontend.Address, u.Frontend.Port)] = u.Frontend
		case u.FrontendGone != nil:
			delete(t.frontends, netip.AddrPortFrom(u.FrontendGone.Address, u.FrontendGone.Port))
		case u.Route != nil:
			p := t.byKey[u.Route.Port]
			if p == nil {
				p = &Port{port{key: u.Route.Port, gone: make(chan struct{})}}
				p.all.Store(new([]*Endpoint))
				t.byKey[p.key] = p
			}
			p.current.Store(u.Route)
		case u.RouteGone != nil:
			if p := t.byKey[*u.RouteGone]; p != nil {
				close(p.gone)
				delete(t.byKey, *u.RouteGone)
			}
		case u.Target != nil:
			k := u.Target.Port
			if t.targets[k] == nil {
				t.targets[k] = map[lb.TargetKey]*Endpoint{}
			}
			e := t.targets[k][u.Target.TargetKey]
			if e == nil {
				e = &Endpoint{endpoint{address: netip.AddrPortFrom(u.Target.Address, u.Target.Number), removed: make(chan struct{})}}
				t.targets[k][u.Target.TargetKey] = e
			}
			e.row.Store(u.Target)
		case u.TargetGone != nil:
			if e := t.targets[u.TargetGone.Port][*u.TargetGone]; e != nil {
				close(e.removed)
				delete(t.targets[u.TargetGone.Port], *u.TargetGone)
			}
		case u.Client != nil:
			t.clients[u.Client.Address] = *u.Client
		case u.ClientGone != nil:
			delete(t.clients, *u.ClientGone)
		}
	}
	for k, p := range t.byKey {
		var list []*Endpoint
		for _, e := range t.targets[k] {
			e.of = p
			list = append(list, e)
		}
		slices.SortFunc(list, func(a, b *Endpoint) int { return a.address.Compare(b.address) })
		p.all.Store(&list)
	}
	close(t.change)
	t.change = make(chan struct{})
}

func (t *table) frontend(a netip.AddrPort) (*Port, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	f := t.frontends[a]
	if f == nil {
		return nil, false
	}
	p, ok := t.byKey[f.Target]
	return p, ok
}

func (t *table) ports() []*Port {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var list []*Port
	for _, p := range t.byKey {
		list = append(list, p)
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
	c, ok := t.clients[a]
	if !ok {
		c = state.Client{Address: a, Identity: t.node.HostIdentity}
	}
	return c
}

func (p *port) route() *lb.Route       { return p.current.Load() }
func (p *port) endpoints() []*Endpoint { return *p.all.Load() }

func (p *port) hashKey() (header, cookie string) {
	o := &p.route().Options
	return o.HashHeader, o.HashCookie
}

func hash(value []byte) uint64 { return xxhash.Sum64(value) }

func (p *port) pick(q *Query) (*Endpoint, error) {
	all := *p.all.Load()
	if len(all) == 0 {
		return nil, ErrNoBackend
	}
	start := p.next.Add(1)
	switch {
	case q.Hashed:
		start = q.Hash
	case p.route().Options.Algorithm == lb.Random:
		start = rand.Uint64()
	}
	for i := range uint64(len(all)) {
		e := all[(start+i)%uint64(len(all))]
		if !slices.Contains(q.Tried, e) && !e.row.Load().Quarantined {
			return e, nil
		}
	}
	return nil, ErrNoBackend
}

func (p *port) arrived()               {}
func (p *port) retry(attempt int) bool { return attempt <= p.route().Options.Retries }

func (e *endpoint) target() *lb.Target { return e.row.Load() }
func (e *endpoint) begin()             { e.active.Add(1) }
func (e *endpoint) end(Outcome)        { e.active.Add(-1) }
func (e *endpoint) inFlight() int      { return int(e.active.Load()) }

func (e *endpoint) health() Health {
	h := Health{Quarantined: e.row.Load().Quarantined}
	if reason := e.sick.Load(); reason != nil {
		h.Unhealthy, h.Reason = true, *reason
	}
	return h
}

func (e *endpoint) setHealthy(healthy bool, reason string) {
	if healthy {
		e.sick.Store(nil)
	} else {
		e.sick.Store(&reason)
	}
}

func (e *endpoint) keep(kind int, make func() any) any {
	if kept := e.kept[kind].Load(); kept != nil {
		return *kept
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if kept := e.kept[kind].Load(); kept != nil {
		return *kept
	}
	made := make()
	e.kept[kind].Store(&made)
	return made
}
