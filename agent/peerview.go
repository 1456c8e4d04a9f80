package agent

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/clustermesh/gossip"
	"causeway/clustermesh/peering"
	"causeway/identity"
	"causeway/identity/pki"
)

// maxSkew is how far apart the clocks of two clusters may be: certificates and tokens are judged by them.
const maxSkew = 30 * time.Second

// peerView shows how the connections with peers are, from what the parts know.
type peerView struct {
	channels *channels
	life     *life
	refusals *clustermesh.Refusals
	now      func() time.Time
	quota    int
	// tunnelPorts says by which UDP ports packets come to a node.
	tunnelPorts func(identity.Node) string
	mesh        uint16 // gossip's port
	ask         func(ctx context.Context, peer peering.Peer) (peering.Report, error)

	// ctx ends with the agent, and asking is what goes on in the background then.
	ctx    context.Context
	asking sync.WaitGroup

	mu      sync.Mutex
	reports map[string]*report
	ended   bool // none is asked any more
}

// all shows every peer, those that have left too.
func (v *peerView) all() []api.Peer {
	out := []api.Peer{}
	all := v.channels.ofPeers()
	v.refresh(all)
	overview := v.life.gossip.Overview()
	for _, c := range all {
		out = append(out, v.one(c, overview, true))
	}
	for _, p := range v.channels.leftPeers() {
		out = append(out, leftPeer(p))
	}
	slices.SortFunc(out, func(a, b api.Peer) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// leftPeer shows a peer that has disconnected this cluster.
func leftPeer(p peering.Peer) api.Peer {
	return api.Peer{
		Name: p.Name(), ID: p.Cluster.ID, State: string(peering.Left), Since: p.Since, StoreEndpoints: p.StoreEndpoints, Endpoints: p.Endpoints,
		Why:     []string{fmt.Sprintf("peer left: cluster %s has disconnected this one; forget it with: clustermesh disconnect %s", p.Name(), p.Name())},
		SyncLag: -1, Out: api.Path{Last: -1}, In: api.Path{Last: -1}, Version: p.Cluster.Version,
	}
}

// one shows a peer. The order of the reasons is that in which things depend on each other. With theirs, what the peer says counts too.
func (v *peerView) one(c *channel, overview gossip.Overview, theirs bool) api.Peer {
	record, store, follower := c.peer(), c.store.Status(), c.follower.State()
	p := api.Peer{
		Name: c.cluster, ID: c.id, Since: record.Since, Why: []string{}, StoreEndpoints: record.StoreEndpoints, Endpoints: record.Endpoints,
		PeerCertExpires: record.UserExpires, Entries: follower.Accepted, Quota: v.quota, Excess: store.Excess, Refused: v.refusals.Total(c.cluster),
		Version: record.Cluster.Version, SyncLag: -1,
	}
	if follower.Info != nil {
		p.Version = follower.Info.Version
	}
	if !follower.Heartbeat.IsZero() {
		p.SyncLag = max(0, time.Since(follower.Heartbeat).Milliseconds())
	}
	last := v.lastReport(record)
	skew := follower.Ahead
	if !last.stale() {
		skew = last.ahead
	}
	p.ClockSkew = skew.Milliseconds()
	problem := func(text string) {
		if text != "" {
			p.Why = append(p.Why, text)
		}
	}
	problem(v.clockProblem(c.cluster, skew))
	cert := v.certProblem(record, &p)
	problem(cert)
	control := cmp.Or(cert, v.storeProblem(c))
	p.Control = api.Plane{OK: control == "", Detail: cmp.Or(control, fmt.Sprintf("store in step at revision %d", store.Revision))}
	if cert == "" {
		problem(control)
	}
	if store.Excess > 0 {
		problem(fmt.Sprintf("its store has %d entries more than the quota of %d that this node accepts; they are left out: raise peering.quota, or ask there what fills it", store.Excess, v.quota))
	}
	p.Gossip = v.gossipPlane(c.cluster, overview)
	p.Out = v.out(c, p.Gossip.OK)
	problem(p.Out.Problem)
	if !p.Gossip.OK {
		problem(p.Gossip.Detail)
	}
	if theirs {
		p.In = v.in(c, last)
		problem(p.In.Problem)
	}
	p.Nodes = len(overviewNodes(overview, c.cluster))
	switch {
	case record.State == peering.Joining:
		p.State = string(peering.Joining)
		if len(p.Why) == 0 {
			problem("it is being joined: packets have not been seen to go both ways yet")
		}
	case len(p.Why) > 0:
		p.State = "not connected"
	default:
		p.State = string(peering.Connected)
	}
	return p
}

func (v *peerView) clockProblem(cluster string, skew time.Duration) string {
	if skew.Abs() <= maxSkew {
		return ""
	}
	which := "ahead of"
	if skew < 0 {
		which = "behind"
	}
	return fmt.Sprintf("clock: that of cluster %s is %s %s this node's; one of them is wrong: set it, for instance by NTP", cluster, skew.Abs().Round(time.Second), which)
}

// certProblem says what is wrong with this cluster's certificate at a peer, or the peer's here.
func (v *peerView) certProblem(record peering.Peer, p *api.Peer) string {
	cert, err := pki.ParseCert([]byte(record.Cert))
	if err != nil {
		return "the certificate for its store cannot be read: " + err.Error()
	}
	p.CertExpires = cert.NotAfter
	now := v.now()
	if problem := expired(cert, now); problem != "" {
		return fmt.Sprintf("certificate: this cluster's for cluster %s %s; join again with a token of it", record.Name(), problem)
	}
	if !record.UserExpires.IsZero() && now.After(record.UserExpires) {
		return fmt.Sprintf("certificate: cluster %s's for this cluster expired %s ago, and it has not asked for another one; join again with a token", record.Name(), now.Sub(record.UserExpires).Round(time.Second))
	}
	return ""
}

// expired says in words that a certificate is not valid now; empty if it is.
func expired(cert *x509.Certificate, now time.Time) string {
	switch {
	case now.After(cert.NotAfter):
		return fmt.Sprintf("expired %s ago", now.Sub(cert.NotAfter).Round(time.Second))
	case now.Before(cert.NotBefore):
		return fmt.Sprintf("is not valid before %s; by this node's clock it is %s", cert.NotBefore.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return ""
}

// storeProblem says what is wrong with reading a peer's store.
func (v *peerView) storeProblem(c *channel) string {
	_, problems := c.state(v.refusals, c.peer().Since)
	return strings.Join(problems, "; ")
}

// gossipPlane says how gossip with a peer is. A node that is no speaker knows it from those of its cluster.
func (v *peerView) gossipPlane(cluster string, o gossip.Overview) api.Plane {
	speakers := o.Speakers[cluster]
	var members, blocked []string
	var rtt time.Duration
	speaker := false
	for _, pool := range o.Pools {
		for _, m := range pool.Members {
			if pool.Name == "mesh" && m.Node.Cluster == cluster {
				members = append(members, m.Node.Node)
				if m.UDPBlocked {
					blocked = append(blocked, m.Node.Node)
				} else if m.RTT > 0 && (rtt == 0 || m.RTT < rtt) {
					rtt = m.RTT
				}
			}
		}
		speaker = speaker || pool.Name == "mesh"
	}
	var reach identity.Reach
	for _, r := range o.Clusters {
		if r.Cluster == cluster {
			reach = r
		}
	}
	switch {
	case reach.State == identity.Unreachable || reach.State == identity.ReachControlPlaneDown:
		return api.Plane{Detail: fmt.Sprintf("gossip: %s is %s: %s", cluster, reach.State, cmp.Or(reach.Reason, "nothing of it answers"))}
	case speaker && len(members) == 0:
		return api.Plane{Detail: fmt.Sprintf("gossip: no node of %s is in the mesh's pool; is port %d open between the clusters, UDP and TCP?", cluster, v.mesh)}
	case len(members) > 0 && len(blocked) == len(members):
		return api.Plane{Detail: fmt.Sprintf("gossip: the nodes of %s answer over TCP alone; UDP port %d is blocked between the clusters", cluster, v.mesh)}
	case speaker:
		return api.Plane{OK: true, Detail: fmt.Sprintf("%d speakers, round trip %s", len(members), rtt.Round(10*time.Microsecond))}
	case reach.State == identity.Reachable:
		return api.Plane{OK: true, Detail: fmt.Sprintf("%d speakers, as this cluster's say", len(speakers))}
	}
	return api.Plane{OK: true, Detail: "not looked at yet"}
}

// newsTime is how long a change that is no problem is told as new.
const newsTime = 10 * time.Minute

// out says how the data path to a peer is.
func (v *peerView) out(c *channel, gossips bool) api.Path {
	s, now := c.link.snapshot(), time.Now()
	path := api.Path{Known: !s.last.IsZero() || s.silent(now), Last: -1, RTT: milliseconds(s.rtt), Loss: s.loss(), MTU: s.mtu, From: v.life.self.String()}
	if !s.last.IsZero() {
		path.Last = max(0, now.Sub(s.last).Milliseconds())
	}
	switch {
	case s.tried.IsZero() && s.silent(now):
		path.Problem = "data path: no node of the peer is known that could be asked"
	case s.silent(now):
		path.Problem = fmt.Sprintf("data path: no packet comes back through the tunnel from %s (%s); %s must be open between the nodes of both clusters, in both directions",
			s.node.NodeName(), sinceText(s.last, now), v.tunnelPorts(s.node))
		if gossips {
			path.Problem += ", and something drops it: other packets get through"
		}
	case s.tooNarrow:
		path.Problem = fmt.Sprintf("path MTU: packets of %d bytes do not get through to %s, small ones do; raise the MTU of the way between the clusters", smallestMTU, s.node.NodeName())
	default:
		path.OK = path.Known
	}
	path.Note = narrowNote(s, c.link.links.mtu)
	path.Narrowed = s.limit > 0
	path.NoteIsNew = path.Note != "" && now.Sub(s.changed) < newsTime
	return path
}

// minMTUIPv6 is what IPv6 needs of every path, in bytes (RFC 8200, section 5).
const minMTUIPv6 = 1280

// narrowNote says what packets toward a peer are kept to, and since when that is so; nothing if it was never otherwise.
func narrowNote(s linkState, full int) string {
	switch {
	case s.limit > 0:
		note := fmt.Sprintf("path MTU: packets toward the peer are kept to %d bytes, as larger ones, of up to %d, do not get through (until %s: %d)",
			s.limit, full, s.changed.UTC().Format(time.TimeOnly), s.before)
		if s.limit < minMTUIPv6 {
			note += fmt.Sprintf("; IPv6 needs %d", minMTUIPv6)
		}
		return note
	case !s.changed.IsZero() && time.Since(s.changed) < newsTime:
		return fmt.Sprintf("path MTU: packets of full size, %d bytes, get through again (until %s: %d)", full, s.changed.UTC().Format(time.TimeOnly), s.before)
	}
	return ""
}

func sinceText(t, now time.Time) string {
	if t.IsZero() {
		return "none ever did"
	}
	return "the last one " + now.Sub(t).Round(100*time.Millisecond).String() + " ago"
}

// in says how the data path from a peer is, as that has said.
func (v *peerView) in(c *channel, last report) api.Path {
	path := api.Path{Last: -1}
	switch {
	case last.stale() && last.err == nil && last.heard.IsZero():
		return path
	case last.stale() && last.err == nil:
		path.Problem = fmt.Sprintf("control plane: no agent of %s has answered on its peering API for %s, so how it sees the link is not known", c.cluster, time.Since(last.heard).Round(time.Second))
		return path
	case last.stale() && errors.Is(last.err, peering.ErrLeft):
		path.Problem = fmt.Sprintf("peer left: cluster %s has disconnected this one", c.cluster)
		return path
	case last.stale():
		path.Problem = fmt.Sprintf("control plane: no agent of %s answers on its peering API (%v), so how it sees the link is not known", c.cluster, last.err)
		return path
	}
	w := last.word
	if w.RTT == 0 && len(w.Problems) == 0 {
		return path // it has only begun to look
	}
	path.Known, path.RTT, path.Loss, path.MTU, path.From = true, milliseconds(w.RTT), w.Loss, w.MTU, w.Node.String()
	if w.RTT > 0 {
		path.Last = (w.Last + time.Since(last.heard)).Milliseconds()
	}
	path.OK = len(w.Problems) == 0
	if !path.OK {
		path.Problem = fmt.Sprintf("as %s says: %s", w.Node, w.Problems[0])
	}
	return path
}

func overviewNodes(o gossip.Overview, cluster string) (nodes []string) {
	for _, n := range o.Nodes {
		if n.Cluster == cluster {
			nodes = append(nodes, n.Node)
		}
	}
	return nodes
}
