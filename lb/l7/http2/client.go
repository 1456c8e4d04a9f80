package http2

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	"golang.org/x/net/http2/hpack"

	"causeway/lb/l7/exchange"
)

// client is a client's connection.
type client struct {
	link
	ctx     context.Context
	env     *exchange.Env
	x       *exchange.Client
	address string // for x-forwarded-for

	// Of the reader.
	last   uint32
	resets int
	minute time.Time
	cutOff [64]uint32 // streams that were ended by us, on which the client may still send
	cutAt  int

	// Under link.mu.
	leaving int // 0 no, 1 it was told, 2 the last stream is settled
	leftAt  time.Time
	replied int // streams answered, which the reader takes
}

func readPreface(env *exchange.Env, x *exchange.Client) error {
	if d := env.Limits.HeaderTimeout; d > 0 {
		x.Conn.SetReadDeadline(time.Now().Add(d))
	}
	for len(x.Read) < len(Preface) {
		if !strings.HasPrefix(Preface, string(x.Read)) {
			break
		}
		more := make([]byte, 4<<10)
		n, err := x.Conn.Read(more)
		x.Read = append(x.Read, more[:n]...)
		if err != nil && n == 0 {
			return err
		}
	}
	if !strings.HasPrefix(string(x.Read), Preface) {
		x.Conn.Write(appendGoAway(appendSettings(nil), 0, codeProtocol, "not HTTP/2")) //nolint:errcheck // It is closed anyway.
		return errors.New("not HTTP/2")
	}
	x.Read = x.Read[len(Preface):]
	x.Conn.SetReadDeadline(time.Time{})
	return nil
}

func newClient(ctx context.Context, env *exchange.Env, x *exchange.Client) *client {
	c := &client{ctx: ctx, env: env, x: x, minute: time.Now(), address: x.Address.Addr().String()}
	c.init(x.Conn, c, &env.Limits)
	c.first = x.Read
	return c
}

// streamWindow is what may be sent on a stream before it was passed on. It is no less than what a peer may send before it knows.
func streamWindow(l *exchange.Limits) int { return max(defaultWindow, l.Buffer) }

func (c *client) greet() {
	l := &c.env.Limits
	pairs := []uint32{settingWindow, uint32(streamWindow(l))}
	if l.Streams > 0 {
		pairs = append(pairs, settingStreams, uint32(l.Streams))
	}
	if l.HeaderBytes > 0 {
		pairs = append(pairs, settingHeaderList, uint32(l.HeaderBytes))
	}
	var b batch
	c.say(&b, func(o []byte) []byte { return appendWindow(appendSettings(o, pairs...), 0, connWindow-defaultWindow) })
	b.flush()
}

func (c *client) unknown(id uint32) bool   { return id > c.last || id%2 == 0 }
func (c *client) window(s *stream) *int64  { return &s.downWindow }
func (c *client) pump(b *batch, s *stream) { s.pumpDown(b, nil) }
func (c *client) number(s *stream) uint32 {
	if s.done {
		return 0
	}
	return s.id
}

func (c *client) goAway(*batch, uint32, code) {}

func (c *client) find(id uint32) *stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[id]
}

func (c *client) headers(b *batch, id uint32, last bool, fields []hpack.HeaderField, tooLarge bool) *fault {
	if id%2 == 0 {
		return &fault{codeProtocol, "a client's stream with an even number"}
	}
	if id <= c.last {
		return c.trailers(b, id, last, fields)
	}
	c.last = id
	c.mu.Lock()
	full := c.limits.Streams > 0 && len(c.streams) >= c.limits.Streams
	late := c.leaving == 2
	c.mu.Unlock()
	if late {
		return nil
	}
	if full {
		return c.refuse(b, id, codeRefused)
	}
	s := &stream{c: c, id: id, clientEnd: last}
	s.take(fields)
	if !s.parse() {
		return c.refuse(b, id, codeProtocol)
	}
	if last && s.length > 0 {
		return c.refuse(b, id, codeProtocol)
	}
	c.mu.Lock()
	s.downWindow = c.initial
	c.streams[id] = s
	c.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begin(b, tooLarge)
	return nil
}

// refuse resets a stream that was never begun.
func (c *client) refuse(b *batch, id uint32, why code) *fault {
	c.say(b, func(o []byte) []byte { return appendReset(o, id, why) })
	c.remember(id)
	return c.countReset()
}

func (c *client) remember(id uint32) {
	c.mu.Lock()
	c.cutOff[c.cutAt%len(c.cutOff)] = id
	c.cutAt++
	c.mu.Unlock()
}

// wasCut tells whether the client may not yet know that the stream is over.
func (c *client) wasCut(id uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, have := range c.cutOff {
		if have == id {
			return true
		}
	}
	return false
}

// countReset takes note of a stream that came to nothing by the client's doing, and ends connections that do nothing else.
func (c *client) countReset() *fault {
	if now := time.Now(); now.Sub(c.minute) > time.Minute {
		c.mu.Lock()
		c.replied = 0
		c.mu.Unlock()
		c.minute, c.resets = now, 0
	}
	c.resets++
	c.mu.Lock()
	replied := c.replied
	c.mu.Unlock()
	if c.limits.Resets > 0 && c.resets-replied > c.limits.Resets {
		return &fault{codeCalm, "too many streams reset"}
	}
	return nil
}

func (c *client) trailers(b *batch, id uint32, last bool, fields []hpack.HeaderField) *fault {
	s := c.find(id)
	if s == nil {
		if c.wasCut(id) {
			return nil
		}
		return &fault{codeClosed, "HEADERS on a closed stream"}
	}
	s.mu.Lock()
	ended := s.clientEnd
	if !ended && last && validTrailers(fields) && (s.length < 0 || s.got == s.length) {
		s.clientEnd = true
		s.trailers = append([]hpack.HeaderField(nil), fields...)
		s.pumpUp(b)
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	if ended {
		return c.faulty(b, s, id, codeClosed)
	}
	return c.faulty(b, s, id, codeProtocol)
}

func (c *client) data(b *batch, id uint32, last bool, data []byte, padding int) *fault {
	s := c.find(id)
	if s == nil {
		if c.wasCut(id) {
			return nil
		}
		return &fault{codeClosed, "DATA on a closed stream"}
	}
	s.mu.Lock()
	bad := codeNone
	s.got += int64(len(data))
	switch {
	case s.done:
		s.mu.Unlock()
		return nil
	case s.clientEnd:
		bad = codeClosed
	case s.upOutstanding+len(data)+padding > streamWindow(c.limits):
		bad = codeFlow
	case s.length >= 0 && (s.got > s.length || last && s.got != s.length):
		bad = codeProtocol
	}
	if bad != codeNone {
		s.mu.Unlock()
		return c.faulty(b, s, id, bad)
	}
	s.record.In += int64(len(data))
	s.upOutstanding += len(data) + padding
	s.clientEnd = last
	s.takeBody(data)
	s.giveBackUp(b, padding)
	s.pumpUp(b)
	s.mu.Unlock()
	return nil
}

func (c *client) reset(b *batch, id uint32, _ code) *fault {
	s := c.find(id)
	if s == nil {
		return c.chat()
	}
	s.mu.Lock()
	s.clientGone(b, "client gone")
	s.mu.Unlock()
	return c.countReset()
}

func (c *client) faulty(b *batch, s *stream, id uint32, why code) *fault {
	s.mu.Lock()
	c.say(b, func(o []byte) []byte { return appendReset(o, id, why) })
	c.remember(id)
	s.clientGone(b, "client broke the protocol")
	s.mu.Unlock()
	return c.countReset()
}

// ended cleans up when the connection is no more.
func (c *client) ended(err error) {
	var b batch
	for _, s := range c.die() {
		s.mu.Lock()
		s.clientGone(&b, "client gone")
		s.mu.Unlock()
	}
	b.flush()
	var f *fault
	if errors.As(err, &f) {
		// What the client has sent meanwhile is read for a while, as a reset would keep it from reading why it was cut.
		c.conn.SetReadDeadline(time.Now().Add(time.Second))
		io.CopyN(io.Discard, c.conn, 1<<20) //nolint:errcheck // It is closed anyway.
	}
}
