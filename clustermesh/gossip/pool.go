package gossip

import (
	"cmp"
	"errors"
	"fmt"
	stdlog "log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"causeway/identity"
)

// Names of the pools.
const (
	clusterPool = "cluster"
	meshPool    = "mesh"
)

// poolConfig is what a pool needs.
type poolConfig struct {
	name    string
	label   string
	self    identity.NodeName
	address netip.Addr
	port    uint16
	profile Profile
	ring    *memberlist.Keyring
	// admit tells why a node may not be a member; nil if it may.
	admit func(name identity.NodeName, address netip.Addr) error
	// state and payload are what is said to other members, at an exchange and with every answer to a probe.
	state   func(pool string) []byte
	payload func() []byte
	inbox   *inbox
	// transport opens the pool's port.
	transport func(netip.AddrPort, *stdlog.Logger) (memberlist.Transport, error)
	log       *slog.Logger
}

// pool is one memberlist. What happens in it goes to the inbox.
type pool struct {
	poolConfig
	list  *memberlist.Memberlist
	queue *memberlist.TransmitLimitedQueue

	mu      sync.Mutex
	members map[identity.NodeName]member
	met     map[string]bool      // clusters that memberlist has had members of
	joining map[string]time.Time // addresses that a Join is under way to
	busy    sync.WaitGroup
}

// member is what is known of one.
type member struct {
	address string
	joined  time.Time
	lastAck time.Time // over UDP, of a probe of ours
	rtt     time.Duration
}

// event is something that happened in a pool.
type event struct {
	pool string
	at   time.Time
	// joined, left and acked name a member.
	kind    eventKind
	node    identity.NodeName
	rtt     time.Duration
	payload []byte // of an ack, a message or a state
	// address and nonce are of an echo that came back.
	address netip.Addr
	nonce   uint64
}

type eventKind int

const (
	evJoined eventKind = iota
	evLeft
	evAcked
	evMessage
	evState
	evEcho
)

// maxInbox bounds the messages that wait to be looked at; more are lost, as on the network, and found by the next
// exchange. Members' comings and goings are never lost.
const maxInbox = 8192

// inbox gathers events for the one goroutine that looks at them. It never blocks: memberlist calls with its locks held.
type inbox struct {
	mu     sync.Mutex
	events []event
	lost   uint64
	wake   chan struct{}
}

func newInbox() *inbox { return &inbox{wake: make(chan struct{}, 1)} }

func (b *inbox) push(e event) {
	b.mu.Lock()
	if len(b.events) >= maxInbox && e.kind >= evAcked {
		b.lost++
	} else {
		b.events = append(b.events, e)
	}
	b.mu.Unlock()
	if e.kind == evAcked {
		return // nothing follows from it at once, and most of what happens is that
	}
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *inbox) take() []event {
	b.mu.Lock()
	defer b.mu.Unlock()
	events := b.events
	b.events = nil
	return events
}

func openPool(cfg poolConfig) (*pool, error) {
	p := &pool{poolConfig: cfg, members: map[identity.NodeName]member{}, met: map[string]bool{}, joining: map[string]time.Time{}}
	p.queue = &memberlist.TransmitLimitedQueue{NumNodes: p.size, RetransmitMult: cfg.profile.RetransmitMult}
	c := memberlist.DefaultLANConfig()
	cfg.profile.Apply(c)
	c.Name, c.Label, c.RequireNodeNames = cfg.self.String(), cfg.label, true
	c.BindAddr, c.BindPort = cfg.address.String(), int(cfg.port)
	c.AdvertiseAddr, c.AdvertisePort = cfg.address.String(), int(cfg.port)
	c.Keyring = cfg.ring
	c.DeadNodeReclaimTime = 5 * time.Second
	c.Delegate, c.Events, c.Alive, c.Ping, c.Conflict = p, p, p, p, p
	c.LogOutput, c.Logger = nil, stdlog.New(logWriter{cfg.log.With("pool", cfg.name)}, "", 0)
	at := netip.AddrPortFrom(cfg.address, cfg.port)
	t, err := cfg.transport(at, c.Logger)
	if err != nil {
		return nil, fmt.Errorf("gossip pool %s at %s: %w", cfg.name, at, err)
	}
	c.Transport = t
	if p.list, err = memberlist.Create(c); err != nil {
		return nil, errors.Join(fmt.Errorf("gossip pool %s at %s: %w", cfg.name, at, err), t.Shutdown())
	}
	return p, nil
}

// close leaves the pool: announced, or as if the agent had been killed. Then its port is free; what was being sent ends later, as busy tells.
func (p *pool) close(announce bool) error {
	if announce && p.size() > 1 {
		if err := p.list.Leave(time.Second); err != nil {
			p.log.Debug("took no leave", "pool", p.name, "error", err)
		}
	}
	return p.list.Shutdown()
}

// forget drops the members of a cluster, and returns them. memberlist still has them: see holds.
func (p *pool) forget(cluster string) (names []identity.NodeName) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.members {
		if name.Cluster == cluster {
			names = append(names, name)
			delete(p.members, name)
		}
	}
	return names
}

// holds tells whether memberlist may have members of other clusters than these.
func (p *pool) holds(than func(cluster string) bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for cluster := range p.met {
		if !than(cluster) {
			return true
		}
	}
	return false
}

func (p *pool) size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.members)
}

// snapshot returns the members now, this node included.
func (p *pool) snapshot() map[identity.NodeName]member {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[identity.NodeName]member, len(p.members))
	for name, m := range p.members {
		out[name] = m
	}
	return out
}

func (p *pool) has(name identity.NodeName) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.members[name]
	return ok
}

// join meets a node that is no member, in the background: TCP may take a while. At most one attempt per address is under way.
func (p *pool) join(address netip.Addr, port uint16) {
	at := netip.AddrPortFrom(address, port).String()
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, busy := p.joining[at]; busy {
		return
	}
	p.joining[at] = time.Now()
	p.busy.Go(func() {
		defer func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			delete(p.joining, at)
		}()
		// The name is not checked by the network's transport; memberlist only wants one.
		if _, err := p.list.Join([]string{at + "/" + at}); err != nil {
			p.log.Debug("no way into the pool through this node", "pool", p.name, "node", at, "error", err)
		}
	})
}

// maxPacket is the largest message that surely fits a packet beside memberlist's headers, label and encryption, in bytes.
const maxPacket = 1200

// broadcast spreads a message by gossip; a newer one of the same name takes its place. One that fits no packet goes to a
// few members by TCP, who hand it on the same way.
func (p *pool) broadcast(name string, msg []byte) {
	if len(msg) <= maxPacket {
		p.queue.QueueBroadcast(&broadcast{name, msg})
		return
	}
	for _, address := range p.some(p.profile.GossipNodes) {
		p.busy.Go(func() { p.reliable(address, msg) })
	}
}

// push sends a message to a number of members at once, ahead of the rounds of gossip.
func (p *pool) push(msg []byte, members int) {
	if len(msg) > maxPacket {
		return
	}
	for _, address := range p.some(members) {
		p.send(address, msg)
	}
}

// some returns the addresses of up to k other members at random.
func (p *pool) some(k int) (addresses []string) {
	for name, m := range p.snapshot() {
		if name != p.self {
			addresses = append(addresses, m.address)
		}
	}
	rand.Shuffle(len(addresses), func(i, j int) { addresses[i], addresses[j] = addresses[j], addresses[i] })
	return addresses[:min(k, len(addresses))]
}

// send sends one packet, which may get lost.
func (p *pool) send(address string, msg []byte) {
	if err := p.list.SendToAddress(memberlist.Address{Addr: address, Name: address}, msg); err != nil {
		p.log.Debug("not sent", "pool", p.name, "to", address, "error", err)
	}
}

// reliable sends by TCP. It tells whether that worked; a member that does not take it finds out at the next exchange.
func (p *pool) reliable(address string, msg []byte) bool {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return false
	}
	if err := p.list.SendReliable(&memberlist.Node{Name: address, Addr: net.ParseIP(host), Port: uint16(number)}, msg); err != nil {
		p.log.Debug("not sent", "pool", p.name, "to", address, "error", err)
		return false
	}
	return true
}

// udpBlocked lists the members that have answered none of this node's probes over UDP for long, although memberlist,
// which asks over TCP and through others too, finds them alive.
func (p *pool) udpBlocked(now time.Time) (blocked []identity.NodeName) {
	members := p.snapshot()
	patience := max(4*time.Second, 5*time.Duration(len(members))*p.profile.ProbeInterval)
	for name, m := range members {
		heard := m.lastAck
		if m.joined.After(heard) {
			heard = m.joined
		}
		if name != p.self && now.Sub(heard) > patience {
			blocked = append(blocked, name)
		}
	}
	slices.SortFunc(blocked, compareNames)
	return blocked
}

// broadcast is memberlist's: see there. Those of one name replace each other.
type broadcast struct {
	name string
	msg  []byte
}

func (b *broadcast) Name() string    { return b.name }
func (b *broadcast) Message() []byte { return b.msg }
func (b *broadcast) Finished()       {}

// Invalidates is not asked, since there is a name.
func (b *broadcast) Invalidates(memberlist.Broadcast) bool { return false }

// What follows is called by memberlist.

// maxQueue bounds the broadcasts that wait to be sent.
const maxQueue = 4096

// NodeMeta is empty: what members say of themselves travels signed (facts).
func (p *pool) NodeMeta(int) []byte { return nil }

// NotifyMsg gets the messages of members.
func (p *pool) NotifyMsg(msg []byte) {
	p.inbox.push(event{pool: p.name, at: time.Now(), kind: evMessage, payload: slices.Clone(msg)})
}

// GetBroadcasts fills up packets.
func (p *pool) GetBroadcasts(overhead, limit int) [][]byte {
	if p.queue.NumQueued() > maxQueue {
		p.queue.Prune(maxQueue / 2)
	}
	return p.queue.GetBroadcasts(overhead, limit)
}

// LocalState and MergeRemoteState are the two sides of a full exchange.
func (p *pool) LocalState(bool) []byte { return p.state(p.name) }

// MergeRemoteState gets the other's.
func (p *pool) MergeRemoteState(buf []byte, _ bool) {
	p.inbox.push(event{pool: p.name, at: time.Now(), kind: evState, payload: slices.Clone(buf)})
}

// NotifyJoin and NotifyLeave tell of members that came and went.
func (p *pool) NotifyJoin(n *memberlist.Node) {
	name, err := parseName(n.Name)
	if err != nil {
		return
	}
	now := time.Now()
	p.mu.Lock()
	p.met[name.Cluster] = true
	p.mu.Unlock()
	if p.NotifyAlive(n) != nil {
		return // its cluster has just gone
	}
	p.mu.Lock()
	p.members[name] = member{address: n.Address(), joined: now}
	p.mu.Unlock()
	p.inbox.push(event{pool: p.name, at: now, kind: evJoined, node: name})
}

// NotifyLeave tells of one that is dead or has taken its leave, which memberlist does not tell apart here: its facts do.
func (p *pool) NotifyLeave(n *memberlist.Node) {
	name, err := parseName(n.Name)
	if err != nil {
		return
	}
	p.mu.Lock()
	delete(p.members, name)
	p.mu.Unlock()
	p.inbox.push(event{pool: p.name, at: time.Now(), kind: evLeft, node: name})
}

// NotifyUpdate has nothing to tell: there is no metadata.
func (p *pool) NotifyUpdate(*memberlist.Node) {}

// NotifyAlive refuses members that the pool may not hold.
func (p *pool) NotifyAlive(n *memberlist.Node) error {
	name, err := parseName(n.Name)
	if err != nil {
		return err
	}
	address, ok := netip.AddrFromSlice(n.Addr)
	if !ok {
		return fmt.Errorf("%s has no address", name)
	}
	return p.admit(name, address.Unmap())
}

// NotifyConflict tells of two nodes with one name.
func (p *pool) NotifyConflict(existing, other *memberlist.Node) {
	p.log.Warn("two nodes have one name in gossip; give one of them another", "pool", p.name, "name", existing.Name, "address", existing.Address(), "other", other.Address())
}

// AckPayload rides on answers to probes.
func (p *pool) AckPayload() []byte { return p.payload() }

// NotifyPingComplete gets the answer to a probe that came back directly, over UDP.
func (p *pool) NotifyPingComplete(n *memberlist.Node, rtt time.Duration, payload []byte) {
	name, err := parseName(n.Name)
	if err != nil {
		return
	}
	now := time.Now()
	p.mu.Lock()
	if m, ok := p.members[name]; ok {
		m.lastAck, m.rtt = now, smooth(m.rtt, rtt)
		p.members[name] = m
	}
	p.mu.Unlock()
	p.inbox.push(event{pool: p.name, at: now, kind: evAcked, node: name, rtt: rtt, payload: slices.Clone(payload)})
}

func parseName(s string) (identity.NodeName, error) {
	cluster, node, ok := strings.Cut(s, "/")
	if !ok || cluster == "" || node == "" || strings.Contains(node, "/") {
		return identity.NodeName{}, fmt.Errorf("%.80q is not CLUSTER/NODE", s)
	}
	return identity.NodeName{Cluster: cluster, Node: node}, nil
}

// logWriter hands memberlist's lines to the agent's log. Its own warnings are about single packets and members, of which
// status says more, so they are for debugging.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	for _, level := range []string{"[DEBUG] ", "[INFO] ", "[WARN] ", "[ERR] "} {
		text = strings.TrimPrefix(text, level)
	}
	w.log.Debug(cmp.Or(strings.TrimPrefix(text, "memberlist: "), "?"))
	return len(line), nil
}
