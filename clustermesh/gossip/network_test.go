package gossip

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// network joins nodes in memory, so that a test runs in fake time (testing/synctest) and a busy machine changes nothing. It loses
// packets between any two addresses as it is told. Streams are only refused, as TCP makes up for loss.
type network struct {
	mu    sync.Mutex
	ports map[string]*port
	cut   map[[2]netip.Addr]float64 // share of packets lost, by direction
	down  map[netip.Addr]bool       // machines without power
}

// port is a socket of one node.
type port struct {
	net     *network
	address netip.AddrPort
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
}

const delay = 500 * time.Microsecond // one way

func newNetwork() *network {
	return &network{ports: map[string]*port{}, cut: map[[2]netip.Addr]float64{}, down: map[netip.Addr]bool{}}
}

func (n *network) open(a netip.AddrPort) *port {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := &port{net: n, address: a, packets: make(chan *memberlist.Packet, 4096), streams: make(chan net.Conn, 256), done: make(chan struct{})}
	n.ports[a.String()] = p
	return p
}

// lose sets the share of packets that get lost from one address to another.
func (n *network) lose(from, to netip.Addr, share float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[[2]netip.Addr{from, to}] = share
}

func (n *network) power(a netip.Addr, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down[a] = !on
}

// passes tells whether a packet arrives.
func (n *network) passes(from, to netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.down[from] && !n.down[to] && rand.Float64() >= n.cut[[2]netip.Addr{from, to}]
}

func (n *network) find(address string) *port {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ports[address]
}

func (p *port) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return p.address.Addr().AsSlice(), int(p.address.Port()), nil
}

func (p *port) PacketCh() <-chan *memberlist.Packet { return p.packets }
func (p *port) StreamCh() <-chan net.Conn           { return p.streams }

func (p *port) WriteTo(b []byte, address string) (time.Time, error) {
	return p.WriteToAddress(b, memberlist.Address{Addr: address})
}

func (p *port) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	to := p.net.find(a.Addr)
	if to == nil || !p.net.passes(p.address.Addr(), to.address.Addr()) {
		return time.Now(), nil
	}
	packet := append([]byte(nil), b...)
	time.AfterFunc(delay, func() {
		select {
		case <-to.done:
		case to.packets <- &memberlist.Packet{Buf: packet, From: net.UDPAddrFromAddrPort(p.address), Timestamp: time.Now()}:
		default:
		}
	})
	return time.Now(), nil
}

func (p *port) DialTimeout(address string, timeout time.Duration) (net.Conn, error) {
	return p.DialAddressTimeout(memberlist.Address{Addr: address}, timeout)
}

// DialAddressTimeout waits for its whole timeout where no packet passes, and is refused at once where nobody listens.
func (p *port) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	at, err := netip.ParseAddrPort(a.Addr)
	if err != nil {
		return nil, err
	}
	to := p.net.find(a.Addr)
	if !p.net.connects(p.address.Addr(), at.Addr()) {
		select {
		case <-time.After(timeout):
		case <-p.done:
		}
		return nil, fmt.Errorf("%s: %w", a.Addr, os.ErrDeadlineExceeded)
	}
	// Not while the port is being closed: nobody would read it, and a pipe has no buffer for what memberlist writes without a deadline.
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	if to == nil || to.closed() {
		return nil, fmt.Errorf("%s: connection refused", a.Addr)
	}
	here, there := net.Pipe()
	select {
	case to.streams <- there:
		return here, nil
	default:
		return nil, fmt.Errorf("%s: too many connections", a.Addr)
	}
}

// connects tells whether TCP gets through, which loss only delays.
func (n *network) connects(a, b netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.down[a] && !n.down[b] && n.cut[[2]netip.Addr{a, b}] < 1 && n.cut[[2]netip.Addr{b, a}] < 1
}

func (p *port) closed() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Shutdown closes the socket; connections that nobody has accepted end.
func (p *port) Shutdown() error {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	p.once.Do(func() { close(p.done) })
	for {
		select {
		case c := <-p.streams:
			_ = c.Close()
		default:
			return nil
		}
	}
}
