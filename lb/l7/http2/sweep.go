package http2

import (
	"encoding/binary"
	"sync"
	"time"

	"causeway/lb/l7/balance"
)

// sweepEvery is how exactly deadlines are kept.
const sweepEvery = 50 * time.Millisecond

// sweeper looks after the deadlines of all connections, and whether they are to end, so that none needs a goroutine or a timer for that. It runs as long as there are any.
type sweeper struct {
	mu        sync.Mutex
	clients   map[*client]struct{}
	upstreams map[*upstream]struct{}
	running   bool
}

var sweeping = sweeper{clients: map[*client]struct{}{}, upstreams: map[*upstream]struct{}{}}

func (w *sweeper) add(c *client) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clients[c] = struct{}{}
	w.start()
}

func (w *sweeper) addUpstream(u *upstream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.upstreams[u] = struct{}{}
	w.start()
}

func (w *sweeper) start() {
	if !w.running {
		w.running = true
		go w.run()
	}
}

func (w *sweeper) remove(c *client) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.clients, c)
}

func (w *sweeper) removeUpstream(u *upstream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.upstreams, u)
}

func (w *sweeper) run() {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	var clients []*client
	var upstreams []*upstream
	var b batch
	for now := range ticker.C {
		clients, upstreams = clients[:0], upstreams[:0]
		w.mu.Lock()
		if len(w.clients)+len(w.upstreams) == 0 {
			w.running = false
			w.mu.Unlock()
			return
		}
		for c := range w.clients {
			clients = append(clients, c)
		}
		for u := range w.upstreams {
			upstreams = append(upstreams, u)
		}
		w.mu.Unlock()
		for _, c := range clients {
			c.sweep(&b, now)
		}
		for _, u := range upstreams {
			u.sweep(&b, now)
		}
		b.flush()
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// pongWithin is what a client without streams gets to answer the PING behind a GOAWAY.
const pongWithin = 2 * time.Second

var longAgo = time.Unix(1, 0)

var drainPing = [8]byte{'d', 'r', 'a', 'i', 'n'}

func (c *client) sweep(b *batch, now time.Time) {
	if closed(c.ctx.Done()) {
		c.cut()
		return
	}
	if at := c.headBegan.Load(); at != 0 && c.limits.HeaderTimeout > 0 && now.UnixNano()-at > int64(c.limits.HeaderTimeout) {
		c.cut()
		return
	}
	c.mu.Lock()
	var list []*stream
	if len(c.streams) > 0 {
		list = make([]*stream, 0, len(c.streams))
		for _, s := range c.streams {
			list = append(list, s)
		}
	}
	idle := len(list) == 0 && c.limits.IdleTimeout > 0 && now.Sub(c.quiet) > c.limits.IdleTimeout
	switch {
	case c.leaving == 0 && (idle || closed(c.env.Draining) || closed(c.x.Port.Gone())):
		c.leaving, c.leftAt = 1, now
		c.out.buf = appendPing(appendGoAway(c.out.buf, lastStreamID, codeNone, ""), false, drainPing[:])
		b.touch(&c.link)
	case c.leaving == 1 && len(list) == 0 && now.Sub(c.leftAt) > pongWithin:
		// It answers no PING, so it is not there any more, or does not matter.
		c.conn.SetReadDeadline(longAgo)
	}
	c.mu.Unlock()
	for _, s := range list {
		s.sweep(b, now)
	}
}

// pong is the answer to the PING behind a GOAWAY: what the client has begun before it knew has arrived.
func (c *client) pong(b *batch, data []byte) {
	if binary.BigEndian.Uint64(data) != binary.BigEndian.Uint64(drainPing[:]) {
		return
	}
	c.mu.Lock()
	if c.leaving == 1 {
		c.leaving = 2
		c.out.buf = appendGoAway(c.out.buf, c.last, codeNone, "")
		if len(c.streams) == 0 {
			c.closing = true
		}
	}
	c.mu.Unlock()
	b.touch(&c.link)
}

func (s *stream) sweep(b *batch, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return
	}
	stuck := s.c.limits.BodyTimeout
	switch {
	case !s.deadline.IsZero() && now.After(s.deadline):
		s.outcome = balance.Failure
		s.local(b, tooLate)
	case !s.tryUntil.IsZero() && !s.committed && now.After(s.tryUntil):
		s.tryUntil = time.Time{}
		s.drop(b, codeCancel)
		if s.idempotent() {
			s.again(b, balance.Failure, tooLate, true)
		} else {
			s.outcome = balance.Failure
			s.local(b, tooLate)
		}
	case s.sure && !s.committed && s.endpoint != nil && s.endpoint.Target().Quarantined && s.idempotent():
		// Its node was found dead while its answer was waited for.
		s.sure = false
		s.drop(b, codeCancel)
		s.again(b, balance.Failure, nodeLost, true)
	case stuck > 0 && len(s.down) > 0 && now.Sub(s.moved) > stuck && now.Sub(s.record.Began) > stuck:
		s.c.say(b, func(o []byte) []byte { return appendReset(o, s.id, codeCancel) })
		s.c.remember(s.id)
		s.clientGone(b, "client takes nothing")
	}
}

func (u *upstream) sweep(b *batch, now time.Time) {
	u.mu.Lock()
	gone := u.gone
	idle := len(u.streams) == 0 && u.limits.UpstreamIdle > 0 && now.Sub(u.quiet) > u.limits.UpstreamIdle
	u.mu.Unlock()
	if !gone && (idle || closed(u.pool.e.Removed())) {
		u.retire(b)
	}
}
