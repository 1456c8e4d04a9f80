package gossip

import (
	"fmt"
	"time"

	"causeway/identity"
)

// facts is what a node says of itself. Those of most nodes stay within their cluster: a mesh has too many.
type facts struct {
	Speaker bool `cbor:"1,keyasint,omitempty"`
	// Draining: its backends shall get no new connections.
	Draining bool `cbor:"2,keyasint,omitempty"`
	// Stopping: its agent is about to end, as planned.
	Stopping bool `cbor:"3,keyasint,omitempty"`
	// Votes of a speaker on the way to each other cluster.
	Votes map[string]identity.ReachState `cbor:"4,keyasint,omitempty"`
	// Silent are the nodes that do not answer a speaker in clusters without any agent, which cannot say so themselves.
	Silent map[string][]string `cbor:"11,keyasint,omitempty"`
	// RTTs of a speaker to each other cluster, in microseconds.
	RTTs map[string]uint32 `cbor:"5,keyasint,omitempty"`
	// Keys are the fingerprints of the gossip keys that it holds, the one that it encrypts with first. A speaker's
	// ClusterKeys are those that every live node of its cluster holds.
	Keys        []string `cbor:"6,keyasint,omitempty"`
	ClusterKeys []string `cbor:"7,keyasint,omitempty"`
	// Blocked are the clusters of which no member of the mesh pool answers a speaker over UDP, although TCP and others find them alive.
	Blocked []string `cbor:"12,keyasint,omitempty"`
	// Coordinate of a speaker in the network's space: Vivaldi (Dabek and others, 2004), as of serf/coordinate.
	Coordinate *coordinateWire `cbor:"8,keyasint,omitempty"`
	// Shared facts are told to the mesh: the node is or was a speaker, or drains.
	Shared bool `cbor:"9,keyasint,omitempty"`
	// Complete: all entries of this incarnation have been told; older ones are of the node's earlier life.
	Complete bool `cbor:"10,keyasint,omitempty"`
}

// coordinateWire is a coordinate.Coordinate.
type coordinateWire struct {
	_                         struct{} `cbor:",toarray"`
	Vec                       []float64
	Error, Adjustment, Height float64
}

// verdict is what a cluster says of the life of one of its nodes. A newer epoch wins; within one the more
// severe state does, which is the sequence. So accusations need no order, and only who has evidence of life opens a new epoch.
type verdict struct {
	State  identity.LivenessState `cbor:"1,keyasint"`
	Reason string                 `cbor:"2,keyasint,omitempty"`
	// Since, in milliseconds since 1970 by the signer's clock.
	Since int64 `cbor:"3,keyasint"`
}

// maxReason bounds a verdict's reason, in bytes.
const maxReason = 300

// severity orders states within an epoch.
var severity = map[identity.LivenessState]uint64{
	identity.NodeAlive: 0, identity.NodeAgentDown: 1, identity.NodeSuspect: 2, identity.NodeDead: 3, identity.NodeLeft: 4,
}

func decodeFacts(d *Delta) (f facts, err error) {
	if d.Withdrawn {
		return f, nil
	}
	if err := decode(d.Value, &f); err != nil {
		return f, fmt.Errorf("%s: %w", d.Key, err)
	}
	if len(f.Votes) > 255 || len(f.Silent) > 255 || len(f.RTTs) > 255 || len(f.Blocked) > 255 || len(f.Keys) > maxKeys || len(f.ClusterKeys) > maxKeys {
		return f, fmt.Errorf("%s: more than a mesh can have", d.Key)
	}
	return f, nil
}

func decodeVerdict(d *Delta) (v verdict, err error) {
	if err := decode(d.Value, &v); err != nil {
		return v, fmt.Errorf("%s: %w", d.Key, err)
	}
	if s, known := severity[v.State]; !known || s != d.Sequence || d.Withdrawn {
		return v, fmt.Errorf("%s: state %.20q of severity %d makes no sense", d.Key, v.State, d.Sequence)
	}
	if len(v.Reason) > maxReason {
		return v, fmt.Errorf("%s: reason of %d bytes", d.Key, len(v.Reason))
	}
	return v, nil
}

// newVerdict returns a verdict in a new epoch: after the last one, and in step with clocks, so that it is newer than
// those that were forgotten. One that only turns more severe stays in its epoch.
func newVerdict(subject identity.NodeName, old *Delta, v verdict, now time.Time) Delta {
	d := Delta{Key: verdictKey(subject), Incarnation: uint64(now.UnixMilli()), Sequence: severity[v.State], Value: encode(v)}
	if old != nil {
		if d.Sequence > old.Sequence {
			d.Incarnation = old.Incarnation
		} else {
			d.Incarnation = max(d.Incarnation, old.Incarnation+1)
		}
	}
	return d
}

func verdictKey(n identity.NodeName) string { return kindVerdict + "/" + n.String() }
func factsKey(n identity.NodeName) string   { return kindFacts + "/" + n.String() }
