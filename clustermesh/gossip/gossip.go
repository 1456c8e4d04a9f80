package gossip

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	stdlog "log"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/coordinate"

	"causeway/identity"
)

// Config of a node's gossip.
type Config struct {
	Self    identity.NodeName
	Address netip.Addr // on the underlay; both pools listen there
	// Port of the cluster's pool, MeshPort of the mesh's: UDP and TCP, the same on all nodes.
	Port, MeshPort uint16
	// Mesh labels all messages, so that two meshes never mix.
	Mesh string
	// Peers are the other clusters that are known at the start; SetPeers tells of others.
	Peers []string
	// KeyFile holds the mesh's gossip keys, the first encrypts. It is made with a new one if there is none.
	KeyFile string
	// SigningKey is the node's own; its public half is in its entry in the store.
	SigningKey ed25519.PrivateKey
	// Incarnation of the agent: see identity.Version.
	Incarnation uint64
	// Draining: the node has been drained before.
	Draining bool
	Timing   Timing
	// Echo sends one through the data path; what comes back is for Answered.
	Echo func(to netip.Addr, nonce uint64) error
	// Deliver gets what other nodes have written or withdrawn. It must not block.
	Deliver func(Entry)
	// Settled tells whether the store has shown what an entry says or something newer, so that it need not be told any more.
	Settled func(Entry) bool
	// Known tells whether an entry is in the tables already or has been, by whichever way; gone: it was withdrawn since.
	// Of this node's own entries it says what the node has.
	Known func(Entry) (known, gone bool)
	// Changed gets all rows when one has changed, one call at a time.
	Changed func([]identity.Liveness, []identity.Reach)
	// Refused is told what was refused of a cluster's messages, and why.
	Refused func(cluster, key string, reason error)
	// RingChanged gets the ring when a command on this node has changed it, for the cluster's store. It is called without locks,
	// before the command returns, and not for what others have changed. Nil discards.
	RingChanged func(Ring)
	Log         *slog.Logger
	// transport is for tests; nil is the network.
	transport func(netip.AddrPort) memberlist.Transport
}

// Entry is a delta without its signature.
type Entry struct {
	Node identity.NodeName
	// Key as in the store, without the store's prefix.
	Key string
	identity.Version
	Withdrawn bool
	Value     []byte
}

func (d *Delta) entry() Entry {
	return Entry{Node: d.Signer(), Key: d.Key, Version: d.Version(), Withdrawn: d.Withdrawn, Value: d.Value}
}

// How often what is done.
const (
	// step is the time between two looks at who does not answer, idle the same while everybody does.
	stepInterval = 30 * time.Millisecond
	idleInterval = 200 * time.Millisecond
	// chores: joining who is missing, retiring what is no news.
	choresInterval = time.Second
	// newsTime is how long an entry that the store has is still told to who asks; aliveTime the same for a verdict
	// that all is well again.
	newsTime  = time.Minute
	aliveTime = 10 * time.Minute
	// settleTime is how long the entries of a node's earlier life outlast the news that those of its new one are complete.
	settleTime = 3 * time.Second
	// startTime is how long a new agent waits for its pool before it takes on tasks in it.
	startTime = 500 * time.Millisecond
)

// maxTransitions bounds the memory of what has changed.
const maxTransitions = 20

// urgentMembers is how many members get urgent news at once, ahead of the rounds of gossip.
const urgentMembers = 16

// Gossip is a node's part in its cluster's pool and, as a speaker, in the mesh's.
type Gossip struct {
	Config
	inbox *inbox
	work  chan struct{} // something was asked of the loop
	ring  *memberlist.Keyring
	// admitted are the nodes that pools may hold; ack what rides on answers to probes. Both are read with memberlist's locks held.
	admitted atomic.Pointer[admission]
	ack      atomic.Pointer[[]byte]
	coord    *coordinate.Client
	answers  answers

	// mu is for all that follows, and Peers. It is taken before any lock of memberlist's, and what memberlist calls with its own held
	// (admit, the members' comings and goings) does not take it. Nothing is sent while it is held: see later.
	mu       sync.Mutex
	pools    map[string]*pool
	ledger   *ledger
	detector *detector
	// nodes are all that the stores name, and book those of them that are of the own cluster or a peer's.
	nodes    []identity.Node
	book     map[identity.NodeName]identity.Node
	facts    map[identity.NodeName]factsOf
	verdicts map[identity.NodeName]verdict
	// private are verdicts that nobody could be asked about.
	private map[identity.NodeName]verdict
	// early are deltas whose signer is not in the book yet.
	early map[string]Delta
	// keys are the ring's, as of ringAt (see Ring). ringNews is closed, and replaced, when another node's may have changed.
	keys     [][]byte
	ringAt   uint64
	ringNews chan struct{}
	own      facts
	sequence uint64
	problem  map[string]string // by pool
	started  time.Time
	stepped  time.Time
	chored   time.Time
	hurried  time.Time // until then chores are done more often: there is a new peer
	measured time.Time // when the mesh pool's timeouts were right last
	told     time.Time // when round trips were told last
	dirty    bool
	forgot   bool // rows have gone that the last review had
	rows     map[identity.NodeName]identity.Liveness
	reaches  map[string]identity.Reach
	// unvoted says since when no speaker has a vote on a cluster that was reachable.
	unvoted  map[string]time.Time
	history  []Transition
	complete map[identity.NodeName]completed
	// sampled are the samples of each cluster, until something changes that they are chosen by.
	sampled map[string]map[identity.NodeName]netip.Addr
	// closing are pools that take their leave, which may last a second; no new one may take their port meanwhile.
	closing map[string]bool
	closers sync.WaitGroup
	// out are calls to be made without mu.
	out []func()
}

type factsOf struct {
	facts
	incarnation uint64
}

type completed struct {
	incarnation uint64
	at          time.Time
}

// Transition of a node (CLUSTER/NODE) or cluster from one state to another.
type Transition struct {
	At         time.Time
	Subject    string
	From, To   string
	Reason, By string
}

// New returns a node's gossip, which does nothing until Run.
func New(cfg Config) (*Gossip, error) {
	if cfg.Timing == (Timing{}) {
		cfg.Timing = DefaultTiming()
	}
	had, err := keyFile(cfg.KeyFile).readOrMake()
	if err != nil {
		return nil, err
	}
	cfg.Peers = slices.Clone(cfg.Peers)
	ring, err := memberlist.NewKeyring(had.Keys, had.Keys[0])
	if err != nil {
		return nil, fmt.Errorf("gossip keys of %s: %w", cfg.KeyFile, err)
	}
	coord, err := coordinate.NewClient(coordinate.DefaultConfig())
	if err != nil {
		return nil, err
	}
	g := &Gossip{
		Config: cfg, inbox: newInbox(), work: make(chan struct{}, 1), ring: ring, coord: coord, keys: had.Keys, ringAt: had.At, ringNews: make(chan struct{}),
		pools: map[string]*pool{}, ledger: newLedger(), detector: newDetector(cfg.Self, cfg.Timing),
		book: map[identity.NodeName]identity.Node{}, facts: map[identity.NodeName]factsOf{},
		verdicts: map[identity.NodeName]verdict{}, private: map[identity.NodeName]verdict{}, early: map[string]Delta{},
		problem: map[string]string{}, rows: map[identity.NodeName]identity.Liveness{}, reaches: map[string]identity.Reach{}, unvoted: map[string]time.Time{},
		complete: map[identity.NodeName]completed{}, closing: map[string]bool{}, dirty: true,
	}
	g.own = facts{Draining: cfg.Draining, Shared: cfg.Draining, Votes: map[string]identity.ReachState{}, RTTs: map[string]uint32{}, Silent: map[string][]string{}}
	g.knowNodes()
	g.setAck()
	return g, nil
}

// Run gossips until ctx ends, and then takes its leave: an agent that stops as planned takes nothing out of service.
func (g *Gossip) Run(ctx context.Context) error {
	if err := g.start(); err != nil {
		return err
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-g.inbox.wake:
		case <-g.work:
		case <-timer.C:
		case <-ctx.Done():
			return g.stop()
		}
		timer.Reset(g.once(time.Now()))
	}
}

func (g *Gossip) start() error {
	p, err := g.open(clusterPool, g.Port, ClusterProfile())
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pools[clusterPool], g.started = p, time.Now()
	g.own.Keys = fingerprints(g.keys)
	g.tellFacts(g.started)
	return nil
}

func (g *Gossip) open(name string, port uint16, profile Profile) (*pool, error) {
	label := g.Mesh + "/" + name
	if name == clusterPool {
		label += "/" + g.Self.Cluster
	}
	return openPool(poolConfig{
		name: name, label: label, self: g.Self, address: g.Address, port: port, profile: profile, ring: g.ring,
		admit: g.admit(name), state: g.state, payload: func() []byte { return *g.ack.Load() }, inbox: g.inbox, transport: g.listen, log: g.Log,
	})
}

// listen opens a port, at which probes are answered too.
func (g *Gossip) listen(at netip.AddrPort, log *stdlog.Logger) (memberlist.Transport, error) {
	var inner memberlist.Transport
	var err error
	if g.transport != nil {
		inner = g.transport(at)
	} else if inner, err = memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{at.Addr().String()}, BindPort: int(at.Port()), Logger: log}); err != nil {
		return nil, err
	}
	aware, ok := inner.(memberlist.NodeAwareTransport)
	if !ok {
		return nil, fmt.Errorf("transport %T does not know nodes", inner)
	}
	return newTransport(aware, func(from netip.Addr) bool { return g.admitted.Load().addresses[from] }, &g.answers), nil
}

// admit accepts only nodes that their cluster's store names, at the address that it names.
func (g *Gossip) admit(pool string) func(identity.NodeName, netip.Addr) error {
	return func(name identity.NodeName, address netip.Addr) error {
		if pool == clusterPool && name.Cluster != g.Self.Cluster {
			return fmt.Errorf("node %s is of another cluster", name)
		}
		known, ok := g.admitted.Load().nodes[name]
		if !ok {
			return fmt.Errorf("node %s is not known from its cluster's store, or its cluster is no peer", name)
		}
		if known != address {
			return fmt.Errorf("node %s is at %s, not at %s", name, known, address)
		}
		return nil
	}
}

// stop says that the agent ends as planned, and leaves the pools.
func (g *Gossip) stop() error {
	g.mu.Lock()
	g.own.Stopping = true
	g.tellFacts(time.Now())
	out := g.takeOut()
	pools := g.pools
	g.pools = map[string]*pool{}
	g.mu.Unlock()
	for _, f := range out {
		f()
	}
	g.closers.Wait()
	var errs []error
	for _, name := range []string{meshPool, clusterPool} {
		if p := pools[name]; p != nil {
			errs = append(errs, p.close(true))
			p.busy.Wait()
		}
	}
	return errors.Join(errs...)
}

// once looks at all that has happened, does what follows, and returns when to look again at the latest.
func (g *Gossip) once(now time.Time) time.Duration {
	g.mu.Lock()
	for _, e := range g.inbox.take() {
		g.handle(e)
	}
	busy := g.step(now)
	if now.Sub(g.chored) >= choresInterval || now.Before(g.hurried) && now.Sub(g.chored) >= idleInterval {
		g.chored = now
		g.chores(now)
	}
	var rows []identity.Liveness
	var reaches []identity.Reach
	changed := (g.dirty || len(g.unvoted) > 0) && g.review(now)
	if changed {
		rows, reaches = g.snapshot()
	}
	g.dirty = false
	out := g.takeOut()
	g.mu.Unlock()
	for _, f := range out {
		f()
	}
	if changed {
		g.Changed(rows, reaches)
	}
	if busy {
		return stepInterval
	}
	return idleInterval
}

func (g *Gossip) takeOut() []func() {
	out := g.out
	g.out = nil
	return out
}

// later has f called without the lock.
func (g *Gossip) later(f func()) { g.out = append(g.out, f) }

// wakeUp has the loop look at what has been asked of it.
func (g *Gossip) wakeUp() {
	select {
	case g.work <- struct{}{}:
	default:
	}
}

// Answered notes an echo that came back.
func (g *Gossip) Answered(from netip.Addr, nonce uint64, at time.Time) {
	g.inbox.push(event{kind: evEcho, address: from, nonce: nonce, at: at})
}

// SetNodes tells of all nodes that the stores name now, of all clusters.
func (g *Gossip) SetNodes(nodes []identity.Node) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nodes = slices.Clone(nodes)
	g.knowNodes()
	early := g.early
	g.early = map[string]Delta{}
	for _, d := range early {
		g.receive(d, "", time.Now())
	}
	g.chored = time.Time{} // there may be somebody new to join
	g.dirty = true
	g.wakeUp()
}

// Publish tells the mesh what this node has written or withdrawn. Versions are those of the store.
func (g *Gossip) Publish(e Entry) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tell(Delta{Key: e.Key, Incarnation: e.Incarnation, Sequence: e.Sequence, Withdrawn: e.Withdrawn, Value: e.Value}, false, time.Now())
	g.wakeUp()
}

// Complete says that all that this node has now has been published.
func (g *Gossip) Complete() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.own.Complete = true
	g.tellFacts(time.Now())
	g.wakeUp()
}
