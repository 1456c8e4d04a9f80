package l7

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"causeway/lb"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/http2"
)

const (
	// serverFirstWait is how long a client may be silent until it is taken into account that its server may be the one to speak first.
	serverFirstWait = time.Second
	// maxMethod bounds the methods that are taken for HTTP: the longest registered one has 17 letters (RFC 4437).
	maxMethod = 24
	// sniffBytes are read at once: the whole head of most requests.
	sniffBytes = 4 << 10
)

type speech int

const (
	unclear speech = iota // what is there so far may become HTTP
	speaksHTTP1
	speaksHTTP2
	speaksOther
)

// sniff says what a client speaks that begins so.
func sniff(begin []byte) speech {
	if n := min(len(begin), len(http2.Preface)); string(begin[:n]) == http2.Preface[:n] {
		if n == len(http2.Preface) {
			return speaksHTTP2
		}
		return unclear
	}
	for i, c := range begin {
		switch {
		case c == ' ' && i > 0:
			return sniffTarget(string(begin[:i]), begin[i+1:])
		case i >= maxMethod, c != '-' && (c < 'A' || c > 'Z'):
			return speaksOther
		}
	}
	return unclear
}

// sniffTarget looks at what follows the method (RFC 9112, 3.2), as other protocols begin with a word in capitals too ("SET key value").
func sniffTarget(method string, rest []byte) speech {
	switch {
	case len(rest) == 0:
		return unclear
	case method == "CONNECT" && rest[0] != '{', // NATS says CONNECT {…}
		rest[0] == '/', rest[0] == '*' && method == "OPTIONS",
		strings.EqualFold(string(rest[:min(len(rest), 4)]), "http"[:min(len(rest), 4)]):
		return speaksHTTP1
	}
	return speaksOther
}

// serveClient finds out what a client speaks, and has it served so.
func (p *proxy) serveClient(client *exchange.Client) {
	app := client.Port.Route().App
	limits := &p.cfg.Limits
	switch app {
	case lb.AppTCP:
		p.passOn(client, nil)
		return
	case lb.AppHTTP2:
		p.engines.http2(p.life, p.env, client)
		return
	case lb.AppHTTP:
		setDeadline(client.Conn, limits.IdleTimeout)
	default:
		setDeadline(client.Conn, serverFirstWait)
	}
	err := p.readMore(client)
	if errors.Is(err, os.ErrDeadlineExceeded) && app == lb.AppUnknown {
		p.serveSilent(client)
		return
	}
	if err != nil {
		return
	}
	p.serveSpeaker(client, nil)
}

// serveSpeaker serves a client that has said something. Server is the connection to a backend that is open already, or nil.
func (p *proxy) serveSpeaker(client *exchange.Client, server *server) {
	app := client.Port.Route().App
	speaks := sniff(client.Read)
	setDeadline(client.Conn, p.cfg.Limits.HeaderTimeout)
	for speaks == unclear {
		if err := p.readMore(client); err != nil {
			speaks = speaksOther // With no more to come it is not HTTP. Its server may say what it thinks of it.
			break
		}
		speaks = sniff(client.Read)
	}
	client.Conn.SetReadDeadline(time.Time{})
	if app == lb.AppHTTP && speaks == speaksOther {
		speaks = speaksHTTP1 // Its engine says what is wrong with it.
	}
	switch speaks {
	case speaksHTTP1:
		server.abandon()
		p.engines.http1(p.life, p.env, client)
	case speaksHTTP2:
		server.abandon()
		p.engines.http2(p.life, p.env, client)
	default:
		p.passOn(client, server)
	}
}

// serveSilent serves a client that has said nothing: with a backend at the other end it is seen who speaks first.
func (p *proxy) serveSilent(client *exchange.Client) {
	client.Conn.SetReadDeadline(time.Time{})
	server, err := p.connect(client)
	if err != nil {
		p.refuse(client, err)
		return
	}
	var said []byte
	var serverErr error
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		said, serverErr = firstBytes(server.conn)
		if !errors.Is(serverErr, os.ErrDeadlineExceeded) {
			client.Conn.SetReadDeadline(time.Unix(1, 0)) // The client need not be waited for any more.
		}
	}()
	clientErr := p.readMore(client)
	server.conn.SetReadDeadline(time.Unix(1, 0))
	<-waited
	server.conn.SetReadDeadline(time.Time{})
	client.Conn.SetReadDeadline(time.Time{})
	server.said = said
	serverSpoke := len(said) > 0 || serverErr != nil && !errors.Is(serverErr, os.ErrDeadlineExceeded)
	switch {
	case serverSpoke, clientErr != nil && len(client.Read) == 0:
		// An end is passed on as well, by whichever side it came from.
		p.passOn(client, server)
	default:
		p.serveSpeaker(client, server)
	}
}

// readMore waits for the client's next bytes and appends them to those that were read.
func (p *proxy) readMore(client *exchange.Client) error {
	read, err := firstBytes(client.Conn)
	if client.Read == nil {
		client.Read = read
	} else {
		client.Read = append(client.Read, read...)
	}
	return err
}

var sniffBuffers = sync.Pool{New: func() any { return new([sniffBytes]byte) }}

// firstBytes waits for a connection's next bytes without holding a buffer meanwhile.
func firstBytes(conn net.Conn) (read []byte, err error) {
	sys, ok := conn.(syscall.Conn)
	if !ok {
		return readOnce(conn)
	}
	raw, err := sys.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		buffer := sniffBuffers.Get().(*[sniffBytes]byte)
		defer sniffBuffers.Put(buffer)
		for {
			n, err := syscall.Read(int(fd), buffer[:])
			switch {
			case err == syscall.EINTR:
				continue
			case err == syscall.EAGAIN:
				return false
			case err != nil:
				failed = os.NewSyscallError("read", err)
			case n == 0:
				failed = io.EOF
			default:
				read = append(make([]byte, 0, n), buffer[:n]...)
			}
			return true
		}
	})
	if err == nil {
		err = failed
	}
	return read, err
}

func readOnce(conn net.Conn) ([]byte, error) {
	buffer := make([]byte, sniffBytes)
	n, err := conn.Read(buffer)
	return buffer[:n], err
}

// setDeadline of reading; 0 is none.
func setDeadline(conn net.Conn, after time.Duration) {
	if after == 0 {
		conn.SetReadDeadline(time.Time{})
	} else {
		conn.SetReadDeadline(time.Now().Add(after))
	}
}
