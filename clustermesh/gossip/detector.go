package gossip

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"causeway/identity"
)

// detector finds out who is alive, from what memberlist and echoes say. It has no clock, no network and no locks:
// what happens and the time are its input, what to do its output (actions). So whole meshes of detectors run in a test.
type detector struct {
	self   identity.NodeName
	timing Timing
	// targets are the nodes that echoes have been sent to, or that others may ask about, of all clusters.
	targets  map[identity.NodeName]*target
	clusters map[string]*remote
	// nonce of the next echo. It begins anywhere, so that answers to a former agent are not taken for ours.
	nonce uint64
}

// target is a node that is looked at.
type target struct {
	address netip.Addr
	// member of the cluster's pool; otherwise missing since then.
	member  bool
	missing time.Time
	// silent since it has certainly not answered: since the first probe or echo that it did not, not since it last did.
	// Zero: it has answered all. echoes have gone unanswered since.
	silent   time.Time
	echoes   uint32
	answered time.Time
	sent     time.Time
	nonces   [32]sentEcho
	rtt      time.Duration
	// watched until then because somebody asked, who gets to know at these addresses.
	watched time.Time
	askers  map[string]time.Time
	told    time.Time
	// others are the last observations of other nodes; asked when they were last begged for them.
	others map[identity.NodeName]report
	asked  time.Time
}

type sentEcho struct {
	nonce uint64
	at    time.Time
}

// report is an observation with the time when it came.
type report struct {
	observation
	at time.Time
}

// remote is another cluster, as a speaker sees it.
type remote struct {
	// life is the last sign of it, or when looking began; silent as of a target.
	life    time.Time
	heard   bool
	silent  time.Time
	echoes  uint32
	sent    time.Time
	members int
	missing time.Time // since when members is 0
	// examined until then: a member of it has just died.
	examined time.Time
	vote     identity.ReachState
	rtt      time.Duration
	// lost are its nodes that answer no echo while others of it do, and no agent of its own is there to say so.
	lost []string
}

// world is what a detector is told of everything else, at each tick.
type world struct {
	// nodes of the own cluster that its store names.
	nodes map[identity.NodeName]nodeInfo
	// live nodes of the own cluster's pool, this one too.
	live []identity.NodeName
	// helpers are members of the mesh pool of other clusters, who may be asked if nobody of the own one can.
	helpers []identity.NodeName
	// samples of other clusters' nodes for a speaker to send echoes to; nil if this node is no speaker.
	samples map[string]map[identity.NodeName]netip.Addr
}

// nodeInfo is a node with the verdict on it that is in force.
type nodeInfo struct {
	address netip.Addr
	verdict identity.LivenessState
	since   time.Time
	// private is what this node alone says of it, with nobody there to agree; empty if there is no such thing.
	private identity.LivenessState
	// draining, and stopping (its agent's end was announced), are what it has said of itself last.
	draining, stopping bool
}

// Actions of a detector.
type (
	sendEcho struct {
		to    netip.Addr
		nonce uint64
	}
	askFor struct{ of, about identity.NodeName }
	tell   struct {
		back string
		observation
	}
	// issue says that a verdict has changed. Alone: nobody could be asked, so it is this node's private opinion.
	issue struct {
		subject identity.NodeName
		state   identity.LivenessState
		reason  string
		alone   bool
	}
	// voteOn says that a speaker's vote on a cluster has changed.
	voteOn struct {
		cluster string
		state   identity.ReachState
		lost    []string
	}
)

func newDetector(self identity.NodeName, timing Timing) *detector {
	return &detector{
		self: self, timing: timing, targets: map[identity.NodeName]*target{}, clusters: map[string]*remote{}, nonce: rand.Uint64() >> 1,
	}
}

func (d *detector) target(name identity.NodeName, now time.Time) *target {
	t := d.targets[name]
	if t == nil {
		t = &target{missing: now, askers: map[string]time.Time{}, others: map[identity.NodeName]report{}}
		d.targets[name] = t
	}
	return t
}

// joined and gone are what memberlist says of the own cluster's pool.
func (d *detector) joined(name identity.NodeName, now time.Time) {
	t := d.target(name, now)
	t.member = true
	t.alive()
}

// A member that is gone, and did not say so, has been silent for some time (accused) already.
func (d *detector) gone(name identity.NodeName, accused time.Duration, now time.Time) {
	t := d.target(name, now)
	if t.member {
		t.silent, t.echoes = now.Add(-accused), 0
	}
	t.member, t.missing = false, now
}

// alive notes a sign of life.
func (t *target) alive() { t.silent, t.echoes = time.Time{}, 0 }

// silence is how long something has certainly not answered.
func silence(since, now time.Time) time.Duration {
	if since.IsZero() {
		return 0
	}
	return now.Sub(since)
}

// meshMembers is what memberlist says of another cluster's members in the mesh pool; died: one of them has just gone.
func (d *detector) meshMembers(cluster string, members int, died bool, now time.Time) {
	r := d.remote(cluster, now)
	if members == 0 && r.members > 0 {
		r.missing = now
	}
	r.members = members
	if died {
		r.examined = now.Add(5 * time.Second)
	}
}

// meshAlive notes that a node of another cluster has answered a probe.
func (d *detector) meshAlive(cluster string, rtt time.Duration, now time.Time) {
	d.remote(cluster, now).alive(rtt, now)
}

func (d *detector) remote(cluster string, now time.Time) *remote {
	r := d.clusters[cluster]
	if r == nil {
		r = &remote{life: now, missing: now}
		d.clusters[cluster] = r
	}
	return r
}

func (r *remote) alive(rtt time.Duration, now time.Time) {
	r.life, r.silent, r.echoes, r.heard = now, time.Time{}, 0, true
	r.rtt = smooth(r.rtt, rtt)
}

// smooth is the moving average that TCP uses (RFC 6298), from the first measurement on.
func smooth(old, measured time.Duration) time.Duration {
	if old == 0 || measured == 0 {
		return max(old, measured)
	}
	return old + (measured-old)/8
}

// answer notes an echo that came back. Only those that were sent count.
func (d *detector) answer(from netip.Addr, nonce uint64, now time.Time) {
	for name, t := range d.targets {
		if t.address != from {
			continue
		}
		for _, s := range t.nonces {
			if s.nonce != nonce || nonce == 0 {
				continue
			}
			t.alive()
			t.answered = now
			t.rtt = smooth(t.rtt, now.Sub(s.at))
			if name.Cluster != d.self.Cluster {
				d.remote(name.Cluster, now).alive(now.Sub(s.at), now)
			}
			return
		}
	}
}

// askedAbout has a node looked at for somebody else.
func (d *detector) askedAbout(subject identity.NodeName, address netip.Addr, back string, now time.Time) {
	t := d.target(subject, now)
	if now.Sub(t.sent) > time.Second {
		t.echoes = 0 // looking begins now
	}
	t.address, t.watched = address, now.Add(time.Second)
	t.askers[back] = now.Add(time.Second)
}

// observed notes what another node sees.
func (d *detector) observed(o observation, now time.Time) {
	t := d.target(o.Subject, now)
	if old, ok := t.others[o.From]; !ok || o.Stamp > old.Stamp {
		t.others[o.From] = report{o, now}
	}
}

// forget drops all that is known of a cluster, and what its nodes have said of this one's or asked about them.
func (d *detector) forget(cluster string, now time.Time) {
	delete(d.clusters, cluster)
	dropOf(d.targets, cluster)
	for _, t := range d.targets {
		dropOf(t.others, cluster)
		maps.DeleteFunc(t.askers, func(_ string, until time.Time) bool { return now.After(until) })
	}
}

// forgetAfter is how long a node of another cluster is remembered that no echo is sent to any more.
const forgetAfter = time.Minute

// tick returns what is to be done now.
func (d *detector) tick(w world, now time.Time) (actions []any) {
	for _, name := range d.unwell(w) {
		actions = d.node(name, w, now, actions)
	}
	for name, t := range d.targets {
		_, own := w.nodes[name]
		if now.Before(t.watched) {
			actions = d.echo(name, t, d.timing.Urgent, now, actions)
			actions = d.report(name, t, now, actions)
		} else if !own && !t.member && now.Sub(t.sent) > forgetAfter {
			delete(d.targets, name)
		}
	}
	for _, cluster := range slices.Sorted(maps.Keys(w.samples)) {
		actions = d.cluster(cluster, w, now, actions)
	}
	return actions
}

func compareNames(a, b identity.NodeName) int {
	return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Node, b.Node))
}

// unwell returns the nodes that are not members, or not said to be alive, in order.
func (d *detector) unwell(w world) (names []identity.NodeName) {
	for name, info := range w.nodes {
		t := d.targets[name]
		if name != d.self && (t == nil || !t.member || info.verdict != identity.NodeAlive || info.private != "") {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, compareNames)
	return names
}

// busy tells whether there is anybody to look at closely.
func (d *detector) busy(w world, now time.Time) bool {
	for _, t := range d.targets {
		if now.Before(t.watched) {
			return true
		}
	}
	for cluster := range w.samples {
		if r := d.clusters[cluster]; r != nil && (r.examine(now) || r.stale(len(w.samples), now, d.timing)) {
			return true
		}
	}
	return len(d.unwell(w)) > 0
}

// examine tells whether memberlist's probes are not enough to know how the cluster is.
func (r *remote) examine(now time.Time) bool {
	return r.members == 0 || now.Before(r.examined) || r.vote == identity.Unreachable || r.vote == identity.ReachControlPlaneDown
}

// stale tells that no member of the cluster has answered this node itself lately. That memberlist finds them alive says
// nothing of this node's own way to them: others may have asked in its stead. With many clusters it takes long until each
// has had its turn, and so a longer time counts, or speakers would do nothing but send echoes.
func (r *remote) stale(clusters int, now time.Time, timing Timing) bool {
	return now.Sub(r.life) > timing.ClusterStale*time.Duration(max(clusters, staleClusters))/staleClusters
}

// staleClusters is up to how many other clusters Timing.ClusterStale counts as it is.
const staleClusters = 64

// node looks at one node of the own cluster, if this node is one of those that have to.
func (d *detector) node(name identity.NodeName, w world, now time.Time, actions []any) []any {
	info, t := w.nodes[name], d.target(name, now)
	t.address = info.address
	if !slices.Contains(watchersOf(name, w.live), d.self) {
		return actions
	}
	if t.member {
		return append(actions, issue{subject: name, state: identity.NodeAlive})
	}
	actions = d.echo(name, t, d.pace(info.verdict, t), now, actions)
	others, available := d.askOthers(name, t, w, now, &actions)
	in := info.verdict
	switch {
	case info.private != "" && available == 0:
		in = info.private
	case info.private != "":
		actions = append(actions, issue{subject: name, state: in, alone: true}) // an opinion that others can be asked about now
	}
	state, reason := judge(findings{
		Missing: now.Sub(t.missing), Announced: info.stopping, Draining: info.draining,
		Silence: silence(t.silent, now), Echoes: t.echoes, Answers: t.answers(d.timing, now),
		Others: others, Available: available, Now: in, For: now.Sub(info.since),
	}, d.timing)
	if state != in {
		actions = append(actions, issue{subject: name, state: state, reason: reason, alone: available == 0})
	}
	return actions
}

// answers tells whether echoes come back.
func (t *target) answers(timing Timing, now time.Time) bool {
	return !t.answered.IsZero() && t.echoes < timing.Echoes && now.Sub(t.answered) < timing.Silence
}

// pace is the time between two echoes to a node of the own cluster.
func (d *detector) pace(verdict identity.LivenessState, t *target) time.Duration {
	switch {
	case verdict == identity.NodeSuspect, verdict == identity.NodeDead, verdict == identity.NodeLeft:
		return d.timing.Slow
	case verdict == identity.NodeAgentDown && t.echoes < 2:
		return d.timing.Calm
	}
	return d.timing.Urgent
}

// echo sends one if it is due.
func (d *detector) echo(name identity.NodeName, t *target, pace time.Duration, now time.Time, actions []any) []any {
	if now.Sub(t.sent) < pace || !t.address.IsValid() {
		return actions
	}
	d.nonce++
	t.nonces[d.nonce%uint64(len(t.nonces))] = sentEcho{d.nonce, now}
	t.sent = now
	t.count(now)
	if name.Cluster != d.self.Cluster {
		r := d.remote(name.Cluster, now)
		if r.echoes++; r.silent.IsZero() {
			r.silent = now
		}
	}
	return append(actions, sendEcho{t.address, d.nonce})
}

// count notes an echo that has not come back yet.
func (t *target) count(now time.Time) {
	if t.echoes++; t.silent.IsZero() {
		t.silent = now
	}
}

// askOthers begs other nodes to look too while a verdict may be coming, and returns what they said lately.
func (d *detector) askOthers(name identity.NodeName, t *target, w world, now time.Time, actions *[]any) (fresh []otherFinding, available int) {
	candidates := slices.DeleteFunc(slices.Clone(w.live), func(n identity.NodeName) bool { return n == d.self || n == name })
	if len(candidates) == 0 {
		candidates = w.helpers
	}
	asked := watchersOf(name, candidates)
	verdict := w.nodes[name].verdict
	open := verdict != identity.NodeDead && verdict != identity.NodeLeft
	if open && t.echoes > 1 && now.Sub(t.asked) >= d.pace(verdict, t) {
		t.asked = now
		for _, other := range asked {
			*actions = append(*actions, askFor{other, name})
		}
	}
	for from, r := range t.others {
		switch {
		case now.Sub(r.at) > d.timing.Fresh:
			delete(t.others, from)
		case slices.Contains(candidates, from):
			fresh = append(fresh, otherFinding{Answers: r.Answered, Echoes: r.Probes})
		}
	}
	return fresh, len(asked)
}

// report tells those who asked what this node sees.
func (d *detector) report(name identity.NodeName, t *target, now time.Time, actions []any) []any {
	if now.Sub(t.told) < d.timing.Urgent {
		return actions
	}
	t.told = now
	for back, until := range t.askers {
		if now.After(until) {
			delete(t.askers, back)
			continue
		}
		actions = append(actions, tell{back, observation{
			From: d.self, Subject: name, Answered: t.answers(d.timing, now), Probes: t.echoes, Stamp: now.UnixNano(),
		}})
	}
	return actions
}

// cluster looks at another cluster, as its own cluster's speaker. While its members are all well, memberlist's probes are enough.
func (d *detector) cluster(name string, w world, now time.Time, actions []any) []any {
	r, samples := d.remote(name, now), w.samples[name]
	examine, stale := r.examine(now), r.stale(len(w.samples), now, d.timing)
	pace := d.timing.Slow / 2
	if now.Before(r.examined) {
		pace = d.timing.Urgent
	}
	if (examine || stale) && now.Sub(r.sent) >= pace {
		r.sent = now
		asked := slices.SortedFunc(maps.Keys(samples), compareNames)
		if !examine && r.echoes == 0 && len(asked) > 0 {
			asked = asked[rand.IntN(len(asked)):][:1] // most likely it is just not its turn to be probed
		}
		for _, node := range asked {
			t := d.target(node, now)
			t.address = samples[node]
			actions = d.echo(node, t, 0, now, actions)
		}
	}
	if len(samples) == 0 {
		return actions // nothing is known of it that could be in service
	}
	state := judgeCluster(reachability{
		Members: r.members, Missing: now.Sub(r.missing), Silence: silence(r.silent, now), Echoes: r.echoes, Heard: r.heard, Now: r.vote,
	}, d.timing)
	if !examine && !stale && r.members > 0 && r.heard {
		state = identity.Reachable
	}
	lost := d.lostIn(samples, state, now)
	if state != "" && (state != r.vote || !slices.Equal(lost, r.lost)) {
		r.vote, r.lost = state, lost
		actions = append(actions, voteOn{name, state, lost})
	}
	return actions
}

// lostIn returns the nodes of a cluster without agents that do not answer: nobody but its peers can notice.
func (d *detector) lostIn(samples map[identity.NodeName]netip.Addr, state identity.ReachState, now time.Time) (lost []string) {
	if state != identity.ReachControlPlaneDown {
		return nil
	}
	for name := range samples {
		if t := d.targets[name]; t != nil && silence(t.silent, now) >= d.timing.ClusterSilence && t.echoes >= d.timing.Echoes {
			lost = append(lost, name.Node)
		}
	}
	slices.Sort(lost)
	return lost
}

// suspicion says in words what is odd about a node, for status.
func (d *detector) suspicion(name identity.NodeName, now time.Time) string {
	t := d.targets[name]
	if t == nil || t.member || name.Cluster != d.self.Cluster || t.sent.Before(now.Add(-2*d.timing.Slow)) {
		return ""
	}
	if t.answers(d.timing, now) {
		return fmt.Sprintf("not in the pool for %.1f s; echoes come back", now.Sub(t.missing).Seconds())
	}
	return fmt.Sprintf("not in the pool for %.1f s; the last %d echoes of this node's have not come back", now.Sub(t.missing).Seconds(), t.echoes)
}
