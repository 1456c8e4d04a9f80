package http2

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

// mostStreams bounds a connection to a backend that itself has no bound.
const mostStreams = 1000

// upstream is a connection to a backend.
type upstream struct {
	link
	pool *pool
	next uint32 // under link.mu
	gone bool   // no new streams; under link.mu
	high uint32 // the last that was begun, for the reader; under link.mu
}

// pool has an endpoint's connections for one client identity.
type pool struct {
	e   *balance.Endpoint
	pod state.Client
	env *exchange.Env

	waiters atomic.Int32
	mu      sync.Mutex
	conns   []*upstream
	dialing int
	pending []*stream
}

type poolKey struct {
	identity uint32
	env      *exchange.Env
}

func poolOf(e *balance.Endpoint, pod state.Client, env *exchange.Env) *pool {
	all := e.Keep(balance.KeepHTTP2, func() any { return &sync.Map{} }).(*sync.Map)
	key := poolKey{pod.Identity, env}
	if p, ok := all.Load(key); ok {
		return p.(*pool)
	}
	p, _ := all.LoadOrStore(key, &pool{e: e, pod: pod, env: env})
	return p.(*pool)
}

// acquire begins a stream at the backend, or has it wait for a connection. False: too many wait. The stream's lock is held.
func (p *pool) acquire(b *batch, s *stream) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.conns {
		if u.begin(b, s) {
			return true
		}
	}
	options := &p.e.Port().Route().Options
	if options.MaxPending > 0 && len(p.pending) >= options.MaxPending {
		return false
	}
	s.waiting = p
	p.pending = append(p.pending, s)
	p.waiters.Add(1)
	room := options.MaxConnections <= 0 || len(p.conns)+p.dialing < options.MaxConnections
	if room && len(p.pending) > p.dialing*100 {
		p.dialing++
		go p.dial()
	}
	return true
}

func (p *pool) forget(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, have := range p.pending {
		if have == s {
			p.pending = append(p.pending[:i], p.pending[i+1:]...)
			p.waiters.Add(-1)
			return
		}
	}
}

// serve gives places to those who wait. No lock is held.
func (p *pool) serve(b *batch) {
	p.mu.Lock()
	list := p.pending
	p.pending = nil
	p.waiters.Add(-int32(len(list)))
	p.mu.Unlock()
	for _, s := range list {
		s.mu.Lock()
		if s.waiting == p && !s.done {
			s.waiting = nil
			if !p.acquire(b, s) {
				s.again(b, balance.Neutral, overflow, false)
			}
		}
		s.mu.Unlock()
	}
}

func (p *pool) dial() {
	conn, err := p.env.Dial(context.Background(), p.e, p.pod)
	var b batch
	if err != nil {
		p.mu.Lock()
		p.dialing--
		list := p.pending
		p.pending = nil
		p.waiters.Add(-int32(len(list)))
		p.mu.Unlock()
		for _, s := range list {
			s.mu.Lock()
			if s.waiting == p && !s.done {
				s.waiting = nil
				s.again(&b, balance.Failure, connectFailed, false)
			}
			s.mu.Unlock()
		}
		b.flush()
		return
	}
	u := &upstream{pool: p, next: 1}
	u.init(conn, u, &p.env.Limits)
	u.out.buf = append(u.out.buf, Preface...)
	u.out.buf = appendSettings(u.out.buf, settingPush, 0, settingWindow, uint32(streamWindow(u.limits)))
	u.out.buf = appendWindow(u.out.buf, 0, connWindow-defaultWindow)
	p.mu.Lock()
	p.dialing--
	p.conns = append(p.conns, u)
	p.mu.Unlock()
	sweeping.addUpstream(u)
	defer sweeping.removeUpstream(u)
	defer conn.Close()
	b.touch(&u.link)
	p.serve(&b)
	b.flush()
	u.run() //nolint:errcheck // Whatever it was, the streams that it had are seen to.
	u.ended()
}

// begin opens a stream for s, whose lock is held.
func (u *upstream) begin(b *batch, s *stream) bool {
	u.mu.Lock()
	if u.dead || u.gone || u.closing || len(u.streams) >= min(u.most, mostStreams) || u.next > lastStreamID-2 {
		u.mu.Unlock()
		return false
	}
	id := u.next
	u.next += 2
	u.high = id
	u.streams[id] = s
	s.up, s.upID, s.upWindow, s.upOff = u, id, u.initial, 0
	s.answerLength = -1
	last := s.clientEnd && len(s.body) == 0 && s.trailers == nil
	s.upEnd = last
	u.sendHeaders(id, s.fields, last)
	u.mu.Unlock()
	b.touch(&u.link)
	s.pumpUp(b)
	return true
}

func (u *upstream) release(b *batch, id uint32) {
	u.mu.Lock()
	u.forget(id)
	if u.gone && len(u.streams) == 0 {
		u.closing = true
	}
	u.mu.Unlock()
	b.touch(&u.link)
	if u.pool.waiters.Load() > 0 {
		b.pools = append(b.pools, u.pool)
	}
}

// retire has the connection end with its last stream.
func (u *upstream) retire(b *batch) {
	u.mu.Lock()
	u.gone = true
	if len(u.streams) == 0 {
		u.closing = true
	}
	u.mu.Unlock()
	u.pool.without(u)
	b.touch(&u.link)
}

func (p *pool) without(u *upstream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, have := range p.conns {
		if have == u {
			p.conns = append(p.conns[:i:i], p.conns[i+1:]...)
			return
		}
	}
}

func (u *upstream) ended() {
	u.pool.without(u)
	var b batch
	for _, s := range u.die() {
		s.mu.Lock()
		if s.up == u && s.upID != 0 && !s.done {
			s.upID = 0
			s.again(&b, balance.Failure, lost, true)
		}
		s.mu.Unlock()
	}
	if u.pool.waiters.Load() > 0 {
		b.pools = append(b.pools, u.pool)
	}
	b.flush()
}

func (u *upstream) window(s *stream) *int64  { return &s.upWindow }
func (u *upstream) pump(b *batch, s *stream) { s.pumpUpFrom(b, u) }
func (u *upstream) pong(*batch, []byte)      {}
func (u *upstream) number(s *stream) uint32 {
	if s.up != u {
		return 0
	}
	return s.upID
}

func (s *stream) pumpUpFrom(b *batch, u *upstream) {
	if s.up == u {
		s.pumpUp(b)
	}
}

func (u *upstream) unknown(id uint32) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return id%2 == 0 || id > u.high
}

// lock returns the stream that id is, locked; nil: there is none.
func (u *upstream) lock(id uint32) *stream {
	u.mu.Lock()
	s := u.streams[id]
	u.mu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	if s.up != u || s.upID != id || s.done {
		s.mu.Unlock()
		return nil
	}
	return s
}

func (u *upstream) headers(b *batch, id uint32, last bool, fields []hpack.HeaderField, tooLarge bool) *fault {
	if u.unknown(id) {
		return &fault{codeProtocol, "HEADERS of an idle stream"}
	}
	s := u.lock(id)
	if s == nil {
		return nil
	}
	defer s.mu.Unlock()
	if tooLarge || s.downEnd {
		s.broken(b)
		return nil
	}
	if s.committed {
		s.answerTrailers(b, last, fields)
		return nil
	}
	status, length, grpc := parseAnswer(fields)
	switch {
	case status == 0, status == 101, status < 200 && last:
		s.broken(b)
		return nil
	case status < 200:
		s.c.mu.Lock()
		s.c.sendHeaders(s.id, fields, false)
		s.c.mu.Unlock()
		b.touch(&s.c.link)
		return nil
	}
	failed := status >= 502 && status <= 504 || last && grpc == 14
	s.outcome = balance.Success
	if failed {
		s.outcome = balance.Failure
	}
	if failed && s.clientEnd && s.upEnd && s.kept && (last && grpc == 14 || s.idempotent()) && s.retryAnswer(b) {
		return nil
	}
	bodyless := s.method == "HEAD" || status == 204 || status == 304
	if bodyless {
		length = 0
	}
	if last && length > 0 {
		s.broken(b)
		return nil
	}
	s.answerLength = length
	s.tryUntil = time.Time{}
	s.record.Status, s.record.GRPC = status, grpc
	if !last {
		s.record.GRPC = -1
	}
	s.committed, s.kept = true, false
	s.forgetSent()
	s.c.mu.Lock()
	s.c.sendHeaders(s.id, fields, last)
	s.c.mu.Unlock()
	b.touch(&s.c.link)
	if last {
		s.downEnd = true
		s.ofBackendEnded(b)
		s.answered(b)
	}
	return nil
}

// ofBackendEnded gives the backend's place back when both directions have ended.
func (s *stream) ofBackendEnded(b *batch) {
	if s.upEnd {
		s.release(b)
	}
}

// retryAnswer asks another backend instead of passing a failure on, if that is allowed and there is one.
func (s *stream) retryAnswer(b *batch) bool {
	q := s.query
	q.Tried = append(q.Tried[:len(q.Tried):len(q.Tried)], s.endpoint)
	if _, err := s.c.x.Port.Pick(&q); err != nil || !s.c.x.Port.Retry(s.attempts+1) {
		return false
	}
	s.attempts++
	s.drop(b, codeCancel)
	s.leave(b, balance.Failure)
	s.record.Retries++
	s.failed = refused
	s.dispatch(b)
	return true
}

func (s *stream) answerTrailers(b *batch, last bool, fields []hpack.HeaderField) {
	if !last || !validTrailers(fields) || s.answerLength >= 0 && s.answerGot != s.answerLength {
		s.broken(b)
		return
	}
	for i := range fields {
		if fields[i].Name == "grpc-status" {
			s.record.GRPC = grpcStatus(fields[i].Value)
		}
	}
	if s.record.GRPC == 14 {
		s.outcome = balance.Failure
	}
	s.downEnd = true
	if len(s.down) == 0 {
		s.downTrailers = fields // It is sent at once.
	} else {
		s.downTrailers = append([]hpack.HeaderField(nil), fields...)
	}
	s.ofBackendEnded(b)
	s.pumpDown(b, nil)
}

// broken ends a try whose backend does not keep to the protocol.
func (s *stream) broken(b *batch) {
	s.drop(b, codeProtocol)
	s.outcome = balance.Failure
	s.local(b, broken)
}

func (u *upstream) data(b *batch, id uint32, last bool, data []byte, padding int) *fault {
	s := u.lock(id)
	if s == nil {
		return nil
	}
	defer s.mu.Unlock()
	s.answerGot += int64(len(data))
	s.downOutstanding += len(data) + padding
	if !s.committed || s.downEnd || s.downOutstanding > streamWindow(u.limits) ||
		s.answerLength >= 0 && (s.answerGot > s.answerLength || last && s.answerGot != s.answerLength) {
		s.broken(b)
		return nil
	}
	s.downEnd = last
	if last {
		s.ofBackendEnded(b)
	}
	if padding > 0 {
		s.giveBackDown(b, padding)
	}
	if len(data) > 0 || last {
		s.pumpDown(b, data)
	}
	return nil
}

func (u *upstream) reset(b *batch, id uint32, c code) *fault {
	s := u.lock(id)
	if s == nil {
		return nil
	}
	defer s.mu.Unlock()
	if c == codeNone && s.downEnd {
		// The answer is whole; the rest of the request is not wanted (RFC 9113, 8.1).
		s.release(b)
		s.upEnd = true
		return nil
	}
	s.release(b)
	if c == codeRefused {
		s.again(b, balance.Neutral, refused, false)
		return nil
	}
	s.outcome = balance.Failure
	s.local(b, resetBy(c))
	return nil
}

// resetBy is what a backend's reset means to the client: of gRPC by its table of HTTP/2's codes
// (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), of others the same reset, if the answer has begun.
func resetBy(c code) *failure {
	f := &failure{502, 13, "backend reset", c}
	switch c {
	case codeCancel:
		f.grpc = 1
	case codeCalm:
		f.grpc = 8
	}
	return f
}

func (u *upstream) faulty(b *batch, s *stream, id uint32, c code) *fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.up == u && s.upID == id {
		s.broken(b)
	}
	return nil
}

func (u *upstream) goAway(b *batch, last uint32, _ code) {
	u.retire(b)
	u.mu.Lock()
	var list []*stream
	for id, s := range u.streams {
		if id > last {
			list = append(list, s)
		}
	}
	u.mu.Unlock()
	for _, s := range list {
		s.mu.Lock()
		if s.up == u && s.upID > last && !s.done {
			s.release(b)
			s.again(b, balance.Neutral, refused, false)
		}
		s.mu.Unlock()
	}
}
