package l7

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime/debug"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
)

const (
	// acceptLoops of each listener: one finds the next connection while the other is being woken.
	acceptLoops = 2
	// frontendWait is how long a connection waits for its frontend to become known: the kernel may know of a service before the proxy does.
	frontendWait = 2 * time.Second
	// acceptPause is waited after a failure to accept, such as too many open files.
	acceptPause = 50 * time.Millisecond
)

func (p *proxy) startAccepting() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.listeners {
		p.startLoops(l)
	}
	close(p.accepted)
}

// startLoops accepts from l until it is closed. p.mu is held.
func (p *proxy) startLoops(l net.Listener) {
	for range acceptLoops {
		p.accepts.Go(func() { p.acceptFrom(l) })
	}
}

func (p *proxy) acceptFrom(l net.Listener) {
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			p.cfg.Log.Warn("a connection could not be accepted", "listener", l.Addr(), "error", err)
			select {
			case <-p.draining:
				return
			case <-time.After(acceptPause):
			}
			continue
		}
		// With all slots taken this loop stops here, and further connections wait in the kernel.
		if p.slots != nil {
			select {
			case p.slots <- struct{}{}:
			case <-p.draining:
				// It is accepted, so it is this proxy's to serve, if over the limit by as many as there are loops.
				p.serving.Go(func() { p.serveConn(conn) })
				return
			}
		}
		p.serving.Go(func() {
			if p.slots != nil {
				defer func() { <-p.slots }()
			}
			p.serveConn(conn)
		})
	}
}

// serveConn is a connection's life.
func (p *proxy) serveConn(conn net.Conn) {
	p.mu.Lock()
	p.conns[conn] = struct{}{}
	p.mu.Unlock()
	p.count.Add(1)
	defer func() {
		if cause := recover(); cause != nil {
			p.cfg.Log.Error("a connection was cut by a fault of the proxy", "client", conn.RemoteAddr(), "frontend", conn.LocalAddr(), "fault", cause, "stack", string(debug.Stack()))
		}
		conn.Close()
		p.count.Add(-1)
		p.mu.Lock()
		delete(p.conns, conn)
		p.mu.Unlock()
	}()
	if p.life.Err() != nil {
		return
	}
	client := &exchange.Client{Conn: conn, Frontend: addrPort(conn.LocalAddr()), Address: addrPort(conn.RemoteAddr())}
	port, known := p.frontend(client.Frontend)
	if !known {
		p.observer.Unknown()
		reset(conn)
		return
	}
	client.Port, client.Pod = port, p.table.Client(client.Address.Addr())
	client.Observed = p.observer.Port(port)
	p.serveClient(client)
}

// frontend finds the port behind an address, which may become known only now.
func (p *proxy) frontend(a netip.AddrPort) (*balance.Port, bool) {
	if port, ok := p.table.Frontend(a); ok {
		return port, true
	}
	ctx, cancel := context.WithTimeout(p.life, frontendWait)
	defer cancel()
	for {
		changed := p.table.Changed()
		if port, ok := p.table.Frontend(a); ok {
			return port, true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, false
		}
	}
}

// addrPort of a connection. Addresses of IPv4 on a socket for both families are those of IPv4.
func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// reset closes a connection so that its client sees that nobody has served it.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}
