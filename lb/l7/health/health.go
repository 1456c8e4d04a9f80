// Package health asks backends whether they are well, as their services' annotations want it, and tells the balancer.
package health

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"causeway/lb"
	"causeway/lb/l7/balance"
)

const (
	// failuresToSick is how many checks in a row have to fail for a backend that was well. One that was never well is sick by its first failure. One success is
	// enough to be well again.
	failuresToSick = 2
	// jitter spreads checks, as part of the interval in both directions, so that the nodes of a mesh do not ask a backend all at once.
	jitter = 0.1
	// slower is how many intervals pass between checks of a quarantined backend: nobody is sent there anyway.
	slower = 5
	// atOnce bounds the checks under way.
	atOnce = 256
)

// Dial connects to a backend.
type Dial func(ctx context.Context, e *balance.Endpoint) (net.Conn, error)

// Run checks every endpoint of the table's ports whose route wants it, until ctx ends.
func Run(ctx context.Context, table *balance.Table, dial Dial, log *slog.Logger) {
	r := &runner{dial: dial, log: log, slots: make(chan struct{}, atOnce), checked: map[*balance.Endpoint]struct{}{}}
	defer r.tasks.Wait()
	for {
		changed := table.Changed()
		for _, p := range table.Ports() {
			if p.Route().Options.Health.Kind != lb.HealthNone {
				r.begin(ctx, p)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

type runner struct {
	dial  Dial
	log   *slog.Logger
	slots chan struct{}
	tasks sync.WaitGroup

	mu      sync.Mutex
	checked map[*balance.Endpoint]struct{}
}

// begin has those endpoints of a port checked that are not yet.
func (r *runner) begin(ctx context.Context, p *balance.Port) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range p.Endpoints() {
		if _, ok := r.checked[e]; ok {
			continue
		}
		r.checked[e] = struct{}{}
		r.tasks.Go(func() {
			r.watch(ctx, e)
			r.mu.Lock()
			delete(r.checked, e)
			r.mu.Unlock()
		})
	}
}

// watch checks one endpoint until it is removed or its route does not want it any more.
func (r *runner) watch(ctx context.Context, e *balance.Endpoint) {
	failures, ever := 0, false
	for first := true; ; first = false {
		check := e.Port().Route().Options.Health
		if check.Kind == lb.HealthNone {
			e.SetHealthy(true, "")
			return
		}
		if !first && !wait(ctx, e, pause(check.Interval, e.Target().Quarantined)) {
			return
		}
		err := r.check(ctx, e, check)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			if failures > 0 && e.Health().Unhealthy {
				r.log.Info("a backend is well again", "service", e.Port().Key().String(), "backend", e.Address().String())
			}
			failures, ever = 0, true
			e.SetHealthy(true, "")
			continue
		}
		if failures++; failures >= failuresToSick || !ever {
			if !e.Health().Unhealthy {
				r.log.Warn("a backend gets no more requests", "service", e.Port().Key().String(), "backend", e.Address().String(), "error", err)
			}
			e.SetHealthy(false, err.Error())
		}
	}
}

// check asks once.
func (r *runner) check(ctx context.Context, e *balance.Endpoint, check lb.HealthCheck) error {
	select {
	case r.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-r.slots }()
	ctx, cancel := context.WithTimeout(ctx, check.Timeout)
	defer cancel()
	conn, err := r.dial(ctx, e)
	if err != nil {
		return err
	}
	defer conn.Close()
	switch check.Kind {
	case lb.HealthHTTP:
		return checkHTTP(ctx, conn, e, check.Path)
	case lb.HealthGRPC:
		return checkGRPC(ctx, conn, e, check.Service)
	}
	return nil // That it can be connected to is what is asked.
}

func pause(interval time.Duration, quarantined bool) time.Duration {
	if quarantined {
		interval *= slower
	}
	return time.Duration(float64(interval) * (1 - jitter + 2*jitter*rand.Float64()))
}

// wait returns false if there is nothing to be checked any more.
func wait(ctx context.Context, e *balance.Endpoint, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-e.Removed():
	case <-e.Port().Gone():
	case <-ctx.Done():
	}
	return false
}
