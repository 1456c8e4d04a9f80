package gossip

import (
	"fmt"

	"causeway/identity"
)

// NodeView is what is known of one node's life: by gossip (State and Draining), and by the store (Known).
type NodeView struct {
	State    identity.LivenessState
	Draining bool
	// Known: the node has an entry in its cluster's store.
	Known bool
}

// View is all that the quarantine follows from.
type View struct {
	// Self is the node that looks; it never quarantines itself, unless it drains.
	Self  identity.NodeName
	Nodes map[identity.NodeName]NodeView
	// Votes on each other cluster, by the live speakers of the own one that have one.
	Votes map[string][]identity.ReachState
}

// Quarantine returns the nodes and the clusters whose backends get no new connections, each with the reason in a
// sentence. It is pure, and no more than this follows from anybody's death: identities and addresses stay. That not
// all backends of one service are quarantined is for the data path to see to, for each service by itself.
func Quarantine(v View) (nodes map[identity.NodeName]string, clusters map[string]string) {
	nodes, clusters = map[identity.NodeName]string{}, map[string]string{}
	for name, n := range v.Nodes {
		switch {
		case !n.Known:
		case n.Draining:
			nodes[name] = "it is drained"
		case name == v.Self:
		case n.State == identity.NodeSuspect, n.State == identity.NodeDead:
			nodes[name] = "it is " + string(n.State)
		}
	}
	for cluster, votes := range v.Votes {
		if state, against := Reach(votes); cluster != v.Self.Cluster && state == identity.Unreachable {
			clusters[cluster] = fmt.Sprintf("nothing of it answers %d of this cluster's %d speakers", against, len(votes))
		}
	}
	return nodes, clusters
}

// Reach sums up the votes of a cluster's speakers on another one: it is unreachable only if that is what most of
// them say. It also returns how many say so.
func Reach(votes []identity.ReachState) (state identity.ReachState, against int) {
	state = identity.ReachUnknown
	for _, vote := range votes {
		switch vote {
		case identity.Unreachable:
			against++
		case identity.Reachable:
			state = identity.Reachable
		case identity.ReachControlPlaneDown:
			if state != identity.Reachable {
				state = vote
			}
		}
	}
	if against*2 > len(votes) {
		return identity.Unreachable, against
	}
	return state, against
}
