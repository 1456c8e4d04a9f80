package gossip

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"causeway/identity"
)

// review derives the rows from all that is known, notes what has changed, and tells whether anything has.
func (g *Gossip) review(now time.Time) bool {
	view := g.view()
	nodes, clusters := Quarantine(view)
	rows := map[identity.NodeName]identity.Liveness{}
	for name := range g.book {
		rows[name] = g.row(name, nodes[name], clusters[name.Cluster])
	}
	reaches := map[string]identity.Reach{}
	for _, cluster := range append([]string{g.Self.Cluster}, g.Peers...) {
		reaches[cluster] = g.reach(cluster, view.Votes[cluster], clusters[cluster], now)
	}
	for name, row := range rows {
		old, had := g.rows[name]
		if from := cmp.Or(old.State, identity.NodeAlive); from != row.State || had && old.Draining != row.Draining {
			g.note(Transition{At: now, Subject: name.String(), From: described(old), To: described(row), Reason: row.Reason, By: row.By})
		}
	}
	for cluster, r := range reaches {
		if old := g.reaches[cluster]; old.State != r.State && old.State != "" {
			g.note(Transition{At: now, Subject: cluster, From: string(old.State), To: string(r.State), Reason: r.Reason})
		}
	}
	changed := g.forgot || !reflect.DeepEqual(rows, g.rows) || !reflect.DeepEqual(reaches, g.reaches)
	g.rows, g.reaches, g.forgot = rows, reaches, false
	return changed
}

// described is a state for people.
func described(l identity.Liveness) string {
	state := string(cmp.Or(l.State, identity.NodeAlive))
	if l.Draining {
		state += ", draining"
	}
	return state
}

func (g *Gossip) note(t Transition) {
	g.history = append([]Transition{t}, g.history...)
	g.history = g.history[:min(len(g.history), maxTransitions)]
}

// view is what the quarantine follows from.
func (g *Gossip) view() View {
	v := View{Self: g.Self, Nodes: map[identity.NodeName]NodeView{}, Votes: map[string][]identity.ReachState{}, Silent: map[identity.NodeName]int{}}
	for name := range g.book {
		v.Nodes[name] = NodeView{State: g.stateOf(name), Draining: g.facts[name].Draining, Known: true}
	}
	for _, name := range g.live() {
		f := g.facts[name]
		if name == g.Self {
			f.facts = g.own
		}
		if !f.Speaker {
			continue
		}
		for cluster, vote := range f.Votes {
			v.Votes[cluster] = append(v.Votes[cluster], vote)
		}
		for cluster, nodes := range f.Silent {
			for _, node := range nodes {
				v.Silent[identity.NodeName{Cluster: cluster, Node: node}]++
			}
		}
	}
	return v
}

func (g *Gossip) row(name identity.NodeName, quarantined, cluster string) identity.Liveness {
	v, f := g.current(name), g.facts[name]
	row := identity.Liveness{
		Cluster: name.Cluster, Node: name.Node, State: g.stateOf(name), Reason: v.Reason,
		Draining: f.Draining, Quarantined: quarantined != "" || cluster != "",
	}
	if v.Since != 0 {
		row.Since = time.UnixMilli(v.Since)
	}
	if d := g.ledger.get(verdictKey(name)); d != nil {
		row.By = d.Signer().String()
	}
	if _, private := g.private[name]; private {
		row.By = g.Self.String()
	}
	if quarantined != "" && !(row.State == identity.NodeSuspect || row.State == identity.NodeDead) {
		row.Reason = quarantined
	}
	if cluster != "" {
		row.Reason = cmp.Or(row.Reason, "cluster "+name.Cluster+" is unreachable: "+cluster)
	}
	return row
}

// holdTime is how long a cluster that was reachable stays so without a vote: speakers that begin anew together have not looked yet, and
// what they said before is replaced one after the other.
const holdTime = 3 * time.Second

// hold returns the state of a cluster that was reachable, and that no speaker has a vote on now.
func (g *Gossip) hold(cluster string, now time.Time) identity.ReachState {
	since, held := g.unvoted[cluster]
	if !held {
		since = now
		g.unvoted[cluster] = now
	}
	if now.Sub(since) < holdTime {
		return identity.Reachable
	}
	delete(g.unvoted, cluster)
	return identity.ReachUnknown
}

func (g *Gossip) reach(cluster string, votes []identity.ReachState, quarantined string, now time.Time) identity.Reach {
	r := identity.Reach{Cluster: cluster, Quarantined: quarantined != "", Reason: quarantined}
	r.State, _ = Reach(votes)
	switch {
	case cluster == g.Self.Cluster:
		r.State = identity.ReachSelf
	case r.State == identity.ReachControlPlaneDown:
		r.Reason = "none of its agents is in the mesh's pool; its data path answers"
	}
	if old := g.reaches[cluster]; r.State == identity.ReachUnknown && old.State == identity.Reachable {
		r.State = g.hold(cluster, now)
	} else {
		delete(g.unvoted, cluster)
	}
	r.Since = now
	if old := g.reaches[cluster]; old.State == r.State {
		r.Since = old.Since
	}
	for _, name := range g.live() {
		f := g.facts[name]
		vote, voted := f.Votes[cluster]
		if !f.Speaker || !voted {
			continue
		}
		if r.Votes == nil {
			r.Votes = map[string]bool{}
		}
		r.Votes[name.String()] = vote != identity.Unreachable
		if us := f.RTTs[cluster]; us > 0 && (r.RTT == 0 || float64(us)/1000 < r.RTT) {
			r.RTT = float64(us) / 1000
		}
	}
	return r
}

// snapshot returns the rows in order.
func (g *Gossip) snapshot() (rows []identity.Liveness, reaches []identity.Reach) {
	for _, name := range slices.SortedFunc(maps.Keys(g.rows), compareNames) {
		rows = append(rows, g.rows[name])
	}
	for _, cluster := range slices.Sorted(maps.Keys(g.reaches)) {
		reaches = append(reaches, g.reaches[cluster])
	}
	return rows, reaches
}

// Overview is all that there is to see.
type Overview struct {
	Pools    []PoolView
	Nodes    []NodeOverview
	Clusters []identity.Reach
	// Speakers of each cluster, as they say of themselves, by name of the node.
	Speakers map[string][]string
	// Blocked are, by cluster, the own cluster's speakers that none of that cluster's members in the mesh pool answers over UDP. Those that
	// are in Clusters' Votes and not here see it over UDP.
	Blocked     map[string][]string
	Transitions []Transition
	// Keys of the ring, by fingerprint, the one that encrypts first; and the nodes that hold and use each, of Live.
	Keys []KeyView
	// Problems, one sentence each.
	Problems []string
}

// PoolView is a pool that this node is in.
type PoolView struct {
	Name, Label string
	Profile     Profile
	Health      int
	Members     []MemberView
}

// MemberView is a member of a pool.
type MemberView struct {
	Node       identity.NodeName
	Address    string
	RTT        time.Duration
	LastAck    time.Time
	UDPBlocked bool
}

// NodeOverview is a node's row, with what else is known of it.
type NodeOverview struct {
	identity.Liveness
	Address   string
	Member    bool
	Speaker   bool
	RTT       time.Duration
	Suspicion string
	Key       string
}

// KeyView is a key of the ring.
type KeyView struct {
	Fingerprint      string
	Primary          bool
	Held, Used, Live int
}

// Overview returns what is known now.
func (g *Gossip) Overview() Overview {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	o := Overview{Speakers: map[string][]string{}, Transitions: slices.Clone(g.history)}
	for _, name := range []string{clusterPool, meshPool} {
		if p := g.pools[name]; p != nil {
			view, problems := p.view(now)
			o.Pools = append(o.Pools, view)
			o.Problems = append(o.Problems, problems...)
		}
	}
	for _, what := range slices.Sorted(maps.Keys(g.problem)) {
		o.Problems = append(o.Problems, "gossip: "+g.problem[what])
	}
	rows, reaches := g.snapshot()
	o.Clusters = reaches
	members := g.allMembers()
	for _, row := range rows {
		node := g.overviewOf(row, members, now)
		o.Nodes = append(o.Nodes, node)
		if node.Speaker {
			o.Speakers[row.Cluster] = append(o.Speakers[row.Cluster], row.Node)
		}
	}
	o.Blocked = g.blockedBy()
	for _, cluster := range slices.Sorted(maps.Keys(o.Blocked)) {
		// A speaker says itself which members do not answer it.
		if others := slices.DeleteFunc(slices.Clone(o.Blocked[cluster]), func(n string) bool { return n == g.Self.Node }); len(others) > 0 {
			o.Problems = append(o.Problems, fmt.Sprintf("gossip with cluster %s over UDP does not pass, says %s, only TCP does: let UDP port %d through, both ways",
				cluster, strings.Join(others, ", "), g.MeshPort))
		}
	}
	o.Keys = g.keyViews()
	o.Problems = append(o.Problems, g.lifeProblems(rows, reaches)...)
	return o
}

func (p *pool) view(now time.Time) (PoolView, []string) {
	v := PoolView{Name: p.name, Label: p.label, Profile: p.profile, Health: p.list.GetHealthScore()}
	members, blocked := p.snapshot(), p.udpBlocked(now)
	var problems []string
	for _, name := range slices.SortedFunc(maps.Keys(members), compareNames) {
		m := members[name]
		is := slices.Contains(blocked, name)
		v.Members = append(v.Members, MemberView{Node: name, Address: m.address, RTT: m.rtt, LastAck: m.lastAck, UDPBlocked: is})
		if is {
			problems = append(problems, fmt.Sprintf("gossip with %s over UDP does not pass, only TCP does: let UDP through to %s, and back", name, m.address))
		}
	}
	return v, problems
}

// allMembers are those of all pools that this node is in.
func (g *Gossip) allMembers() map[identity.NodeName]member {
	all := map[identity.NodeName]member{}
	for _, p := range g.pools {
		for name, m := range p.snapshot() {
			if old, known := all[name]; !known || old.rtt == 0 {
				all[name] = m
			}
		}
	}
	return all
}

func (g *Gossip) overviewOf(row identity.Liveness, members map[identity.NodeName]member, now time.Time) NodeOverview {
	name := row.NodeName()
	f := g.facts[name]
	o := NodeOverview{
		Liveness: row, Address: g.book[name].Address.String(), Speaker: f.Speaker,
		Suspicion: g.detector.suspicion(name, now), RTT: g.rtt(name, members),
	}
	if len(f.Keys) > 0 {
		o.Key = f.Keys[0]
	}
	_, o.Member = members[name]
	return o
}

// rtt to a node, as measured by probes or echoes, or estimated from coordinates.
func (g *Gossip) rtt(name identity.NodeName, members map[identity.NodeName]member) time.Duration {
	if name == g.Self {
		return 0
	}
	if m := members[name]; m.rtt > 0 {
		return m.rtt
	}
	if t := g.detector.targets[name]; t != nil && t.rtt > 0 {
		return t.rtt
	}
	if c := g.facts[name].Coordinate; c != nil && c.coordinate().IsValid() {
		return g.coord.DistanceTo(c.coordinate())
	}
	return 0
}

// blockedBy gathers what the own cluster's speakers say of the way to others over UDP.
func (g *Gossip) blockedBy() map[string][]string {
	by := map[string][]string{}
	for _, name := range g.live() {
		f := g.facts[name]
		if !f.Speaker {
			continue
		}
		for _, cluster := range f.Blocked {
			if g.isPeer(cluster) {
				by[cluster] = append(by[cluster], name.Node)
			}
		}
	}
	for _, speakers := range by {
		slices.Sort(speakers)
	}
	return by
}

func (g *Gossip) keyViews() (keys []KeyView) {
	live := g.live()
	for i, fp := range fingerprints(g.keys) {
		v := KeyView{Fingerprint: fp, Primary: i == 0, Live: len(live)}
		for _, name := range live {
			f := g.facts[name]
			if slices.Contains(f.Keys, fp) {
				v.Held++
			}
			if len(f.Keys) > 0 && f.Keys[0] == fp {
				v.Used++
			}
		}
		keys = append(keys, v)
	}
	return keys
}

// lifeProblems says which nodes and clusters are not as they should be.
func (g *Gossip) lifeProblems(rows []identity.Liveness, reaches []identity.Reach) (problems []string) {
	for _, r := range reaches {
		switch r.State {
		case identity.Unreachable:
			problems = append(problems, fmt.Sprintf("cluster %s is unreachable: %s; its backends get no new connections", r.Cluster, r.Reason))
		case identity.ReachControlPlaneDown:
			problems = append(problems, fmt.Sprintf("cluster %s: %s, so its backends stay in service", r.Cluster, r.Reason))
		}
	}
	for _, row := range rows {
		switch row.State {
		case identity.NodeSuspect, identity.NodeDead:
			problems = append(problems, fmt.Sprintf("node %s is %s: %s; its backends get no new connections", row.NodeName(), row.State, row.Reason))
		case identity.NodeAgentDown:
			problems = append(problems, fmt.Sprintf("node %s: agent-down, %s, so its backends stay in service", row.NodeName(), row.Reason))
		}
	}
	return problems
}
