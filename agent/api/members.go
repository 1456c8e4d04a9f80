package api

import (
	"time"

	"causeway/identity"
)

// Members is what a node knows of the life of all others, by gossip.
type Members struct {
	// Enabled is false without a gossip key: then nothing else is set.
	Enabled bool `json:"enabled"`
	// Pools that this node is in: its cluster's, and the mesh's if it is a speaker.
	Pools []Pool `json:"pools"`
	// Speakers of each cluster, as this node knows them.
	Speakers map[string][]string `json:"speakers"`
	Nodes    []NodeLiveness      `json:"nodes"`
	Clusters []identity.Reach    `json:"clusters"`
	// Transitions of nodes and clusters from one state to another, the last 20, newest first.
	Transitions []Transition `json:"transitions"`
}

// Pool is a group of nodes that watch each other.
type Pool struct {
	Name    string   `json:"name"` // cluster or mesh
	Label   string   `json:"label"`
	Members []Member `json:"members"`
	// Health is memberlist's own awareness score: 0 is best, more means that this node itself is slow.
	Health int `json:"health"`
	// ProbeInterval and ProbeTimeout in force, in milliseconds.
	ProbeInterval int64 `json:"probeIntervalMs"`
	ProbeTimeout  int64 `json:"probeTimeoutMs"`
}

// Member of a pool.
type Member struct {
	Node    string `json:"node"` // CLUSTER/NODE
	Address string `json:"address"`
	// RTT of the last probes, in milliseconds; 0 if not measured yet.
	RTT float64 `json:"rttMs"`
	// LastAck is when it last answered a probe of this node's over UDP.
	LastAck time.Time `json:"lastAck,omitzero"`
	// UDPBlocked: it answers over TCP alone.
	UDPBlocked bool `json:"udpBlocked,omitempty"`
	Here       bool `json:"here,omitempty"`
}

// NodeLiveness is a node's row with what else gossip knows of it.
type NodeLiveness struct {
	identity.Liveness
	Address string `json:"address"`
	// Member of a pool that this node is in, right now.
	Member  bool `json:"member"`
	Speaker bool `json:"speaker"`
	// RTT to the node in milliseconds, measured or estimated from network coordinates; 0 if unknown.
	RTT float64 `json:"rttMs"`
	// Suspicion says what this node's own probes make of it at the moment, if anything is odd.
	Suspicion string `json:"suspicion,omitempty"`
	// Key is the fingerprint of the gossip key that the node encrypts with.
	Key  string `json:"key,omitempty"`
	Here bool   `json:"here,omitempty"`
}

// Transition of a node (CLUSTER/NODE) or a cluster from one state to another.
type Transition struct {
	At      time.Time `json:"at"`
	Subject string    `json:"subject"`
	From    string    `json:"from"`
	To      string    `json:"to"`
	Reason  string    `json:"reason,omitempty"`
	By      string    `json:"by,omitempty"`
}

// DrainResult says what a drain, or its end, has done.
type DrainResult struct {
	Draining bool `json:"draining"`
	// Told are the nodes that have acknowledged it.
	Told int `json:"told"`
	// Backends on this node that are out of service, or back.
	Backends int `json:"backends"`
}

// KeyringRequest changes the mesh's gossip keys.
type KeyringRequest struct {
	// Action: list, add, use or remove.
	Action string `json:"action"`
	// Key to add, base64 of 32 bytes; empty: a new one.
	Key string `json:"key,omitempty"`
	// Fingerprint of the key to use or remove.
	Fingerprint string `json:"fingerprint,omitempty"`
}

// Keyring is the state of the mesh's gossip keys. The keys themselves are never shown.
type Keyring struct {
	Keys []GossipKey `json:"keys"`
}

// GossipKey is one of the mesh's gossip keys.
type GossipKey struct {
	// Fingerprint is the beginning of the key's SHA-256, in hex.
	Fingerprint string `json:"fingerprint"`
	Primary     bool   `json:"primary"` // this node encrypts with it
	// Nodes that are known to have it, and to encrypt with it, of how many that are alive.
	Held  int `json:"held"`
	Used  int `json:"used"`
	Alive int `json:"alive"`
}
