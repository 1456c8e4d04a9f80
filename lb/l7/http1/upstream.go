package http1

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"causeway/lb/l7/balance"
)

// errOverflow: the endpoint has all connections that it may, and as many requests as may wait for one.
var errOverflow = errors.New("overflow")

// upstream is a connection to a backend.
type upstream struct {
	link
	pool     *pool
	identity uint32
	since    time.Time // it is idle
	used     bool      // it has answered a request before
	step     func(uintptr) bool

	// Of the request under way:
	x       *transfer
	phase   phase
	request []byte
	sent    int
	err     error
}

// pool has an endpoint's connections. The latest one that became idle is used first, so that no more are kept than are needed.
type pool struct {
	mu      sync.Mutex
	idle    map[uint32][]*upstream // by the client's identity
	spare   int                    // idle ones in all
	open    int
	waiting []chan *upstream // each gets a connection, or nil: it may open one
	minded  bool
}

func newPool() any { return &pool{idle: map[uint32][]*upstream{}} }

func poolOf(e *balance.Endpoint) *pool { return e.Keep(balance.KeepHTTP1, newPool).(*pool) }

// connect returns a connection to an endpoint: a kept one, unless a fresh one is asked for, or a new one. Until bounds the wait; zero: nothing does.
func (c *conn) connect(e *balance.Endpoint, fresh bool, until time.Time) (*upstream, error) {
	p, identity := poolOf(e), c.client.Pod.Identity
	options := &e.Port().Route().Options
	p.mu.Lock()
	if list := p.idle[identity]; len(list) > 0 && !fresh {
		u := list[len(list)-1]
		list[len(list)-1] = nil
		p.idle[identity] = list[:len(list)-1]
		p.spare--
		p.mu.Unlock()
		return u, nil
	}
	switch {
	case options.MaxConnections <= 0 || p.open < options.MaxConnections:
		p.open++
	case p.spare > 0:
		p.evict() // Its place is taken.
	case options.MaxPending > 0 && len(p.waiting) >= options.MaxPending:
		p.mu.Unlock()
		return nil, errOverflow
	default:
		turn := make(chan *upstream, 1)
		p.waiting = append(p.waiting, turn)
		p.mu.Unlock()
		u, err := c.wait(p, turn, until)
		if u != nil || err != nil {
			return u, err
		}
		return c.dial(p, e, until)
	}
	p.mu.Unlock()
	return c.dial(p, e, until)
}

// wait for one's turn.
func (c *conn) wait(p *pool, turn chan *upstream, until time.Time) (*upstream, error) {
	ctx := c.ctx
	if !until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, until)
		defer cancel()
	}
	select {
	case u := <-turn:
		if u != nil && u.identity != c.client.Pod.Identity {
			u.conn.Close()
			u = nil
		}
		return u, nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.waiting, turn); i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
		return nil, errOverflow
	}
	if u := <-turn; u != nil {
		u.conn.Close()
	}
	p.passOn()
	return nil, errOverflow
}

func (c *conn) dial(p *pool, e *balance.Endpoint, until time.Time) (*upstream, error) {
	ctx := c.ctx
	limit := sooner(until, after(time.Now(), c.env.Limits.ConnectTimeout))
	if !limit.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, limit)
		defer cancel()
	}
	socket, err := c.env.Dial(ctx, e, c.client.Pod)
	if err != nil {
		p.mu.Lock()
		p.passOn()
		p.mu.Unlock()
		return nil, err
	}
	u := &upstream{link: newLink(socket), pool: p, identity: c.client.Pod.Identity}
	u.step = u.readable
	return u, nil
}

// passOn gives the place of a connection that is no more to the first that waits. p.mu is held.
func (p *pool) passOn() {
	if len(p.waiting) == 0 {
		p.open--
		return
	}
	turn := p.waiting[0]
	p.waiting = slices.Delete(p.waiting, 0, 1)
	turn <- nil
}

// evict closes an idle connection. p.mu is held, and its place is the caller's.
func (p *pool) evict() {
	for identity, list := range p.idle {
		if len(list) > 0 {
			list[0].conn.Close()
			p.idle[identity] = slices.Delete(list, 0, 1)
			p.spare--
			return
		}
	}
}

// close the connection for good.
func (u *upstream) close() {
	u.conn.Close()
	u.pool.mu.Lock()
	defer u.pool.mu.Unlock()
	u.pool.passOn()
}

// keep the connection for the next request.
func (u *upstream) keep(e *balance.Endpoint, now time.Time, idle time.Duration) {
	u.x, u.request, u.err = nil, nil, nil
	u.used, u.since = true, now
	select {
	case <-e.Removed():
		u.close()
		return
	default:
	}
	p := u.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) > 0 {
		turn := p.waiting[0]
		p.waiting = slices.Delete(p.waiting, 0, 1)
		turn <- u
		return
	}
	p.idle[u.identity] = append(p.idle[u.identity], u)
	p.spare++
	if !p.minded {
		p.minded = true
		go p.mind(e, idle)
	}
}

// mindEvery is how often idle connections are looked at.
const mindEvery = time.Second

// mind closes connections that were idle for too long or that the backend has closed, and all when it is removed. It ends when none is left.
func (p *pool) mind(e *balance.Endpoint, idle time.Duration) {
	tick := time.NewTicker(mindEvery)
	defer tick.Stop()
	for {
		removed := false
		var now time.Time
		select {
		case <-e.Removed():
			removed = true
		case now = <-tick.C:
		}
		p.mu.Lock()
		for identity, list := range p.idle {
			list = slices.DeleteFunc(list, func(u *upstream) bool {
				if !removed && (idle <= 0 || now.Sub(u.since) < idle) && !u.gone() {
					return false
				}
				u.conn.Close()
				p.spare--
				p.passOn()
				return true
			})
			if len(list) == 0 {
				delete(p.idle, identity)
			} else {
				p.idle[identity] = list
			}
		}
		if p.spare == 0 {
			p.minded = false
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
	}
}

// gone: the backend has closed an idle connection, or says what nobody has asked for.
func (u *upstream) gone() bool {
	if u.raw == nil {
		return false
	}
	gone := true
	u.raw.Control(func(fd uintptr) { gone = !quiet(fd) })
	return gone
}
