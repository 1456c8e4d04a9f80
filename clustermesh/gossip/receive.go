package gossip

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/serf/coordinate"

	"causeway/identity"
)

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
		lacking := slices.DeleteFunc(g.ledger.lacking(s.Digests, g.share(e.pool)), func(n identity.NodeName) bool { return !g.ours(n.Cluster) })
		if len(lacking) > 0 {
			g.reply(e.pool, s.Back, message(msgPull, &pull{Back: g.back(e.pool), Signers: lacking}))
		}
	}
}

func (g *Gossip) joined(e event) {
	g.dirty = true
	if e.pool == clusterPool {
		g.detector.joined(e.node, e.at)
		g.toldRing()
		return
	}
	if g.isPeer(e.node.Cluster) {
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
		g.toldRing()
		return
	}
	if g.isPeer(e.node.Cluster) {
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
	if !g.ours(e.node.Cluster) {
		return
	}
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
	if _, member := g.book[a.From]; !known || !member || a.Subject == g.Self || !g.knownAddress(a.Back) {
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
	if !g.ours(d.Cluster) || !g.ledger.news(&d) {
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
	err := errors.Join(d.verify(signer.GossipKey), d.mayBeAt(signer.PodCIDRs))
	urgent := err == nil && g.urgent(&d)
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

// urgent tells whether backends' being in service follows from a delta, or the next step of changing keys.
func (g *Gossip) urgent(d *Delta) bool {
	if d.kind() != kindFacts {
		return d.kind() == kindVerdict || d.kind() == kindKeyring
	}
	f, err := decodeFacts(d)
	return err == nil && urgentFacts(g.facts[d.Signer()].facts, f)
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
	// Most facts are round trips, of clusters that are none of this node's: no row follows from them.
	g.dirty = g.dirty || d.Cluster == g.Self.Cluster || urgentFacts(g.facts[d.Signer()].facts, f)
	if d.Cluster == g.Self.Cluster && !slices.Equal(g.facts[d.Signer()].Keys, f.Keys) {
		defer g.toldRing()
	}
	g.facts[d.Signer()] = factsOf{f, d.Incarnation}
	if c := g.complete[d.Signer()]; f.Complete && c.incarnation < d.Incarnation {
		g.complete[d.Signer()] = completed{d.Incarnation, now}
	}
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
	if known || !d.ofCluster() && d.Incarnation < g.complete[d.Signer()].incarnation {
		return errNoNews
	}
	g.later(func() { g.Deliver(e) })
	return nil
}

func (g *Gossip) refuse(cluster, key string, reason error) {
	g.later(func() { g.Refused(cluster, "gossip: "+key, reason) })
}
