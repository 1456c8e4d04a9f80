package http2

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2/hpack"

	"causeway/lb/l7/exchange"
)

const (
	readBytes = 32 << 10
	// outFull is from where on no more DATA is put into an output buffer, outEnough from where on it is again.
	outFull, outEnough = 128 << 10, 32 << 10
	// outMost cuts a connection whose peer makes us say things that it does not read.
	outMost = 2 << 20
	// connWindow is what a peer may send on all streams before it hears that it was taken; it hears that as soon as the data is in the streams' buffers.
	connWindow = 4 << 20
)

// end is what differs between the connections of clients and those to backends. Its methods are called by the connection's reader, without a lock.
type end interface {
	headers(b *batch, id uint32, last bool, fields []hpack.HeaderField, tooLarge bool) *fault
	data(b *batch, id uint32, last bool, data []byte, padding int) *fault
	reset(b *batch, id uint32, c code) *fault
	goAway(b *batch, last uint32, c code)
	pong(b *batch, data []byte)
	unknown(id uint32) bool // whether no stream of this number has been begun
	pump(b *batch, s *stream)
	window(s *stream) *int64                              // under the stream's lock
	number(s *stream) uint32                              // under the stream's lock; 0: it is not this connection's any more
	faulty(b *batch, s *stream, id uint32, c code) *fault // the peer broke the rules on one stream
}

// link is an HTTP/2 connection, of a client or to a backend. Locks are taken in the order stream, pool, link; two of the same kind are never held at once.
type link struct {
	conn   net.Conn
	raw    syscall.RawConn
	end    end
	limits *exchange.Limits

	// Of the reader alone.
	first      []byte
	buf        []byte
	r, w       int
	pooled     *[readBytes]byte
	readFunc   func(uintptr) bool
	readErr    error
	dec        *hpack.Decoder
	fields     []hpack.HeaderField
	listSize   int
	tooLarge   bool
	block      []byte // a header block that is not whole
	blockID    uint32
	blockLast  bool
	frames     int // of the block
	available  int // what the peer may send on all streams
	unreturned int
	settled    bool // the peer's SETTINGS came
	chatter    int
	since      time.Time
	headBegan  atomic.Int64 // when an unfinished block began, nanoseconds since 1970

	mu        sync.Mutex
	out       output
	spare     []byte
	flushing  bool
	writeFunc func(uintptr) bool
	writing   []byte
	wrote     int
	writeErr  error
	dead      bool
	closing   bool // the writing side is shut when all is written
	enc       *hpack.Encoder
	window    int64 // of the whole connection, for what is sent
	initial   int64 // the peer's for new streams
	frameSize int
	most      int                  // streams at once that the peer allows
	blocked   map[*stream]struct{} // that wait for the connection's window, or for room in out
	streams   map[uint32]*stream
	quiet     time.Time // since when there has been no stream
}

type output struct{ buf []byte }

func (o *output) Write(p []byte) (int, error) {
	o.buf = append(o.buf, p...)
	return len(p), nil
}

var readPool = sync.Pool{New: func() any { return new([readBytes]byte) }}

func (l *link) init(conn net.Conn, e end, limits *exchange.Limits) {
	l.conn, l.end, l.limits = conn, e, limits
	if sys, ok := conn.(syscall.Conn); ok {
		if raw, err := sys.SyscallConn(); err == nil {
			l.raw = raw
		}
	}
	l.readFunc, l.writeFunc = l.readReady, l.writeReady
	l.available = connWindow
	l.window, l.initial, l.frameSize, l.most = defaultWindow, defaultWindow, maxFrame, 100
	l.streams = map[uint32]*stream{}
	l.enc = hpack.NewEncoder(&l.out)
	l.dec = hpack.NewDecoder(4096, l.emit)
	if limits.HeaderBytes > 0 {
		l.dec.SetMaxStringLength(limits.HeaderBytes)
	}
	l.since, l.quiet = time.Now(), time.Now()
}

func (l *link) emit(f hpack.HeaderField) {
	l.listSize += int(f.Size())
	if l.limits.HeaderBytes > 0 && l.listSize > l.limits.HeaderBytes || l.limits.HeaderFields > 0 && len(l.fields) >= l.limits.HeaderFields {
		l.tooLarge = true
		return
	}
	l.fields = append(l.fields, f)
}

// run reads and handles frames until the connection ends, and returns why it did.
func (l *link) run() error {
	var b batch
	defer l.releaseBuffer()
	for {
		f := l.consume(&b)
		b.flush()
		if f != nil {
			l.mu.Lock()
			l.out.buf = appendGoAway(l.out.buf, l.lastSeen(), f.code, f.text)
			l.closing = true
			l.mu.Unlock()
			l.flush()
			return f
		}
		if err := l.fill(); err != nil {
			return err
		}
	}
}

func (l *link) lastSeen() uint32 {
	if c, ok := l.end.(*client); ok {
		return c.last
	}
	return 0
}

// fill reads once. With nothing left over it waits without holding a buffer.
func (l *link) fill() error {
	if l.r == l.w {
		l.r, l.w = 0, 0
		l.releaseBuffer()
	} else if l.r > 0 {
		copy(l.buf, l.buf[l.r:l.w])
		l.r, l.w = 0, l.w-l.r
	}
	if len(l.first) > 0 {
		l.needBuffer()
		n := copy(l.buf[l.w:], l.first)
		l.first, l.w = l.first[n:], l.w+n
		return nil
	}
	if l.raw == nil {
		l.needBuffer()
		n, err := l.conn.Read(l.buf[l.w:])
		l.w += n
		if n > 0 {
			return nil
		}
		return err
	}
	l.readErr = nil
	if err := l.raw.Read(l.readFunc); err != nil {
		return err
	}
	return l.readErr
}

func (l *link) needBuffer() {
	if l.pooled == nil {
		l.pooled = readPool.Get().(*[readBytes]byte)
		l.buf = l.pooled[:]
	}
}

func (l *link) releaseBuffer() {
	if l.pooled != nil && l.r == l.w {
		readPool.Put(l.pooled)
		l.pooled, l.buf = nil, nil
	}
}

func (l *link) readReady(fd uintptr) bool {
	l.needBuffer()
	for {
		n, err := syscall.Read(int(fd), l.buf[l.w:])
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			l.releaseBuffer()
			return false
		case err != nil:
			l.readErr = err
		case n == 0:
			l.readErr = io.EOF
		default:
			l.w += n
		}
		return true
	}
}

// batch is what a goroutine has to do when it holds no lock any more: write what it has put into output buffers, and give free places to streams that wait.
type batch struct {
	links []*link
	pools []*pool
}

func (b *batch) touch(l *link) {
	for _, have := range b.links {
		if have == l {
			return
		}
	}
	b.links = append(b.links, l)
}

func (b *batch) flush() {
	for len(b.pools) > 0 {
		p := b.pools[len(b.pools)-1]
		b.pools = b.pools[:len(b.pools)-1]
		p.serve(b)
	}
	for i, l := range b.links {
		l.flush()
		b.links[i] = nil
	}
	b.links = b.links[:0]
}

// flush writes what the socket takes. Whoever comes while another writes leaves it to that one.
func (l *link) flush() {
	l.mu.Lock()
	if l.flushing || l.dead || len(l.out.buf) == 0 && !l.closing {
		l.mu.Unlock()
		return
	}
	l.flushing = true
	for len(l.out.buf) > 0 {
		taken := l.out.buf
		l.out.buf, l.spare = l.spare[:0], nil
		l.mu.Unlock()
		n, err := l.writeSome(taken)
		l.mu.Lock()
		if err != nil || n < len(taken) {
			if err == nil {
				go l.writeRest(taken, n)
			} else {
				l.flushing = false
			}
			l.mu.Unlock()
			if err != nil {
				l.cut()
			}
			return
		}
		l.keepSpare(taken)
	}
	l.written()
	l.mu.Unlock()
}

func (l *link) keepSpare(b []byte) {
	if cap(b) <= 64<<10 {
		l.spare = b[:0]
	}
}

// written is called when all was. mu is held.
func (l *link) written() {
	l.flushing = false
	if l.closing {
		if tcp, ok := l.conn.(interface{ CloseWrite() error }); ok {
			tcp.CloseWrite() //nolint:errcheck // It is closed anyway.
			l.conn.SetReadDeadline(time.Now().Add(time.Second))
		} else {
			l.conn.Close()
		}
	}
}

func (l *link) writeSome(p []byte) (int, error) {
	if l.raw == nil {
		return 0, nil
	}
	l.writing, l.wrote, l.writeErr = p, 0, nil
	if err := l.raw.Write(l.writeFunc); err != nil {
		return l.wrote, err
	}
	return l.wrote, l.writeErr
}

func (l *link) writeReady(fd uintptr) bool {
	for {
		n, err := syscall.Write(int(fd), l.writing)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
		case err != nil:
			l.writeErr = err
		default:
			l.wrote = n
		}
		return true
	}
}

// writeRest waits for the socket to take what it did not at once, and lets streams go on that waited for room.
func (l *link) writeRest(taken []byte, n int) {
	rest := taken[n:]
	for {
		if l.limits.BodyTimeout > 0 {
			l.conn.SetWriteDeadline(time.Now().Add(l.limits.BodyTimeout))
		}
		if _, err := l.conn.Write(rest); err != nil {
			l.mu.Lock()
			l.flushing = false
			l.mu.Unlock()
			l.cut()
			return
		}
		l.conn.SetWriteDeadline(time.Time{})
		l.mu.Lock()
		l.keepSpare(taken)
		resume := len(l.blocked) > 0 && len(l.out.buf) < outEnough
		l.mu.Unlock()
		var b batch
		if resume {
			l.resume(&b)
		}
		// This link is still being written by us; others are flushed.
		b.flush()
		l.mu.Lock()
		if len(l.out.buf) == 0 {
			l.written()
			l.mu.Unlock()
			return
		}
		taken = l.out.buf
		rest = taken
		l.out.buf, l.spare = l.spare[:0], nil
		l.mu.Unlock()
	}
}

// cut ends the connection at once; its reader cleans up.
func (l *link) cut() { l.conn.Close() }

// resume lets the streams go on that waited for the connection's window, or for room in its output.
func (l *link) resume(b *batch) {
	l.mu.Lock()
	list := l.blocked
	l.blocked = nil
	l.mu.Unlock()
	for s := range list {
		s.mu.Lock()
		l.end.pump(b, s)
		s.mu.Unlock()
	}
}

// wait has s resumed when the connection can take more. mu is held.
func (l *link) wait(s *stream) {
	if l.blocked == nil {
		l.blocked = map[*stream]struct{}{}
	}
	l.blocked[s] = struct{}{}
}

// say puts a control frame into the output.
func (l *link) say(b *batch, frame func([]byte) []byte) {
	l.mu.Lock()
	if !l.dead {
		l.out.buf = frame(l.out.buf)
	}
	l.mu.Unlock()
	b.touch(l)
}

// sendHeaders writes a header block. mu is held.
func (l *link) sendHeaders(id uint32, fields []hpack.HeaderField, last bool) {
	if l.dead {
		return
	}
	start := len(l.out.buf)
	flags := byte(flagEndHeaders)
	if last {
		flags |= flagEndStream
	}
	l.out.buf = appendHead(l.out.buf, 0, frameHeaders, flags, id)
	for i := range fields {
		l.enc.WriteField(fields[i]) //nolint:errcheck // It is a buffer.
	}
	n := len(l.out.buf) - start - frameHead
	if n <= l.frameSize {
		l.out.buf[start], l.out.buf[start+1], l.out.buf[start+2] = byte(n>>16), byte(n>>8), byte(n)
		return
	}
	block := append([]byte(nil), l.out.buf[start+frameHead:]...)
	l.out.buf = l.out.buf[:start]
	for kind, flags := frameHeaders, flags&flagEndStream; len(block) > 0; kind, flags = frameContinuation, 0 {
		part := block[:min(len(block), l.frameSize)]
		block = block[len(part):]
		if len(block) == 0 {
			flags |= flagEndHeaders
		}
		l.out.buf = append(appendHead(l.out.buf, len(part), kind, flags, id), part...)
	}
}

// sendData writes as much as both windows allow, and returns how much. mu is held.
func (l *link) sendData(s *stream, id uint32, data []byte, window *int64, last bool) (sent int) {
	for len(data) > 0 {
		if l.dead {
			return sent
		}
		n := int(min(int64(len(data)), *window, l.window, int64(l.frameSize)))
		if len(l.out.buf) >= outFull || n <= 0 {
			if *window > 0 {
				l.wait(s)
			}
			return sent
		}
		flags := byte(0)
		if last && n == len(data) {
			flags = flagEndStream
		}
		l.out.buf = append(appendHead(l.out.buf, n, frameData, flags, id), data[:n]...)
		*window -= int64(n)
		l.window -= int64(n)
		data, sent = data[n:], sent+n
	}
	return sent
}

// forget takes a stream out of the connection's. mu is held.
func (l *link) forget(id uint32) {
	delete(l.streams, id)
	if len(l.streams) == 0 {
		l.quiet = time.Now()
	}
}

// die marks the connection as gone, and returns the streams that it had.
func (l *link) die() []*stream {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
	var list []*stream
	for _, s := range l.streams {
		list = append(list, s)
	}
	clear(l.streams)
	l.blocked = nil
	return list
}
