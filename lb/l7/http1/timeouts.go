package http1

import (
	"sync"
	"sync/atomic"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
)

// sweepEvery is how often deadlines are looked at, and so how late they may come. A connection's own deadline would cost a timer's change at each request.
const sweepEvery = 100 * time.Millisecond

// bound says what a deadline cuts off.
type bound int64

const (
	boundClient bound = iota // reading from the client
	boundTry                 // what goes on with the backend
	boundBoth
)

const (
	unbounded int64 = 0
	fired     int64 = -1
)

var longAgo = time.Unix(1, 0)

// watch is a connection's deadline: nanoseconds of the clock with a bound in the two lowest bits, or unbounded, or fired.
type watch struct {
	deadline atomic.Int64
	ended    atomic.Bool // the context has: everything is cut
	// asked is the backend that is to begin its answer, if another can be asked instead: that is given up when its node is found to be dead.
	asked atomic.Pointer[balance.Endpoint]
	mu    sync.Mutex // for whoever sets deadlines of the sockets, and what up is
	up    *upstream  // that a request goes to
}

// arm sets the deadline in force from now on. A zero time is none.
func (c *conn) arm(at time.Time, b bound) {
	d := unbounded
	if !at.IsZero() {
		d = at.UnixNano()&^3 | int64(b)
	}
	if c.deadline.Swap(d) == fired {
		c.rearm()
	}
}

// rearm takes back what a deadline has done that came when it was no longer meant.
func (c *conn) rearm() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended.Load() {
		return
	}
	c.conn.SetDeadline(time.Time{})
	if c.up != nil {
		c.up.conn.SetDeadline(time.Time{})
	}
}

// timedOut: the deadline in force has passed.
func (c *conn) timedOut() bool { return c.deadline.Load() == fired }

// look cuts off what the deadline bounds, if it has passed.
func (c *conn) look(now int64) {
	d := c.deadline.Load()
	if e := c.asked.Load(); e != nil && d != fired && e.Target().Quarantined {
		c.giveUpOn(e, d)
		return
	}
	if d <= 0 || d > now {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.deadline.CompareAndSwap(d, fired) {
		return
	}
	b := bound(d & 3)
	switch b {
	case boundClient:
		c.conn.SetReadDeadline(longAgo)
	case boundBoth:
		c.conn.SetDeadline(longAgo)
	}
	if b != boundClient && c.up != nil {
		c.up.conn.SetDeadline(longAgo)
	}
}

// giveUpOn ends the wait for a backend as if its time were over.
func (c *conn) giveUpOn(e *balance.Endpoint, d int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked.CompareAndSwap(e, nil) && c.up != nil && c.deadline.CompareAndSwap(d, fired) {
		c.up.conn.SetDeadline(longAgo)
	}
}

// cut ends everything on the connection: the proxy ends.
func (c *conn) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended.Store(true)
	c.conn.SetDeadline(longAgo)
	if c.up != nil {
		c.up.conn.SetDeadline(longAgo)
	}
}

// use says which connection to a backend the deadlines are for, or none.
func (c *conn) use(u *upstream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.up = u
	if u != nil && c.ended.Load() {
		u.conn.SetDeadline(longAgo)
	}
}

// sweeper looks at the deadlines of an environment's connections.
type sweeper struct {
	mu      sync.Mutex
	conns   map[*conn]struct{}
	running bool
}

var sweepers sync.Map // of *exchange.Env

func sweeperOf(env *exchange.Env) *sweeper {
	if s, ok := sweepers.Load(env); ok {
		return s.(*sweeper)
	}
	s, _ := sweepers.LoadOrStore(env, &sweeper{conns: map[*conn]struct{}{}})
	return s.(*sweeper)
}

func (s *sweeper) add(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c] = struct{}{}
	if !s.running {
		s.running = true
		go s.run()
	}
}

func (s *sweeper) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// run ends with the last connection.
func (s *sweeper) run() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		now := (<-tick.C).UnixNano()
		s.mu.Lock()
		for c := range s.conns {
			c.look(now)
		}
		if len(s.conns) == 0 {
			s.running = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
	}
}

// sooner of two times, of which zero is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// after is a time from now, or never.
func after(now time.Time, d time.Duration) time.Time {
	if d <= 0 {
		return time.Time{}
	}
	return now.Add(d)
}
