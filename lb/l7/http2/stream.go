package http2

import (
	"strconv"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/net/http2/hpack"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
)

// stream is a request and its answer.
type stream struct {
	mu sync.Mutex
	c  *client
	id uint32

	// What parse has found.
	method, path, scheme, authority, host, trace string
	grpc, proto                                  bool
	forwarded                                    int
	length, got                                  int64 // of the request's body; -1: not said
	timeout                                      time.Duration
	fields                                       []hpack.HeaderField
	someFields                                   [14]hpack.HeaderField

	record   exchange.Record
	query    balance.Query
	deadline time.Time
	tryUntil time.Time
	moved    time.Time // when bytes that wait last became fewer
	attempts int       // retries that were taken from the budget
	failed   *failure  // of the last try
	endpoint *balance.Endpoint
	sure     bool // gossip held the endpoint's node for alive when it was chosen

	// The way to the backend.
	clientEnd     bool // the client has sent all
	body          []byte
	someBody      [128]byte
	upOff         int  // how much of body was sent in this try
	kept          bool // body is all of the request's since its begin
	upOutstanding int  // what the client has sent, and not been told that it may send again
	upOwed        int
	trailers      []hpack.HeaderField
	up            *upstream
	upID          uint32
	upWindow      int64
	upEnd         bool
	waiting       *pool

	// The way to the client.
	committed       bool // the answer's head was passed on
	downWindow      int64
	down            []byte
	downEnd         bool // the backend has sent all
	downTrailers    []hpack.HeaderField
	downOutstanding int
	downOwed        int
	answerLength    int64
	answerGot       int64
	outcome         balance.Outcome
	done            bool
}

// failure is an answer of our own.
type failure struct {
	status, grpc int
	text         string
	reset        code // where an answer that has begun is cut
}

var (
	noBackend     = &failure{503, 14, "no backend", codeInternal}
	connectFailed = &failure{503, 14, "connect failed", codeInternal}
	overflow      = &failure{503, 14, "overflow", codeInternal}
	refused       = &failure{503, 14, "backend refused", codeInternal}
	nodeLost      = &failure{502, 14, "backend's node lost", codeInternal}
	lost          = &failure{502, 14, "connection lost", codeInternal}
	broken        = &failure{502, 14, "bad answer", codeInternal}
	tooLate       = &failure{504, 4, "timeout", codeInternal}
	headTooLarge  = &failure{431, 8, "headers too large", codeInternal}
	noConnect     = &failure{405, 12, "CONNECT refused", codeInternal}
)

func (s *stream) take(fields []hpack.HeaderField) { s.fields = append(s.someFields[:0], fields...) }

func (s *stream) hash(v string) { s.query.Hash, s.query.Hashed = balance.Hash(bytesOf(v)), true }

// bytesOf is a string's bytes, which must not be changed.
func bytesOf(v string) []byte {
	if v == "" {
		return nil
	}
	return unsafe.Slice(unsafe.StringData(v), len(v))
}

func (s *stream) protocol() exchange.Protocol {
	if s.grpc {
		return exchange.GRPC
	}
	return exchange.HTTP2
}

// begin sends a new request on its way. mu is held, as in all that follows.
func (s *stream) begin(b *batch, tooLarge bool) {
	c := s.c
	r := &s.record
	*r = exchange.Record{Protocol: s.protocol(), Client: c.x, GRPC: -1, Began: time.Now()}
	c.env.Observer.Begin(c.x, r.Protocol)
	c.x.Port.Arrived()
	s.body, s.kept = s.someBody[:0], true
	s.outcome = balance.Neutral
	options := &c.x.Port.Route().Options
	if d := shorter(s.timeout, options.Timeout); d > 0 {
		s.deadline = r.Began.Add(d)
	}
	switch {
	case tooLarge:
		s.local(b, headTooLarge)
	case s.method == "CONNECT":
		s.local(b, noConnect)
	default:
		s.forward()
		s.dispatch(b)
	}
}

func shorter(a, b time.Duration) time.Duration {
	if a <= 0 || b > 0 && b < a {
		return b
	}
	return a
}

// dispatch chooses a backend and sends what is there of the request.
func (s *stream) dispatch(b *batch) {
	for {
		e, err := s.c.x.Port.Pick(&s.query)
		if err != nil {
			f := s.failed
			if f == nil {
				f = noBackend
			}
			s.local(b, f)
			return
		}
		s.endpoint, s.record.Endpoint = e, e
		s.sure = !e.Target().Quarantined
		e.Begin()
		options := &s.c.x.Port.Route().Options
		s.tryUntil = time.Time{}
		if options.TryTimeout > 0 {
			s.tryUntil = time.Now().Add(options.TryTimeout)
		}
		if poolOf(e, s.c.x.Pod, s.c.env).acquire(b, s) {
			return
		}
		s.leave(b, balance.Neutral)
		s.failed = overflow
	}
}

// leave gives the try up. The backend's stream is to be ended before.
func (s *stream) leave(b *batch, o balance.Outcome) {
	if s.endpoint != nil {
		s.endpoint.End(o)
		s.query.Tried = append(s.query.Tried, s.endpoint)
		s.endpoint = nil
	}
	s.up, s.upID, s.upOff, s.upEnd, s.upWindow = nil, 0, 0, false, 0
	s.down, s.downEnd, s.downOutstanding, s.downOwed = nil, false, 0, 0
	s.answerGot, s.answerLength = 0, -1
	s.record.GRPC = -1
}

// again sends the request to another backend if it is all there. mayCount: it costs a retry.
func (s *stream) again(b *batch, o balance.Outcome, why *failure, counts bool) {
	s.failed = why
	if s.committed || !s.kept || counts && !s.c.x.Port.Retry(s.attempts+1) {
		s.outcome = o
		s.local(b, why)
		return
	}
	if counts {
		s.attempts++
	}
	s.leave(b, o)
	s.record.Retries++
	s.dispatch(b)
}

func (s *stream) idempotent() bool {
	switch s.method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}

// drop ends the backend's stream, if there is one.
func (s *stream) drop(b *batch, why code) {
	if s.waiting != nil {
		s.waiting.forget(s)
		s.waiting = nil
	}
	if u := s.up; u != nil && s.upID != 0 {
		id := s.upID
		s.release(b)
		u.say(b, func(o []byte) []byte { return appendReset(o, id, why) })
	}
}

// release gives the backend's place to others.
func (s *stream) release(b *batch) {
	if s.up != nil && s.upID != 0 {
		s.up.release(b, s.upID)
		s.upID = 0
	}
}

// takeBody keeps a part of the request's body.
func (s *stream) takeBody(data []byte) {
	if len(s.body)+len(data) > streamWindow(s.c.limits) && s.upOff > 0 {
		s.kept = false
		s.forgetSent()
	}
	s.body = append(s.body, data...)
}

func (s *stream) forgetSent() {
	n := copy(s.body, s.body[s.upOff:])
	s.body, s.upOff = s.body[:n], 0
}

// pumpUp sends the backend what it may be sent.
func (s *stream) pumpUp(b *batch) {
	u := s.up
	if u == nil || s.upID == 0 || s.upEnd {
		return
	}
	rest := s.body[s.upOff:]
	u.mu.Lock()
	last := s.clientEnd && s.trailers == nil
	n := u.sendData(s, s.upID, rest, &s.upWindow, last)
	if s.clientEnd && n == len(rest) {
		s.upEnd = true
		if s.trailers != nil {
			u.sendHeaders(s.upID, s.trailers, true)
		} else if n == 0 {
			u.out.buf = appendHead(u.out.buf, 0, frameData, flagEndStream, s.upID)
		}
	}
	u.mu.Unlock()
	b.touch(&u.link)
	if n > 0 {
		s.moved = time.Now()
		s.upOff += n
		if !s.kept {
			s.forgetSent()
		}
		s.giveBackUp(b, n)
	}
	if s.upEnd && s.downEnd {
		s.release(b)
	}
}

// giveBackUp tells the client that n bytes were passed on, when they are worth a frame.
func (s *stream) giveBackUp(b *batch, n int) {
	// What was sent in an earlier try was given back then.
	s.upOwed += min(n, s.upOutstanding-s.upOwed)
	if s.clientEnd || s.upOwed < streamWindow(s.c.limits)/2 {
		return
	}
	owed := s.upOwed
	s.upOutstanding, s.upOwed = s.upOutstanding-owed, 0
	s.c.say(b, func(o []byte) []byte { return appendWindow(o, s.id, owed) })
}

// pumpDown sends the client what it may be sent: what waits, then data, of which the rest will wait.
func (s *stream) pumpDown(b *batch, data []byte) {
	if s.done || !s.committed {
		return
	}
	c := s.c
	sent, all := 0, false
	last := s.downEnd && s.downTrailers == nil
	c.mu.Lock()
	if len(s.down) > 0 {
		s.down = append(s.down, data...)
		sent = c.sendData(s, s.id, s.down, &s.downWindow, last)
		s.down = s.down[:copy(s.down, s.down[sent:])]
		all = len(s.down) == 0
	} else {
		sent = c.sendData(s, s.id, data, &s.downWindow, last)
		if all = sent == len(data); !all {
			s.down = append(s.down, data[sent:]...)
		}
	}
	finished := all && s.downEnd
	if finished {
		if s.downTrailers != nil {
			c.sendHeaders(s.id, s.downTrailers, true)
		} else if sent == 0 {
			c.out.buf = appendHead(c.out.buf, 0, frameData, flagEndStream, s.id)
		}
	}
	c.mu.Unlock()
	b.touch(&c.link)
	if sent > 0 {
		s.moved = time.Now()
		s.record.Out += int64(sent)
		s.giveBackDown(b, sent)
	}
	if finished {
		s.answered(b)
	}
}

func (s *stream) giveBackDown(b *batch, n int) {
	if s.downEnd || s.up == nil || s.upID == 0 {
		return
	}
	if s.downOwed += n; s.downOwed < streamWindow(s.c.limits)/2 {
		return
	}
	owed, id := s.downOwed, s.upID
	s.downOutstanding, s.downOwed = s.downOutstanding-owed, 0
	s.up.say(b, func(o []byte) []byte { return appendWindow(o, id, owed) })
}

// answered is called when the client was sent the answer's end.
func (s *stream) answered(b *batch) {
	c := s.c
	if !s.clientEnd {
		c.say(b, func(o []byte) []byte { return appendReset(o, s.id, codeNone) })
		c.remember(s.id)
	}
	s.drop(b, codeCancel)
	c.mu.Lock()
	c.replied++
	c.mu.Unlock()
	s.finish(b)
}

// finish makes the record.
func (s *stream) finish(b *batch) {
	if s.done {
		return
	}
	s.done = true
	c := s.c
	c.mu.Lock()
	c.forget(s.id)
	leave := c.leaving == 2 && len(c.streams) == 0
	if leave {
		c.closing = true
	}
	c.mu.Unlock()
	if leave {
		b.touch(&c.link)
	}
	if s.endpoint != nil {
		s.endpoint.End(s.outcome)
	}
	r := &s.record
	r.Took = time.Since(r.Began)
	r.Method, r.Path, r.TraceParent = bytesOf(s.method), bytesOf(s.path), bytesOf(s.trace)
	if r.Host = bytesOf(s.authority); r.Host == nil {
		r.Host = bytesOf(s.host)
	}
	c.env.Observer.End(r)
	s.body, s.down, s.fields = nil, nil, nil
}

// clientGone ends a stream whose client wants no more of it.
func (s *stream) clientGone(b *batch, why string) {
	if s.done {
		return
	}
	s.drop(b, codeCancel)
	s.record.Local = why
	if !s.committed {
		s.record.Status = 0
	}
	s.outcome = balance.Neutral
	s.finish(b)
}

// local answers in the backend's stead, or cuts an answer that has begun.
func (s *stream) local(b *batch, f *failure) {
	if s.done {
		return
	}
	s.drop(b, codeCancel)
	c := s.c
	s.record.Local = f.text
	switch {
	case s.committed && s.grpc:
		s.record.GRPC = f.grpc
		s.downTrailers = []hpack.HeaderField{{Name: "grpc-status", Value: strconv.Itoa(f.grpc)}, {Name: "grpc-message", Value: f.text}}
		s.downEnd = true
		s.pumpDown(b, nil)
		return
	case s.committed:
		c.say(b, func(o []byte) []byte { return appendReset(o, s.id, f.reset) })
		c.remember(s.id)
		s.finish(b)
		return
	case s.grpc:
		s.record.Status, s.record.GRPC = 200, f.grpc
		c.mu.Lock()
		c.sendHeaders(s.id, []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"},
			{Name: "grpc-status", Value: strconv.Itoa(f.grpc)}, {Name: "grpc-message", Value: f.text}}, true)
		c.mu.Unlock()
		b.touch(&c.link)
		s.answered(b)
	default:
		s.record.Status = f.status
		s.committed, s.downEnd, s.down, s.downTrailers = true, true, nil, nil
		text := f.text + "\n"
		c.mu.Lock()
		c.sendHeaders(s.id, []hpack.HeaderField{{Name: ":status", Value: strconv.Itoa(f.status)}, {Name: "content-type", Value: "text/plain"},
			{Name: "content-length", Value: strconv.Itoa(len(text))}}, s.method == "HEAD")
		c.mu.Unlock()
		b.touch(&c.link)
		if s.method == "HEAD" {
			s.answered(b)
		} else {
			s.pumpDown(b, []byte(text))
		}
	}
}
