package balance

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"

	"causeway/lb"
)

// port is what a route and its targets have become. Requests read current and plan, which are replaced as a whole.
type port struct {
	table   *table
	key     lb.PortKey
	current atomic.Pointer[lb.Route]
	gone    chan struct{}
	plan    atomic.Pointer[plan]
	next    atomic.Uint64 // the place in the plan's sequence
	budget  budget

	mu        sync.Mutex
	endpoints map[lb.TargetKey]*Endpoint
	ejected   int
	// near is the order of clusters by round trips that is in use.
	near []string
	// refreshed is when the plan was made last for the sake of slow starts.
	refreshed time.Time
}

func newPort(t *table, r *lb.Route) *Port {
	p := &Port{port{table: t, key: r.Port, gone: make(chan struct{}), endpoints: map[lb.TargetKey]*Endpoint{}}}
	p.current.Store(r)
	p.plan.Store(&plan{})
	// Proxies that begin together do not all begin with the same backend.
	p.next.Store(rand.Uint64())
	p.budget.begin(t.now())
	return p
}

// put takes a target. first tells that it belongs to the first state that this proxy reads, so that nobody knows how old the backend is.
func (p *Port) put(target *lb.Target, first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.port.endpoints[target.TargetKey]
	if e == nil {
		e = &Endpoint{endpoint{of: p, address: netip.AddrPortFrom(target.Address, target.Number), removed: make(chan struct{})}}
		if !first {
			e.since = p.table.now()
		}
		p.port.endpoints[target.TargetKey] = e
	} else if was := e.row.Load(); was.Quarantined && !target.Quarantined {
		e.since = p.table.now()
	}
	e.row.Store(target)
}

func (p *Port) drop(key lb.TargetKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.port.endpoints[key]
	if e == nil {
		return
	}
	delete(p.port.endpoints, key)
	if e.ejectedUntil.Load() != 0 {
		p.ejected--
	}
	close(e.removed)
}

// rebuild makes the plan anew. The caller holds the table's lock, in either way.
func (p *Port) rebuild() {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]*Endpoint, 0, len(p.port.endpoints))
	for _, e := range p.port.endpoints {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *Endpoint) int { return a.address.Compare(b.address) })
	p.near = nearest(p.near, clustersOf(all), p.table.trips)
	p.plan.Store(newPlan(p.current.Load(), all, p.table.node.Cluster, p.near, p.table.now()))
}

// tick tells whether the plan has to be made anew.
func (p *Port) tick(now time.Time) bool {
	p.budget.tick(now)
	p.mu.Lock()
	defer p.mu.Unlock()
	again := false
	if p.ejected > 0 {
		for _, e := range p.port.endpoints {
			if until := e.ejectedUntil.Load(); until != 0 && now.UnixNano() >= until {
				e.ejectedUntil.Store(0)
				e.since, e.back = now, now
				p.ejected--
				again = true
			}
		}
	}
	if p.plan.Load().starting && now.Sub(p.refreshed) >= slowStartStep {
		p.refreshed, again = now, true
	}
	return again
}

// slowStartStep is how often the shares of starting endpoints are raised.
const slowStartStep = 500 * time.Millisecond

func (p *port) route() *lb.Route { return p.current.Load() }

func (p *Port) list() []*Endpoint { return p.plan.Load().all }

func (p *port) hashKey() (header, cookie string) {
	o := &p.route().Options
	return o.HashHeader, o.HashCookie
}

func hash(value []byte) uint64 { return xxhash.Sum64(value) }

func (p *Port) pick(q *Query) (*Endpoint, error) {
	plan := p.plan.Load()
	if len(plan.sequence) == 0 {
		return nil, ErrNoBackend
	}
	var e *Endpoint
	switch {
	case q.Hashed && plan.maglev != nil:
		return plan.hashed(q)
	case plan.algorithm == lb.RoundRobin:
		e = plan.at(p.next.Add(1))
	case plan.algorithm == lb.LeastRequest:
		a, b := plan.at(rand.Uint64()), plan.at(rand.Uint64())
		if e = a; b.active.Load() < a.active.Load() {
			e = b
		}
	default:
		e = plan.at(rand.Uint64())
	}
	if len(q.Tried) == 0 || !slices.Contains(q.Tried, e) {
		return e, nil
	}
	return plan.another(q.Tried, p.next.Load())
}
