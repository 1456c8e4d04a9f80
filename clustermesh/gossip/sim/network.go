package sim

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// What a network does to packets that memberlist's own mock does not: it loses, delays and counts them, and a member that
// does not read blocks nobody else.
const (
	// headerBytes is what IPv4 and UDP add to each packet; links add more.
	headerBytes = 20 + 8
	// queuedPackets is how many packets a member may have unread. A socket's buffer is bounded as well: what does not
	// fit is lost.
	queuedPackets = 1024
	// A lost SYN is sent again after a second, a lost segment after 200 ms at the earliest: Linux's TCP_TIMEOUT_INIT and
	// TCP_RTO_MIN.
	lostSYN     = time.Second
	lostSegment = 200 * time.Millisecond
)

// network joins the members of one pool in memory.
type network struct {
	loss  atomic.Uint64 // share of packets that get lost, each for itself; the bits of a float64
	delay time.Duration // one way

	mu    sync.RWMutex
	nodes map[string]*transport // by name
}

// newNetwork returns a network that loses nothing.
func newNetwork(delay time.Duration) *network {
	return &network{delay: delay, nodes: map[string]*transport{}}
}

func (n *network) lose(share float64) { n.loss.Store(math.Float64bits(share)) }

// transport is one member's end of a network. Its counters are what the member has sent.
type transport struct {
	net     *network
	name    string
	addr    *net.UDPAddr
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}

	mu    sync.Mutex
	dead  bool
	conns map[*stream]struct{} // this end of each

	sent  atomic.Int64 // packets
	bytes atomic.Int64 // of packets with their headers, and of streams
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

// join returns the transport of a new member.
func (n *network) join(name string) *transport {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := len(n.nodes) + 1
	t := &transport{
		net: n, name: name, addr: &net.UDPAddr{IP: net.IPv4(10, byte(i>>16), byte(i>>8), byte(i)), Port: 7956},
		packets: make(chan *memberlist.Packet, queuedPackets), streams: make(chan net.Conn, queuedPackets), done: make(chan struct{}), conns: map[*stream]struct{}{},
	}
	n.nodes[name] = t
	return t
}

// find returns the member that an address names, which may be silent by now.
func (n *network) find(a memberlist.Address) (*transport, error) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	t, ok := n.nodes[a.Name]
	if !ok {
		return nil, fmt.Errorf("nobody is called %q", a.Name)
	}
	return t, nil
}

// loses tells whether the next packet gets lost.
func (n *network) loses() bool {
	loss := math.Float64frombits(n.loss.Load())
	return loss > 0 && rand.Float64() < loss
}

// losesRoundTrip tells whether the next packet gets lost, or the answer to it.
func (n *network) losesRoundTrip() bool {
	there, back := n.loses(), n.loses()
	return there || back
}

// kill makes the member silent: neither what it sends nor what it is sent arrives any more. Only who is connected to it
// is told, so that nobody waits for it who set no deadline; a machine that is gone would not even do that.
func (t *transport) kill() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dead {
		return
	}
	t.dead = true
	close(t.done)
	for s := range t.conns {
		_ = s.Conn.Close() // a pipe's never fails
	}
}

// own makes a connection end with the member.
func (t *transport) own(c net.Conn) *stream {
	s := &stream{Conn: c, end: t}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dead {
		_ = c.Close()
		return s
	}
	t.conns[s] = struct{}{}
	return s
}

func (s *stream) Close() error {
	s.end.mu.Lock()
	delete(s.end.conns, s)
	s.end.mu.Unlock()
	return s.Conn.Close()
}

func (t *transport) silent() bool {
	select {
	case <-t.done:
		return true
	default:
		return false
	}
}

func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.addr.IP, t.addr.Port, nil
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *transport) StreamCh() <-chan net.Conn           { return t.streams }

func (t *transport) Shutdown() error {
	t.kill()
	return nil
}

var errNoName = errors.New("members are found by name here")

func (t *transport) WriteTo([]byte, string) (time.Time, error)           { return time.Time{}, errNoName }
func (t *transport) DialTimeout(string, time.Duration) (net.Conn, error) { return nil, errNoName }
func (t *transport) count(b int)                                         { t.sent.Add(1); t.bytes.Add(int64(b + headerBytes)) }
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	to, err := t.net.find(a)
	now := time.Now()
	if err != nil || t.silent() {
		return now, err
	}
	t.count(len(b))
	if t.net.loses() {
		return now, nil
	}
	packet := append([]byte(nil), b...) // memberlist may use its buffer again
	time.AfterFunc(t.net.delay, func() { to.receive(packet, t.addr) })
	return now, nil
}

func (t *transport) receive(b []byte, from net.Addr) {
	if t.silent() {
		return
	}
	select {
	case t.packets <- &memberlist.Packet{Buf: b, From: from, Timestamp: time.Now()}:
	default: // the queue is full
	}
}

// DialAddressTimeout waits for its whole timeout if the other end is silent, as for a machine that is gone. Loss can only delay
// it, until the next SYN.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	to, err := t.net.find(a)
	if err != nil {
		return nil, err
	}
	wait := 2 * t.net.delay
	for t.net.losesRoundTrip() {
		wait += lostSYN
	}
	if to.silent() || wait > timeout {
		t.sleep(timeout)
		return nil, fmt.Errorf("%s: %w", a.Name, os.ErrDeadlineExceeded)
	}
	t.sleep(wait)
	here, there := net.Pipe()
	select {
	case to.streams <- to.own(there):
		return t.own(here), nil
	default:
		return nil, errors.New("too many connections wait at " + a.Name)
	}
}

// sleep waits, unless the member is killed before.
func (t *transport) sleep(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.done:
	}
}

// stream is one end of a connection, whose first segment may get lost.
type stream struct {
	net.Conn
	end      *transport
	wrote    atomic.Bool
	deadline atomic.Int64 // in nanoseconds since 1970; 0 is none
}

func (s *stream) SetDeadline(at time.Time) error {
	s.deadline.Store(at.UnixNano())
	return s.Conn.SetDeadline(at)
}

func (s *stream) Write(b []byte) (int, error) {
	s.end.bytes.Add(int64(len(b)))
	if !s.wrote.Swap(true) {
		s.end.sleep(s.firstDelay())
	}
	return s.Conn.Write(b)
}

// firstDelay is never longer than the deadline allows; the write then fails by itself.
func (s *stream) firstDelay() time.Duration {
	wait := s.end.net.delay
	if s.end.net.loses() {
		wait += lostSegment
	}
	if at := s.deadline.Load(); at != 0 {
		wait = min(wait, time.Until(time.Unix(0, at)))
	}
	return wait
}

// name returns a member's name of the usual length. It has no slash: memberlist takes what is before one for the name of a
// member to join, and the rest for its address.
func name(i int) string { return "east.node-" + strconv.Itoa(10000+i) }
