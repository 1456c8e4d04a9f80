package identity

import "time"

// LivenessState is what is known of a node's life.
type LivenessState string

// States of a node. Only Suspect and Dead take its backends out of service; see Liveness.Quarantined.
const (
	NodeAlive     LivenessState = "alive"
	NodeAgentDown LivenessState = "agent-down" // its data path answers, its agent doesn't: nothing changes
	NodeSuspect   LivenessState = "suspect"    // neither answers, for a second or so
	NodeDead      LivenessState = "dead"       // neither has answered for a while
	NodeLeft      LivenessState = "left"       // drained, and then stopped, as announced
)

// Liveness is a row of the liveness table: what the node's own cluster says of its life, with what this
// node makes of it.
type Liveness struct {
	Cluster string        `json:"cluster"`
	Node    string        `json:"node"`
	State   LivenessState `json:"state"`
	// Reason says in a sentence why the state is what it is; empty while all is well.
	Reason string `json:"reason,omitempty"`
	// Since when the state has been that, by the clock of the node in By.
	Since time.Time `json:"since,omitzero"`
	// By is the node, as CLUSTER/NODE, that said so.
	By string `json:"by,omitempty"`
	// Draining: the node was asked to take its backends out of service.
	Draining bool `json:"draining,omitempty"`
	// Quarantined: backends on the node get no new connections from this one.
	Quarantined bool `json:"quarantined,omitempty"`
}

// NodeName returns whose row it is.
func (l Liveness) NodeName() NodeName { return NodeName{Cluster: l.Cluster, Node: l.Node} }

// ReachState is what this node's cluster knows of its way to another cluster.
type ReachState string

// States of a way. Only Unreachable takes the cluster's backends out of service.
const (
	ReachSelf             ReachState = "self"               // the own cluster
	ReachUnknown          ReachState = "unknown"            // nobody has looked yet
	Reachable             ReachState = "reachable"          //
	ReachControlPlaneDown ReachState = "control-plane-down" // none of its agents answers, its data path does: nothing changes
	Unreachable           ReachState = "unreachable"        // nothing of it answers most of this cluster's speakers
)

// Reach is a row of the clusters table: whether another cluster can be reached from this one.
type Reach struct {
	Cluster string     `json:"cluster"`
	State   ReachState `json:"state"`
	Reason  string     `json:"reason,omitempty"`
	Since   time.Time  `json:"since,omitzero"`
	// Quarantined: the cluster's backends get no new connections from this one.
	Quarantined bool `json:"quarantined,omitempty"`
	// Votes of this cluster's speakers: whether each can reach it.
	Votes map[string]bool `json:"votes,omitempty"`
	// RTT to the cluster's nearest speaker, in milliseconds; 0 if not measured.
	RTT float64 `json:"rttMs,omitempty"`
}
