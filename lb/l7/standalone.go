package l7

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// listenToFrontends has a listener on each frontend's own address, as they come and go.
func (p *proxy) listenToFrontends(ctx context.Context) {
	open := map[netip.AddrPort]net.Listener{}
	for {
		byPort, changed := p.feed.all()
		wanted := map[netip.AddrPort]bool{}
		for _, list := range byPort {
			for _, a := range list {
				wanted[a] = true
			}
		}
		for a, l := range open {
			if !wanted[a] {
				p.removeListener(l)
				delete(open, a)
			}
		}
		var retry <-chan time.Time
		for a := range wanted {
			if open[a] != nil {
				continue
			}
			l, err := net.Listen("tcp", a.String())
			if err != nil {
				p.cfg.Log.Error("a frontend can't be listened to; it is tried again", "frontend", a, "error", err)
				retry = time.After(time.Second)
				continue
			}
			if !p.addListener(l) {
				return
			}
			open[a] = l
		}
		select {
		case <-changed:
		case <-retry:
		case <-p.draining:
			return
		case <-ctx.Done():
			return
		}
	}
}

// addListener accepts from l, too; it closes it if the proxy is draining.
func (p *proxy) addListener(l net.Listener) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isDraining() {
		l.Close()
		return false
	}
	p.listeners[l] = struct{}{}
	p.startLoops(l)
	return true
}

func (p *proxy) removeListener(l net.Listener) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l.Close()
	delete(p.listeners, l)
}
