package balance

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"causeway/lb"
)

type endpoint struct {
	of      *Port
	address netip.AddrPort
	row     atomic.Pointer[lb.Target]
	removed chan struct{}

	active    atomic.Int64
	requests  atomic.Uint64
	failures  atomic.Uint64
	inARow    atomic.Int32 // failures since the last success
	sick      atomic.Pointer[string]
	ejections atomic.Uint64
	// ejectedUntil is in nanoseconds since 1970; 0: it is not ejected.
	ejectedUntil atomic.Int64
	// since is when it appeared, or came back; zero: long ago. Of the port's lock.
	since time.Time
	// multiplier is how many times as long as the first the last ejection was, back when that ended. Of the port's lock.
	multiplier int
	back       time.Time

	mu   sync.Mutex
	kept [kinds]atomic.Pointer[any]
}

func (e *endpoint) target() *lb.Target { return e.row.Load() }
func (e *endpoint) inFlight() int      { return int(e.active.Load()) }

func (e *endpoint) begin() {
	e.active.Add(1)
	e.requests.Add(1)
}

func (e *endpoint) end(r Outcome) {
	e.active.Add(-1)
	switch r {
	case Success:
		if e.inARow.Load() != 0 {
			e.inARow.Store(0)
		}
	case Failure:
		e.failures.Add(1)
		limit := e.of.route().Options.OutlierFailures
		if n := e.inARow.Add(1); limit > 0 && int(n) >= limit {
			e.of.eject(e)
		}
	}
}

// healthy tells whether it may be chosen, as far as anybody knows.
func (e *endpoint) healthy() bool {
	return !e.row.Load().Quarantined && e.sick.Load() == nil && e.ejectedUntil.Load() == 0
}

// started is the part of its share that it may have by now, and whether there will be more.
func (e *endpoint) started(slow time.Duration, now time.Time) (float64, bool) {
	age := now.Sub(e.since)
	if slow <= 0 || e.since.IsZero() || age >= slow {
		return 1, false
	}
	return max(leastStart, float64(age)/float64(slow)), true
}

func (e *endpoint) health() Health {
	h := Health{Quarantined: e.row.Load().Quarantined, Ejected: e.ejectedUntil.Load() != 0, Ejections: e.ejections.Load()}
	if reason := e.sick.Load(); reason != nil {
		h.Unhealthy, h.Reason = true, *reason
	}
	return h
}

func (e *endpoint) setHealthy(healthy bool, reason string) {
	was := e.sick.Load() == nil
	if healthy {
		e.sick.Store(nil)
	} else {
		e.sick.Store(&reason)
	}
	if was == healthy {
		return
	}
	p := e.of
	p.table.mu.RLock()
	defer p.table.mu.RUnlock()
	if healthy {
		p.mu.Lock()
		e.since = p.table.now()
		p.mu.Unlock()
	}
	p.rebuild()
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
