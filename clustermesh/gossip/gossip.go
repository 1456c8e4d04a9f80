package gossip

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
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
	// Peers are the other clusters.
	Peers []string
	// KeyFile holds the mesh's gossip keys, the first encrypts.
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
	Log     *slog.Logger
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
	admitted atomic.Pointer[map[identity.NodeName]netip.Addr]
	ack      atomic.Pointer[[]byte]
	coord    *coordinate.Client

	// mu is for all that follows. It is never held while memberlist is called: memberlist calls back with its own locks held.
	mu       sync.Mutex
	pools    map[string]*pool
	ledger   *ledger
	detector *detector
	book     map[identity.NodeName]identity.Node
	facts    map[identity.NodeName]factsOf
	verdicts map[identity.NodeName]verdict
	// private are verdicts that nobody could be asked about.
	private map[identity.NodeName]verdict
	// early are deltas whose signer is not in the book yet.
	early    map[string]Delta
	keys     [][]byte
	own      facts
	sequence uint64
	problem  map[string]string // by pool
	started  time.Time
	stepped  time.Time
	chored   time.Time
	measured time.Time // when the mesh pool's timeouts were right last
	told     time.Time // when round trips were told last
	dirty    bool
	rows     map[identity.NodeName]identity.Liveness
	reaches  map[string]identity.Reach
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
	keys, err := keyFile(cfg.KeyFile).read()
	if err != nil {
		return nil, err
	}
	ring, err := memberlist.NewKeyring(keys, keys[0])
	if err != nil {
		return nil, fmt.Errorf("gossip keys of %s: %w", cfg.KeyFile, err)
	}
	coord, err := coordinate.NewClient(coordinate.DefaultConfig())
	if err != nil {
		return nil, err
	}
	g := &Gossip{
		Config: cfg, inbox: newInbox(), work: make(chan struct{}, 1), ring: ring, coord: coord, keys: keys,
		pools: map[string]*pool{}, ledger: newLedger(), detector: newDetector(cfg.Self, cfg.Timing),
		book: map[identity.NodeName]identity.Node{}, facts: map[identity.NodeName]factsOf{},
		verdicts: map[identity.NodeName]verdict{}, private: map[identity.NodeName]verdict{}, early: map[string]Delta{},
		problem: map[string]string{}, rows: map[identity.NodeName]identity.Liveness{}, reaches: map[string]identity.Reach{},
		complete: map[identity.NodeName]completed{}, closing: map[string]bool{}, dirty: true,
	}
	g.own = facts{Draining: cfg.Draining, Shared: cfg.Draining, Votes: map[string]identity.ReachState{}, RTTs: map[string]uint32{}, Silent: map[string][]string{}}
	g.admitted.Store(&map[identity.NodeName]netip.Addr{cfg.Self: cfg.Address})
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
	var transport memberlist.Transport
	if g.transport != nil {
		transport = g.transport(netip.AddrPortFrom(g.Address, port))
	}
	return openPool(poolConfig{
		name: name, label: label, self: g.Self, address: g.Address, port: port, profile: profile, ring: g.ring,
		admit: g.admit(name), state: g.state, payload: func() []byte { return *g.ack.Load() }, inbox: g.inbox, transport: transport, log: g.Log,
	})
}

// admit accepts only nodes that their cluster's store names, at the address that it names.
func (g *Gossip) admit(pool string) func(identity.NodeName, netip.Addr) error {
	return func(name identity.NodeName, address netip.Addr) error {
		if pool == clusterPool && name.Cluster != g.Self.Cluster {
			return fmt.Errorf("node %s is of another cluster", name)
		}
		known, ok := (*g.admitted.Load())[name]
		if !ok {
			return fmt.Errorf("node %s is not known from its cluster's store", name)
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
	if now.Sub(g.chored) >= choresInterval {
		g.chored = now
		g.chores(now)
	}
	var rows []identity.Liveness
	var reaches []identity.Reach
	changed := g.dirty && g.review(now)
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
	admitted := make(map[identity.NodeName]netip.Addr, len(nodes))
	clear(g.book)
	g.sampled = nil
	for _, n := range nodes {
		g.book[n.NodeName()] = n
		admitted[n.NodeName()] = n.Address
	}
	admitted[g.Self] = g.Address
	g.admitted.Store(&admitted)
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

// tell signs a delta of this node's, keeps it and spreads it.
func (g *Gossip) tell(d Delta, urgent bool, now time.Time) {
	d.Cluster, d.Node = g.Self.Cluster, g.Self.Node
	d.sign(g.SigningKey)
	if !g.ledger.news(&d) {
		return
	}
	if err := g.ledger.put(d, now); err != nil {
		g.Log.Warn("not told by gossip", "error", err)
		return
	}
	g.spread(d, "", urgent)
}

// tellFacts tells what this node says of itself, if that has changed.
func (g *Gossip) tellFacts(now time.Time) {
	value := encode(&g.own)
	if old := g.ledger.get(factsKey(g.Self)); old != nil && string(old.Value) == string(value) {
		return
	}
	g.sequence++
	urgent := urgentFacts(g.facts[g.Self].facts, g.own)
	g.facts[g.Self] = factsOf{cloneFacts(g.own), g.Incarnation}
	g.dirty = true
	g.tell(Delta{Key: factsKey(g.Self), Incarnation: g.Incarnation, Sequence: g.sequence, Value: value}, urgent, now)
}

// urgentFacts tells whether something has changed that backends' being in service follows from.
func urgentFacts(old, now facts) bool {
	return old.Draining != now.Draining || old.Stopping != now.Stopping || old.Speaker != now.Speaker ||
		!maps.Equal(old.Votes, now.Votes) || !maps.EqualFunc(old.Silent, now.Silent, slices.Equal)
}

func cloneFacts(f facts) facts {
	f.Votes, f.RTTs, f.Silent = maps.Clone(f.Votes), maps.Clone(f.RTTs), maps.Clone(f.Silent)
	return f
}

// spread sends a delta on: by gossip in both tiers, and what is urgent at once to some of those that it did not come from.
func (g *Gossip) spread(d Delta, via string, urgent bool) {
	msg := message(msgDeltas, []Delta{d})
	for name, p := range g.pools {
		if !g.share(name)(&d) {
			continue
		}
		g.later(func() {
			p.broadcast(d.Key, msg)
			if urgent && via != name {
				p.push(msg, urgentMembers)
			}
		})
	}
}

// share tells which deltas a pool's members exchange.
func (g *Gossip) share(pool string) func(*Delta) bool {
	return func(d *Delta) bool {
		if pool == clusterPool || d.kind() != kindFacts {
			return true
		}
		f, err := decodeFacts(d)
		return err == nil && f.Shared
	}
}

// state is this node's side of a full exchange.
func (g *Gossip) state(pool string) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return encode(&state{Back: g.back(pool), Digests: g.ledger.digests(g.share(pool))})
}

// back is where this node gets messages of a pool.
func (g *Gossip) back(pool string) string {
	port := g.Port
	if pool == meshPool {
		port = g.MeshPort
	}
	return netip.AddrPortFrom(g.Address, port).String()
}

// handle looks at one event.
func (g *Gossip) handle(e event) {
	switch e.kind {
	case evJoined:
		g.joined(e)
	case evLeft:
		g.left(e)
	case evAcked:
		g.acked(e)
	case evEcho:
		g.detector.answer(e.address, e.nonce, e.at)
		g.rejoin(e.address)
	case evMessage:
		g.message(e)
	case evState:
		var s state
		if err := decode(e.payload, &s); err != nil {
			g.Log.Debug("exchange not understood", "error", err)
			return
		}
		if lacking := g.ledger.lacking(s.Digests, g.share(e.pool)); len(lacking) > 0 {
			g.reply(e.pool, s.Back, message(msgPull, &pull{Back: g.back(e.pool), Signers: lacking}))
		}
	}
}

func (g *Gossip) joined(e event) {
	g.dirty = true
	if e.pool == clusterPool {
		g.detector.joined(e.node, e.at)
		return
	}
	if e.node.Cluster != g.Self.Cluster {
		g.detector.meshMembers(e.node.Cluster, g.meshMembers(e.node.Cluster), false, e.at)
	}
}

func (g *Gossip) left(e event) {
	g.dirty = true
	if e.pool == clusterPool {
		var accused time.Duration
		if p := g.pools[clusterPool]; p != nil && !g.facts[e.node].Stopping {
			accused = p.profile.Accused(p.size() + 1)
		}
		g.detector.gone(e.node, accused, e.at)
		return
	}
	if e.node.Cluster != g.Self.Cluster {
		g.detector.meshMembers(e.node.Cluster, g.meshMembers(e.node.Cluster), true, e.at)
	}
}

// meshMembers counts a cluster's members in the mesh pool.
func (g *Gossip) meshMembers(cluster string) (n int) {
	if p := g.pools[meshPool]; p != nil {
		for name := range p.snapshot() {
			if name.Cluster == cluster {
				n++
			}
		}
	}
	return n
}

func (g *Gossip) acked(e event) {
	if e.pool == meshPool && e.node.Cluster != g.Self.Cluster {
		g.detector.meshAlive(e.node.Cluster, e.rtt, e.at)
	}
	var c coordinateWire
	if len(e.payload) == 0 || decode(e.payload, &c) != nil {
		return
	}
	if _, err := g.coord.Update(e.node.String(), c.coordinate(), max(e.rtt, time.Microsecond)); err != nil {
		g.Log.Debug("coordinate refused", "node", e.node, "error", err)
		return
	}
	g.setAck()
}

func (g *Gossip) setAck() {
	b := encode(wire(g.coord.GetCoordinate()))
	g.ack.Store(&b)
}

func wire(c *coordinate.Coordinate) *coordinateWire {
	return &coordinateWire{Vec: c.Vec, Error: c.Error, Adjustment: c.Adjustment, Height: c.Height}
}

func (c *coordinateWire) coordinate() *coordinate.Coordinate {
	return &coordinate.Coordinate{Vec: c.Vec, Error: c.Error, Adjustment: c.Adjustment, Height: c.Height}
}

// rejoin meets a node of the own cluster whose data path answers although it is no member: its agent may be back.
func (g *Gossip) rejoin(address netip.Addr) {
	p := g.pools[clusterPool]
	for name, n := range g.book {
		if n.Address == address && name.Cluster == g.Self.Cluster && p != nil && !p.has(name) {
			if v := g.stateOf(name); v == identity.NodeSuspect || v == identity.NodeDead {
				g.later(func() { p.join(address, g.Port) })
			}
			return
		}
	}
}

// message looks at a message of another member.
func (g *Gossip) message(e event) {
	if len(e.payload) < 2 {
		return
	}
	var err error
	switch body := e.payload[1:]; e.payload[0] {
	case msgDeltas:
		var deltas []Delta
		if err = decode(body, &deltas); err == nil {
			for _, d := range deltas {
				g.receive(d, e.pool, e.at)
			}
		}
	case msgAsk:
		var a ask
		if err = decode(body, &a); err == nil {
			g.asked(a, e.at)
		}
	case msgObservation:
		var o observation
		if err = decode(body, &o); err == nil {
			g.observed(o, e.at)
		}
	case msgPull:
		var p pull
		if err = decode(body, &p); err == nil {
			g.pulled(e.pool, p)
		}
	}
	if err != nil {
		g.Log.Debug("message not understood", "pool", e.pool, "error", err)
	}
}

func (g *Gossip) asked(a ask, now time.Time) {
	n, known := g.book[a.Subject]
	if _, member := g.book[a.From]; !known || !member || a.Subject == g.Self {
		return
	}
	g.detector.askedAbout(a.Subject, n.Address, a.Back, now)
}

func (g *Gossip) observed(o observation, now time.Time) {
	from, known := g.book[o.From]
	if _, subject := g.book[o.Subject]; !known || !subject || o.Subject.Cluster != g.Self.Cluster {
		return
	}
	if err := o.verify(from.GossipKey); err != nil {
		g.refuse(o.From.Cluster, "observation of "+o.Subject.String(), err)
		return
	}
	g.detector.observed(o, now)
}

// chunk bounds the size of one answer to a pull, in bytes.
const chunk = 256 << 10

func (g *Gossip) pulled(pool string, p pull) {
	var batch []Delta
	size := 0
	flush := func() {
		if len(batch) > 0 {
			g.reply(pool, p.Back, message(msgDeltas, batch))
		}
		batch, size = nil, 0
	}
	for _, d := range g.ledger.of(p.Signers, g.share(pool)) {
		if size += len(d.Value) + 200; size > chunk {
			flush()
			size = len(d.Value) + 200
		}
		batch = append(batch, d)
	}
	flush()
}

// reply sends by TCP, in the background.
func (g *Gossip) reply(pool, address string, msg []byte) {
	p := g.pools[pool]
	if p == nil || !g.knownAddress(address) {
		return
	}
	g.later(func() { p.busy.Go(func() { p.reliable(address, msg) }) })
}

// knownAddress tells whether an address is one of the mesh's nodes', so that nobody has this node talk to strangers.
func (g *Gossip) knownAddress(address string) bool {
	at, err := netip.ParseAddrPort(address)
	if err != nil || at.Port() != g.Port && at.Port() != g.MeshPort {
		return false
	}
	for _, n := range g.book {
		if n.Address == at.Addr() {
			return true
		}
	}
	return false
}

// maxEarly bounds the deltas that wait for their signer's entry.
const maxEarly = 4096

// receive takes a delta from another member, if it is news and its signer may say so, and hands it on.
func (g *Gossip) receive(d Delta, via string, now time.Time) {
	if !g.ledger.news(&d) {
		return
	}
	if err := d.may(); err != nil {
		g.refuse(d.Cluster, d.Key, err)
		return
	}
	signer, known := g.book[d.Signer()]
	if !known {
		if len(g.early) < maxEarly {
			g.early[d.Key] = d
		}
		return
	}
	err := d.verify(signer.GossipKey)
	urgent := d.kind() == kindVerdict
	if f, bad := decodeFacts(&d); d.kind() == kindFacts && bad == nil {
		urgent = urgentFacts(g.facts[d.Signer()].facts, f)
	}
	if err == nil {
		err = g.accept(d, now)
	}
	switch {
	case errors.Is(err, errNoNews):
		return
	case err != nil:
		g.refuse(d.Cluster, d.Key, err)
		return
	}
	if err := g.ledger.put(d, now); err != nil {
		g.refuse(d.Cluster, d.Key, err)
		return
	}
	g.spread(d, via, urgent)
}

// errNoNews says that an entry is known by other ways already, and need not be handed on.
var errNoNews = errors.New("no news")

// accept lets a delta have its effect.
func (g *Gossip) accept(d Delta, now time.Time) error {
	switch d.kind() {
	case kindFacts:
		f, err := decodeFacts(&d)
		if err != nil {
			return err
		}
		return g.acceptFacts(d, f, now)
	case kindVerdict:
		v, err := decodeVerdict(&d)
		if err != nil {
			return err
		}
		return g.acceptVerdict(d, v, now)
	case kindKeyring:
		return g.acceptKeys(d)
	}
	return g.acceptEntry(d)
}

func (g *Gossip) acceptFacts(d Delta, f facts, now time.Time) error {
	if d.Signer() == g.Self {
		return errNoNews // of an earlier life
	}
	if g.facts[d.Signer()].Speaker != f.Speaker {
		g.sampled = nil
	}
	g.facts[d.Signer()] = factsOf{f, d.Incarnation}
	if c := g.complete[d.Signer()]; f.Complete && c.incarnation < d.Incarnation {
		g.complete[d.Signer()] = completed{d.Incarnation, now}
	}
	g.dirty = true
	return nil
}

func (g *Gossip) acceptVerdict(d Delta, v verdict, now time.Time) error {
	subject, _ := d.subject()
	g.verdicts[subject] = v
	delete(g.private, subject)
	g.dirty = true
	if subject == g.Self && v.State != identity.NodeAlive {
		// Whoever says so is told better, after this has been kept.
		g.later(func() { g.refute() })
	}
	return nil
}

// refute says that this node is alive.
func (g *Gossip) refute() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.verdicts[g.Self].State != identity.NodeAlive && !g.own.Stopping {
		g.issue(issue{subject: g.Self, state: identity.NodeAlive}, time.Now())
		g.wakeUp()
	}
}

func (g *Gossip) acceptEntry(d Delta) error {
	e := d.entry()
	known, gone := g.Known(e)
	if d.Signer() == g.Self {
		if !known && !d.Withdrawn {
			// Somebody still holds what this node does not have any more.
			g.tell(Delta{Key: d.Key, Incarnation: d.Incarnation, Sequence: d.Sequence, Withdrawn: true}, false, time.Now())
		}
		return errNoNews
	}
	if gone && !d.Withdrawn && d.Cluster == g.Self.Cluster {
		// Its owner knows better, and says so to everybody.
		g.reply(clusterPool, netip.AddrPortFrom(g.book[d.Signer()].Address, g.Port).String(), message(msgDeltas, []Delta{d}))
	}
	if known || d.Incarnation < g.complete[d.Signer()].incarnation {
		return errNoNews
	}
	g.later(func() { g.Deliver(e) })
	return nil
}

func (g *Gossip) refuse(cluster, key string, reason error) {
	g.later(func() { g.Refused(cluster, "gossip: "+key, reason) })
}

// issue says what the cluster makes of a node, or what this node alone does.
func (g *Gossip) issue(i issue, now time.Time) {
	g.dirty = true
	v := verdict{State: i.state, Reason: i.reason, Since: now.UnixMilli()}
	if len(v.Reason) > maxReason {
		v.Reason = v.Reason[:maxReason]
	}
	if i.alone {
		delete(g.private, i.subject)
		if g.publicState(i.subject) != i.state {
			g.private[i.subject] = v
		}
		return
	}
	delete(g.private, i.subject)
	if g.publicState(i.subject) == i.state {
		return
	}
	g.verdicts[i.subject] = v
	g.tell(newVerdict(i.subject, g.ledger.get(verdictKey(i.subject)), v, now), true, now)
}

// publicState is the verdict on a node; without any, all is well.
func (g *Gossip) publicState(name identity.NodeName) identity.LivenessState {
	return cmp.Or(g.verdicts[name].State, identity.NodeAlive)
}

func (g *Gossip) stateOf(name identity.NodeName) identity.LivenessState {
	return cmp.Or(g.private[name].State, g.publicState(name))
}

// step lets the detector look at who does not answer. It tells whether there is anybody.
func (g *Gossip) step(now time.Time) bool {
	if now.Sub(g.stepped) < stepInterval/2 {
		return true
	}
	g.stepped = now
	w := g.world(now)
	actions := g.detector.tick(w, now)
	for _, action := range actions {
		g.act(action, now)
	}
	return g.detector.busy(w, now)
}

func (g *Gossip) act(action any, now time.Time) {
	switch a := action.(type) {
	case sendEcho:
		g.later(func() {
			if err := g.Echo(a.to, a.nonce); err != nil {
				g.Log.Debug("echo not sent", "to", a.to, "error", err)
			}
		})
	case askFor:
		g.askFor(a)
	case tell:
		a.observation.sign(g.SigningKey)
		msg := message(msgObservation, &a.observation)
		if p := g.poolOf(a.back); p != nil && g.knownAddress(a.back) {
			g.later(func() { p.send(a.back, msg) })
		}
	case issue:
		g.issue(a, now)
		g.Log.Info("node", "subject", a.subject, "state", a.state, "reason", a.reason, "alone", a.alone)
	case voteOn:
		g.own.Votes[a.cluster] = a.state
		delete(g.sampled, a.cluster)
		delete(g.own.Silent, a.cluster)
		if len(a.lost) > 0 {
			g.own.Silent[a.cluster] = a.lost
		}
		g.tellFacts(now)
		g.Log.Info("cluster", "subject", a.cluster, "state", a.state)
	}
}

// poolOf returns the pool that an address is of, by its port.
func (g *Gossip) poolOf(address string) *pool {
	if at, err := netip.ParseAddrPort(address); err == nil && at.Port() == g.MeshPort {
		return g.pools[meshPool]
	}
	return g.pools[clusterPool]
}

func (g *Gossip) askFor(a askFor) {
	name, port := clusterPool, g.Port
	if a.of.Cluster != g.Self.Cluster {
		name, port = meshPool, g.MeshPort
	}
	p, n := g.pools[name], g.book[a.of]
	if p == nil || !n.Address.IsValid() {
		return
	}
	msg := message(msgAsk, &ask{From: g.Self, Subject: a.about, Back: g.back(name)})
	g.later(func() { p.send(netip.AddrPortFrom(n.Address, port).String(), msg) })
}

// world is what the detector needs to know of the rest.
func (g *Gossip) world(now time.Time) world {
	w := world{nodes: map[identity.NodeName]nodeInfo{}, live: g.live()}
	for name, n := range g.book {
		if name.Cluster != g.Self.Cluster || n.GossipKey == nil {
			continue
		}
		f := g.facts[name]
		w.nodes[name] = nodeInfo{
			address: n.Address, verdict: g.publicState(name), since: time.UnixMilli(g.current(name).Since),
			private: g.private[name].State, draining: f.Draining, stopping: f.Stopping,
		}
	}
	if now.Sub(g.started) < startTime {
		w.nodes = nil // who is not in the pool yet may be about to join
	}
	p := g.pools[meshPool]
	if p == nil {
		return w
	}
	for name := range p.snapshot() {
		if name.Cluster != g.Self.Cluster {
			w.helpers = append(w.helpers, name)
		}
	}
	w.samples = make(map[string]map[identity.NodeName]netip.Addr, len(g.Peers))
	for _, cluster := range g.Peers {
		w.samples[cluster] = g.samples(cluster)
	}
	return w
}

func (g *Gossip) current(name identity.NodeName) verdict {
	if v, ok := g.private[name]; ok {
		return v
	}
	return g.verdicts[name]
}

// live are the members of the own cluster's pool, this node included.
func (g *Gossip) live() []identity.NodeName {
	live := []identity.NodeName{g.Self}
	if p := g.pools[clusterPool]; p != nil {
		for name := range p.snapshot() {
			if name != g.Self {
				live = append(live, name)
			}
		}
	}
	return live
}

// sampleSize is how many nodes of another cluster get an echo: its speakers, and some that have another fate; all of them, up to
// a bound, get one if the cluster has no agent left that would notice when one of them dies.
const (
	sampleSize = 5
	sampleAll  = 256
)

// samples are the nodes of another cluster whose data path stands for the whole of it.
func (g *Gossip) samples(cluster string) map[identity.NodeName]netip.Addr {
	if known, ok := g.sampled[cluster]; ok {
		return known
	}
	var speakers, others []identity.NodeName
	for name := range g.book {
		switch {
		case name.Cluster != cluster:
		case g.facts[name].Speaker:
			speakers = append(speakers, name)
		default:
			others = append(others, name)
		}
	}
	out := map[identity.NodeName]netip.Addr{}
	chosen, size := speakersOf(speakers), sampleSize
	if g.own.Votes[cluster] == identity.ReachControlPlaneDown {
		size = sampleAll
	}
	for _, name := range append(chosen, choose("sample", others, size-len(chosen))...) {
		out[name] = g.book[name].Address
	}
	if g.sampled == nil {
		g.sampled = map[string]map[identity.NodeName]netip.Addr{}
	}
	g.sampled[cluster] = out
	return out
}

// chores are what need not be done at once.
func (g *Gossip) chores(now time.Time) {
	g.joinMissing()
	g.changeRole(now)
	g.dropEarlierLives(now)
	g.ledger.retire(now.Add(-newsTime), func(d *Delta) bool { return g.noNews(d, now) })
	for name := range g.verdicts {
		if _, known := g.book[name]; !known {
			delete(g.verdicts, name)
			g.dirty = true
		}
	}
	for name := range g.facts {
		if _, known := g.book[name]; !known && name != g.Self {
			delete(g.facts, name)
			delete(g.complete, name)
		}
	}
	g.measure(now)
}

func (g *Gossip) noNews(d *Delta, now time.Time) bool {
	switch d.kind() {
	case kindKeyring:
		return false
	case kindFacts, kindVerdict:
		subject, _ := d.subject()
		_, known := g.book[subject]
		alive := d.kind() == kindVerdict && d.Sequence == 0 && now.Sub(time.UnixMilli(int64(d.Incarnation))) > aliveTime
		return (!known || alive) && subject != g.Self
	}
	return g.Settled(d.entry())
}

// dropEarlierLives takes away what nodes had before their agents started again and did not tell anew.
func (g *Gossip) dropEarlierLives(now time.Time) {
	for name, c := range g.complete {
		if now.Sub(c.at) < settleTime {
			continue
		}
		for _, d := range g.ledger.of([]identity.NodeName{name}, func(d *Delta) bool {
			return (d.kind() == kindAddress || d.kind() == kindSlice) && d.Incarnation < c.incarnation
		}) {
			g.ledger.drop(d.Key)
			if e := d.entry(); !d.Withdrawn && !g.Settled(e) {
				e.Withdrawn, e.Value = true, nil
				g.later(func() { g.Deliver(e) })
			}
		}
	}
}

// joinMissing meets nodes that should be in the pools and are not: a few at a time, so that many do not meet one.
func (g *Gossip) joinMissing() {
	if p := g.pools[clusterPool]; p != nil {
		g.meet(p, g.Port, g.absent(p, func(n identity.NodeName) bool { return n.Cluster == g.Self.Cluster }), 3)
	}
	p := g.pools[meshPool]
	if p == nil {
		return
	}
	members := p.snapshot()
	for _, cluster := range g.Peers {
		met := slices.ContainsFunc(g.membersOf(members), func(n identity.NodeName) bool { return n.Cluster == cluster })
		if met {
			continue
		}
		candidates := g.absent(p, func(n identity.NodeName) bool { return n.Cluster == cluster })
		slices.SortStableFunc(candidates, func(a, b identity.NodeName) int {
			return cmp.Compare(boolToInt(g.facts[b].Speaker), boolToInt(g.facts[a].Speaker))
		})
		g.meet(p, g.MeshPort, candidates, 3)
	}
	g.meet(p, g.MeshPort, g.absent(p, func(n identity.NodeName) bool { return n.Cluster == g.Self.Cluster && g.facts[n].Speaker }), 2)
}

func (g *Gossip) membersOf(members map[identity.NodeName]member) (names []identity.NodeName) {
	for name := range members {
		names = append(names, name)
	}
	return names
}

func boolToInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// absent are the nodes that are no members, in random order; those that are known to be dead are rarely among them.
func (g *Gossip) absent(p *pool, of func(identity.NodeName) bool) (names []identity.NodeName) {
	members := p.snapshot()
	for name := range g.book {
		_, member := members[name]
		state := g.stateOf(name)
		dead := state == identity.NodeSuspect || state == identity.NodeDead
		if !member && of(name) && name != g.Self && (!dead || rand.IntN(5) == 0) {
			names = append(names, name)
		}
	}
	rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names
}

func (g *Gossip) meet(p *pool, port uint16, names []identity.NodeName, atMost int) {
	for _, name := range names[:min(atMost, len(names))] {
		address := g.book[name].Address
		g.later(func() { p.join(address, port) })
	}
}
