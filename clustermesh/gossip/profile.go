// Package gossip says who is alive, and carries news between nodes without any store: memberlist's pools of a
// cluster and of the mesh, the verdicts on nodes that do not answer, and the deltas of what nodes own.
package gossip

import (
	"math"
	"time"

	"github.com/hashicorp/memberlist"
)

// Profile is how eagerly a pool looks for its dead. Every field trades how soon a dead node is noticed against
// traffic, and against taking a slow one for dead.
type Profile struct {
	// ProbeInterval is the time between two probes of one member each. A member that is killed is first missed by
	// whoever probes it next; all members probe.
	ProbeInterval time.Duration
	// ProbeTimeout is how long a direct answer may take; what is left of the interval is for indirect ones and TCP. It
	// must be well above the round trip, or every probe is an indirect one; and below half of the interval, or others' word that
	// they cannot reach a member either comes too late, and whoever asked doubts itself instead (Lifeguard).
	ProbeTimeout time.Duration
	// SuspicionMult times log10 of the members (at least 1) times the interval is what a member has to refute a suspicion.
	SuspicionMult int
	// GossipInterval is the time between two rounds of news, to GossipNodes members each. A member sends news on for
	// RetransmitMult times the digits of the members' number rounds; too few, and some member never hears of it.
	GossipInterval time.Duration
	GossipNodes    int
	RetransmitMult int
	// PushPullInterval is the time between two full exchanges with one member, which find what news has missed.
	PushPullInterval time.Duration
}

// ClusterProfile is for the nodes of one cluster. A killed member is missed after 0.1 to 0.5 s, and after 0.2 s (10 members) to
// 0.7 s (5,000) more without a refutation the data path is asked (detector.go): memberlist's death is an accusation here, not a
// verdict. So its probes may be eager: a wrong accusation costs a few echoes.
func ClusterProfile() Profile {
	return Profile{
		ProbeInterval: 100 * time.Millisecond, ProbeTimeout: 40 * time.Millisecond, SuspicionMult: 2,
		GossipInterval: 50 * time.Millisecond, GossipNodes: 3, RetransmitMult: 8, PushPullInterval: 10 * time.Second,
	}
}

// Accused is how long a member has been silent at least when memberlist gives it up, in a pool of so many: a probe's
// interval and the time that it had to refute, less what timers may be off.
func (p Profile) Accused(members int) time.Duration {
	refute := float64(p.SuspicionMult) * max(1, math.Log10(float64(max(members, 1)))) * float64(p.ProbeInterval)
	return p.ProbeInterval + time.Duration(refute) - 50*time.Millisecond
}

// meshTimeouts are the probe timeouts that a mesh pool may have: it takes the smallest that is at least three round trips.
var meshTimeouts = []time.Duration{80 * time.Millisecond, 160 * time.Millisecond, 320 * time.Millisecond, 640 * time.Millisecond, 1280 * time.Millisecond}

// MeshProfile is for the speakers of all clusters, with the round trip to the farthest of them.
func MeshProfile(rtt time.Duration) Profile {
	timeout := meshTimeouts[len(meshTimeouts)-1]
	for _, t := range meshTimeouts {
		if t >= 3*rtt {
			timeout = t
			break
		}
	}
	return Profile{
		ProbeInterval: timeout * 5 / 2, ProbeTimeout: timeout, SuspicionMult: 2,
		GossipInterval: 50 * time.Millisecond, GossipNodes: 3, RetransmitMult: 8, PushPullInterval: 10 * time.Second,
	}
}

// Apply sets what of a memberlist configuration the profile is about. The rest is memberlist's LAN default,
// with Lifeguard's awareness on.
func (p Profile) Apply(c *memberlist.Config) {
	c.ProbeInterval, c.ProbeTimeout, c.SuspicionMult = p.ProbeInterval, p.ProbeTimeout, p.SuspicionMult
	c.GossipInterval, c.GossipNodes, c.PushPullInterval = p.GossipInterval, p.GossipNodes, p.PushPullInterval
	c.RetransmitMult = p.RetransmitMult
	c.TCPTimeout = max(2*time.Second, 10*p.ProbeTimeout)
	// Compressing packets of a hundred bytes takes most of the time of sending them, and gains nothing.
	c.EnableCompression = false
}
