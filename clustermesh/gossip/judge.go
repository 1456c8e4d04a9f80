package gossip

import (
	"fmt"
	"time"

	"causeway/identity"
)

// Timing of the verdicts. The sum of what a killed node needs is below 2 s: up to 0.5 s until a member probes it, Silence
// from then on, and two or three rounds of news in each tier.
type Timing struct {
	// Silence is how long a node must certainly have been silent in every way before it is suspect. A partition that is
	// shorter changes nothing.
	Silence time.Duration
	// Patience is how long a node whose data path answers may be missed by memberlist before its agent is said to be
	// down: until then it may be a probe lost too many.
	Patience time.Duration
	// Dead is how long a node is suspect before it is dead. Nothing follows from it but the name.
	Dead time.Duration
	// ClusterSilence is Silence for a whole cluster, and ClusterStart the same for one that has not been heard of yet.
	ClusterSilence, ClusterStart time.Duration
	// ClusterStale is how long no member of another cluster may have answered this node's own probes before it sends an echo.
	ClusterStale time.Duration
	// Echoes that must have gone unanswered, here and at the other node that is asked. With 20 % loss each way one is
	// lost with probability 0.36: that all of both are is less than one in a thousand, and that on top of what memberlist saw.
	Echoes, OtherEchoes uint32
	// Urgent, Calm and Slow are the times between two echoes: to one that is accused, to one whose agent is
	// known to be down, and to one that is dead. Its coming back is seen after Slow.
	Urgent, Calm, Slow time.Duration
	// Fresh is how old what another node saw may be.
	Fresh time.Duration
}

// DefaultTiming is for ClusterProfile and MeshProfile.
func DefaultTiming() Timing {
	return Timing{
		Silence: 1100 * time.Millisecond, Patience: 1500 * time.Millisecond, Dead: 5 * time.Second,
		ClusterSilence: 1500 * time.Millisecond, ClusterStart: 6 * time.Second, ClusterStale: time.Second, Echoes: 4, OtherEchoes: 3,
		Urgent: 80 * time.Millisecond, Calm: 200 * time.Millisecond, Slow: 400 * time.Millisecond, Fresh: 500 * time.Millisecond,
	}
}

// findings is all that a verdict on a node depends on: what memberlist says, what echoes say, here and
// elsewhere, and what was said before.
type findings struct {
	// Member of the cluster's pool; otherwise Missing says for how long it has not been, and Announced that it took its leave.
	Member    bool
	Missing   time.Duration
	Announced bool
	Draining  bool
	// Silence since the last sign of life of any kind, and the echoes that have gone unanswered since then. Answers tells
	// that echoes come back.
	Silence time.Duration
	Echoes  uint32
	Answers bool
	// Others are the fresh observations of other nodes; Available is how many could be asked at all.
	Others    []otherFinding
	Available int
	// Now is the verdict in force, and For how long it has been.
	Now identity.LivenessState
	For time.Duration
}

type otherFinding struct {
	Answers bool
	Echoes  uint32
}

// judge returns the verdict that follows from findings, and why; the state is Now if nothing changes. It is the one
// place that decides on a node's life. An agent's death is not the node's: as long as anybody gets an echo back from
// the data path, the node is in service.
func judge(f findings, t Timing) (identity.LivenessState, string) {
	switch {
	case f.Member:
		return identity.NodeAlive, ""
	case f.Announced && f.Draining:
		return identity.NodeLeft, "drained, and its agent was stopped"
	case f.Answers:
		return judgeAgent(f, t)
	case f.Silence < t.Silence || f.Echoes < t.Echoes || !f.confirmed(t):
		return f.Now, ""
	}
	switch f.Now {
	case identity.NodeAlive, identity.NodeAgentDown:
		return identity.NodeSuspect, f.silence()
	case identity.NodeSuspect:
		if f.For >= t.Dead {
			return identity.NodeDead, f.silence()
		}
	}
	return f.Now, ""
}

// judgeAgent is for a node whose data path answers while it is not in its pool.
func judgeAgent(f findings, t Timing) (identity.LivenessState, string) {
	if f.Now == identity.NodeAlive && !f.Announced && f.Missing < t.Patience {
		return f.Now, ""
	}
	if f.Announced {
		return identity.NodeAgentDown, "its agent was stopped as announced; its data path answers"
	}
	return identity.NodeAgentDown, "its agent does not answer; its data path does"
}

// confirmed tells whether the silence is not this node's alone: another node gets no answer either, and none does get one.
func (f findings) confirmed(t Timing) bool {
	agree := 0
	for _, o := range f.Others {
		if o.Answers {
			return false
		}
		if o.Echoes >= t.OtherEchoes {
			agree++
		}
	}
	return agree > 0 || f.Available == 0
}

func (f findings) silence() string {
	others := "nobody else is there to ask"
	if f.Available > 0 {
		others = fmt.Sprintf("%d more got no answer either", len(f.Others))
	}
	return fmt.Sprintf("neither its agent nor its data path has answered for %.1f s; %s", f.Silence.Seconds(), others)
}

// reachability is all that a speaker's vote on a cluster depends on.
type reachability struct {
	// Members of the cluster in the mesh pool now; otherwise Missing says for how long there has been none.
	Members int
	Missing time.Duration
	// Silence since the last sign of life of any of its nodes, Echoes since then; Heard is false before the first sign.
	Silence time.Duration
	Echoes  uint32
	Heard   bool
	Now     identity.ReachState
}

// judgeCluster returns a speaker's vote on a cluster. What the cluster's store or API says does not count.
func judgeCluster(r reachability, t Timing) identity.ReachState {
	patience := t.ClusterSilence
	if !r.Heard {
		patience = t.ClusterStart
	}
	switch {
	case r.Silence >= patience && r.Echoes >= t.Echoes:
		return identity.Unreachable
	case !r.Heard || r.Silence >= t.ClusterSilence:
		return r.Now
	case r.Members > 0 || r.Missing < 2*t.Patience:
		return identity.Reachable
	}
	return identity.ReachControlPlaneDown
}
