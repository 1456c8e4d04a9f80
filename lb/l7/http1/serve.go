package http1

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
)

// conn is a client's connection. It is small, for there are many that do nothing.
type conn struct {
	link
	watch
	ctx    context.Context
	env    *exchange.Env
	client *exchange.Client
	step   func(uintptr) bool

	x       *transfer // what is there of a request; nil between requests
	fresh   bool      // x has bytes that were not looked at
	partial bool      // the request's body is not there as a whole: it is served outside of step
	closing bool      // the connection ends
	cutting bool      // at once, and so that nothing is taken for complete
}

// transfer is a request with its answer. It and its buffers are shared by all connections.
type transfer struct {
	c        *conn
	in       *buffer // from the client
	out      *buffer // to a backend, then to the client
	answer   *buffer // from a backend
	seen     int     // bytes of in that have no head's end
	waited   bool    // the rest of a short body was waited for
	req, ans head

	whole  bool // the request's body is in out, so that it can be sent again
	taken  int  // bytes of in that are the request's
	coding chunked
	up     *upload

	down    chunked // of the answer's body
	left    int64
	toEnd   bool
	strip   bool
	surplus bool

	tunnelled int64 // bytes from the client after a switch of protocols

	limit  time.Time // of the request as a whole
	query  balance.Query
	tried  [4]*balance.Endpoint
	next   *balance.Endpoint // picked already
	again  int               // retries taken from the port's budget
	failed *failure
	record exchange.Record
}

var transfers = sync.Pool{New: func() any { return new(transfer) }}

func (c *conn) begin() *transfer {
	x := transfers.Get().(*transfer)
	x.c, x.in = c, takeBuffer(smallBuffer)
	return x
}

// clear makes x ready for the connection's next request; its bytes stay.
func (x *transfer) clear() {
	x.out.release()
	x.answer.release()
	x.req.reset(nil)
	x.ans.reset(nil)
	req, ans := x.req, x.ans
	*x = transfer{c: x.c, in: x.in, req: req, ans: ans}
}

func (x *transfer) release() {
	x.clear()
	x.in.release()
	x.in, x.c = nil, nil
	transfers.Put(x)
}

// serve the connection to its end.
func (c *conn) serve() {
	if len(c.client.Read) > 0 {
		c.x = c.begin()
		c.x.in = c.x.in.add(c.client.Read)
		c.client.Read = nil
		c.x.record.Began = time.Now()
		c.fresh = true
	}
	for {
		err := c.loop(c.step)
		if c.partial {
			c.partial = false
			c.exchange()
		} else {
			if err != nil && c.timedOut() && c.x != nil && c.x.in.len() > 0 {
				c.refuse(&problem{http.StatusRequestTimeout, "header timeout"})
			}
			break
		}
		if c.closing {
			break
		}
	}
	if c.closing && !c.cutting {
		c.linger()
	}
	c.conn.Close()
	if c.x != nil {
		c.x.release()
		c.x = nil
	}
}

// readable is called when there may be something to read. It returns true when the connection ends or the request can't be served within.
func (c *conn) readable(fd uintptr) bool {
	for {
		if c.fresh {
			c.fresh = false
			c.handle()
			if c.closing || c.partial {
				return true
			}
			continue
		}
		if c.x == nil {
			c.x = c.begin()
		}
		x := c.x
		n, err := c.tryRead(fd, x.in.space())
		switch {
		case err == errAgain && x.waited:
			c.fresh = true // The rest of the body is not there yet.
			continue
		case err == errAgain:
			c.await()
			return false
		case err != nil:
			return true
		}
		if x.in.len() == 0 {
			x.record.Began = time.Now()
		}
		x.in.w += n
		c.fresh = true
	}
}

// await the client's next bytes, with a deadline and, between requests, without a buffer.
func (c *conn) await() {
	limits := &c.env.Limits
	if c.x.in.len() > 0 {
		c.arm(after(c.x.record.Began, limits.HeaderTimeout), boundClient)
		return
	}
	c.x.release()
	c.x = nil
	c.arm(after(time.Now(), limits.IdleTimeout), boundClient)
}

// handle looks at what is there, and serves the request if its head is complete.
func (c *conn) handle() {
	x := c.x
	limits := &c.env.Limits
	b := x.in.bytes()
	end, p := findHead(b, x.seen)
	if len(b) >= 4 && end == 4 && b[0] == '\r' {
		p = badLine
	}
	tooLarge := limits.HeaderBytes > 0 && (end > limits.HeaderBytes || end == 0 && len(b) >= limits.HeaderBytes)
	switch {
	case p != nil:
	case tooLarge && bytes.IndexByte(b[:min(limits.HeaderBytes, len(b))], '\n') < 0:
		p = longTarget
	case tooLarge:
		p = largeHead
	case end == 0:
		x.seen = len(b)
		if len(x.in.space()) == 0 {
			x.in = x.in.grown(2 * len(b))
		}
		return
	default:
		p = x.req.parseRequest(b[:end], limits.HeaderFields)
	}
	if p != nil {
		c.refuse(p)
		return
	}
	x.coding = chunked{}
	n := len(b) - end
	switch h := &x.req; {
	case h.chunked:
		if n, p = x.coding.feed(b[end:]); p != nil {
			c.refuse(p)
			return
		}
		x.whole = x.coding.done()
	default:
		length := max(h.length, 0)
		n = int(min(int64(n), length))
		x.whole = int64(n) == length
		// A short body is mostly on its way already.
		if !x.whole && !x.waited && !h.expects && int64(end)+length <= bodyBuffer {
			x.waited = true
			x.in = x.in.grown(end + int(length))
			return
		}
	}
	x.waited = false
	x.taken = end + n
	if !x.whole || x.asksUpgrade() {
		c.partial = true // Somebody else reads from the client meanwhile, which can't be within a read.
		return
	}
	c.exchange()
}

// exchange serves a request whose head is there.
func (c *conn) exchange() {
	x := c.x
	c.env.Observer.Begin(c.client, exchange.HTTP1)
	x.fill()
	x.hash()
	x.writeRequest()
	c.client.Port.Arrived()
	x.run()
	x.end()
}

// end records the request, and makes way for the next.
func (x *transfer) end() {
	c := x.c
	rest := x.stopUpload()
	x.countIn()
	c.observe(&x.record)
	x.in.r += x.taken
	if len(rest) > 0 {
		x.in = x.in.add(rest)
	}
	x.clear()
	switch {
	case c.closing:
	case x.in.len() == 0:
		x.in.r, x.in.w = 0, 0
	default:
		c.fresh = true
		x.record.Began = time.Now()
		if x.in.r > 0 {
			x.in.w = copy(x.in.b, x.in.bytes())
			x.in.r = 0
		}
	}
}

func (c *conn) observe(r *exchange.Record) {
	r.Took = time.Since(r.Began)
	c.env.Observer.End(r)
}

// fill the record with what the head says.
func (x *transfer) fill() {
	r, h := &x.record, &x.req
	r.Protocol, r.Client, r.GRPC = exchange.HTTP1, x.c.client, -1
	r.Method, r.Path, r.Host, r.TraceParent = h.method, h.target, h.host, h.trace
	x.query.Tried = x.tried[:0]
}

// hash what the route has hashed.
func (x *transfer) hash() {
	name, cookie := x.c.client.Port.HashKey()
	var value []byte
	switch {
	case name != "":
		value = x.req.find(name)
	case cookie != "":
		value = x.req.cookie(cookie)
	}
	if value != nil {
		x.query.Hash, x.query.Hashed = balance.Hash(value), true
	}
}

// refuse what is no request, or takes too long to become one.
func (c *conn) refuse(p *problem) {
	x := c.x
	c.env.Observer.Begin(c.client, exchange.HTTP1)
	x.record.Protocol, x.record.Client, x.record.GRPC = exchange.HTTP1, c.client, -1
	c.closing = true
	x.local(p.status, p.text)
	c.observe(&x.record)
}

// leaving: the connection ends with the next answer.
func (c *conn) leaving() bool {
	select {
	case <-c.env.Draining:
		return true
	case <-c.client.Port.Gone():
		return true
	default:
		return c.ended.Load()
	}
}

const (
	// lingerTime is how long a client may take to close after its last answer, lingerBytes what it may send still. Closing at once could take the answer from it.
	lingerTime  = time.Second
	lingerBytes = 256 << 10
)

// linger until the client has closed, too.
func (c *conn) linger() {
	half, ok := c.conn.(*net.TCPConn)
	if !ok || c.ended.Load() || half.CloseWrite() != nil {
		return
	}
	c.deadline.Store(unbounded)
	c.mu.Lock()
	if !c.ended.Load() {
		c.conn.SetReadDeadline(time.Now().Add(lingerTime))
	}
	c.mu.Unlock()
	b := takeBuffer(smallBuffer)
	defer b.release()
	for total := 0; total < lingerBytes; {
		n, err := half.Read(b.b)
		if err != nil {
			return
		}
		total += n
	}
}

// cutOff ends the client's connection so that nothing is taken for complete. It is closed later: a socket can't be within a read of it.
func (c *conn) cutOff() {
	c.closing, c.cutting = true, true
	c.hard()
}

// failure is why a request has no backend's answer.
type failure struct {
	status int
	text   string
}

var (
	noBackend     = &failure{http.StatusServiceUnavailable, "no backend"}
	overflow      = &failure{http.StatusServiceUnavailable, "overflow"}
	connectFailed = &failure{http.StatusBadGateway, "connect failed"}
	closedEarly   = &failure{http.StatusBadGateway, "backend closed early"}
	malformed     = &failure{http.StatusBadGateway, "malformed answer"}
	tooLate       = &failure{http.StatusGatewayTimeout, "timeout"}
)

func failureOf(err error) *failure {
	var p *problem
	if errors.As(err, &p) {
		return malformed
	}
	return closedEarly
}
