package kvstore

import (
	"io"
	"net"
	"sync"
	"testing"
)

// link is a network that can be cut: a TCP proxy to one server.
type link struct {
	address string
	target  string

	mu       sync.Mutex
	down     bool
	listener net.Listener
	conns    map[net.Conn]bool
	wg       sync.WaitGroup
}

func startLink(t *testing.T, target string) *link {
	l := &link{address: freeAddress(t), target: target, conns: make(map[net.Conn]bool)}
	l.heal()
	t.Cleanup(func() { l.cut(); l.wg.Wait() })
	return l
}

// cut closes all connections and refuses new ones.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = true
	l.listener.Close()
	for c := range l.conns {
		c.Close()
	}
	clear(l.conns)
}

func (l *link) heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	listener, err := net.Listen("tcp", l.address)
	if err != nil {
		panic(err)
	}
	l.down, l.listener = false, listener
	l.wg.Go(func() { l.accept(listener) })
}

func (l *link) accept(listener net.Listener) {
	for {
		from, err := listener.Accept()
		if err != nil {
			return
		}
		to, err := net.Dial("tcp", l.target)
		if err != nil {
			from.Close()
			continue
		}
		if l.add(from, to) {
			l.wg.Go(func() { l.copy(from, to) })
			l.wg.Go(func() { l.copy(to, from) })
		}
	}
}

func (l *link) add(conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		if l.down {
			c.Close()
		} else {
			l.conns[c] = true
		}
	}
	return !l.down
}

func (l *link) copy(to, from net.Conn) {
	io.Copy(to, from)
	to.Close()
	from.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, to)
	delete(l.conns, from)
}
