package api

import (
	"time"

	"causeway/identity"
)

// Paths of peering.
const (
	PathTokens       = "/v1/tokens"       // GET; POST TokenRequest; DELETE …/ID
	PathConnect      = "/v1/connect"      // POST ConnectRequest: ConnectEvents as they happen, one JSON document a line
	PathPeers        = "/v1/peers"        // GET; DELETE …/NAME?force=true
	PathCerts        = "/v1/certs"        // GET; POST CertsRequest
	PathXDSCert      = "/v1/certs/xds"    // POST XDSCertificateRequest
	PathTroubleshoot = "/v1/troubleshoot" // POST TroubleshootRequest: TroubleshootEvents as they happen, one JSON document a line
	PathBundle       = "/v1/bundle"       // GET: a gzipped tar
)

// StageDone is the stage of the last event of a connect that succeeded.
const StageDone = "done"

// StageRenumber says that the cluster takes another ID before it is joined, and its agents begin anew.
const StageRenumber = "renumber"

// TokenRequest asks for a token.
type TokenRequest struct {
	// TTL in seconds; 0 is 15 minutes.
	TTL int64 `json:"ttl,omitempty"`
	// Isolated: who joins with it is not introduced to this cluster's peers.
	Isolated bool `json:"isolated,omitempty"`
}

// Token is a new token. Text is the only time that it is shown.
type Token struct {
	Text      string    `json:"token"`
	ID        string    `json:"id"`
	Expires   time.Time `json:"expires"`
	Cluster   string    `json:"cluster"`
	Endpoints []string  `json:"endpoints"`
}

// TokenInfo is what is known of a token, which does not include its text.
type TokenInfo struct {
	ID       string    `json:"id"`
	Created  time.Time `json:"created"`
	Expires  time.Time `json:"expires"`
	Node     string    `json:"node"`  // that made it
	State    string    `json:"state"` // open, used, expired
	Isolated bool      `json:"isolated,omitempty"`
	For      string    `json:"for,omitempty"` // the only cluster that may use it
	UsedBy   string    `json:"usedBy,omitempty"`
	UsedAt   time.Time `json:"usedAt,omitzero"`
}

// Check is one thing that was tried between two clusters.
type Check struct {
	Name    string  `json:"name"` // such as "TCP", "gossip UDP", "path MTU"
	From    string  `json:"from"` // the cluster that tried
	To      string  `json:"to"`
	Target  string  `json:"target,omitempty"` // such as 172.29.2.2:2379/tcp
	Outcome string  `json:"outcome"`          // ok, failed, skipped
	Detail  string  `json:"detail,omitempty"`
	Cause   string  `json:"cause,omitempty"` // of a failed one: the likely reason, and what to do
	Took    float64 `json:"tookMs"`
}

// ConnectRequest asks to join the cluster that a token is of.
type ConnectRequest struct {
	Token    string `json:"token"`
	Isolated bool   `json:"isolated,omitempty"`
}

// ConnectEvent is progress of a connect. The last one has the stage done, or has Error.
type ConnectEvent struct {
	Stage string  `json:"stage"` // preflight, plan, join, verify, done, undo
	Peer  string  `json:"peer,omitempty"`
	Check *Check  `json:"check,omitempty"`
	Text  string  `json:"text,omitempty"`
	At    float64 `json:"atMs"` // since the beginning
	Error string  `json:"error,omitempty"`
}

// Path is one direction of the data path to a peer: packets that one side sends, and the answers to them.
type Path struct {
	OK bool `json:"ok"`
	// Known is false if there is nothing to say yet, or the other side, whose word it is, could not be asked.
	Known bool `json:"known"`
	// Last is how long ago an echo came back, in milliseconds; -1: never.
	Last int64 `json:"lastMs"`
	// RTT of the last echo, from a pod-side address to one of the peer's and back, in milliseconds.
	RTT float64 `json:"rttMs"`
	// Loss of the last echoes, in percent.
	Loss float64 `json:"loss"`
	// MTU is the largest packet of pods that gets through, in bytes; 0: not measured.
	MTU int `json:"mtu"`
	// Narrowed: packets toward the peer are kept to MTU, since those that pods could send otherwise do not get through. That is no problem.
	Narrowed bool `json:"narrowed,omitempty"`
	// Note is what is worth knowing and no problem.
	Note      string `json:"note,omitempty"`
	NoteIsNew bool   `json:"noteIsNew,omitempty"`
	// From is the node that measured it, CLUSTER/NODE.
	From    string `json:"from,omitempty"`
	Problem string `json:"problem,omitempty"`
}

// Plane is a part of the connection with a peer that is well or not.
type Plane struct {
	OK     bool   `json:"ok"`
	Detail string `json:"detail"` // in a few words how it is, or what is wrong
}

// Peer is a cluster that this one is connected with, as this node sees it now.
type Peer struct {
	Name string             `json:"name"`
	ID   identity.ClusterID `json:"id"`
	// State: connected, not connected, joining, left. Connected is only said if all below is well.
	State string `json:"state"`
	// Why it is not connected, one sentence each, the first one what else follows from.
	Why   []string  `json:"why"`
	Since time.Time `json:"since"` // when it was joined, or has left
	// Control is its store and the certificates, Gossip the mesh's pool; Out is what this node sends there, In what its nodes send here, as they say.
	Control Plane `json:"control"`
	Gossip  Plane `json:"gossip"`
	Out     Path  `json:"out"`
	In      Path  `json:"in"`
	// SyncLag is how old the newest that its store has said is, in milliseconds; -1: nothing yet.
	SyncLag int64 `json:"syncLagMs"`
	// ClockSkew is how much its clock is ahead of this node's, in milliseconds.
	ClockSkew int64 `json:"clockSkewMs"`
	// CertExpires is when this cluster's certificate there ends, PeerCertExpires when the peer's here does.
	CertExpires     time.Time `json:"certExpires"`
	PeerCertExpires time.Time `json:"peerCertExpires"`
	StoreEndpoints  []string  `json:"storeEndpoints"`
	Endpoints       []string  `json:"endpoints"` // of its peering API
	Nodes           int       `json:"nodes"`
	Entries         int       `json:"entries"` // accepted from it
	Quota           int       `json:"quota"`   // how many are accepted at most
	Excess          int       `json:"excess"`  // how many are left out, since they are more
	Refused         int       `json:"refused"`
	Version         string    `json:"version"`
}

// DisconnectResult is what came of a disconnect.
type DisconnectResult struct {
	Cluster string  `json:"cluster"`
	Known   bool    `json:"known"` // false: there was no such peer, nothing had to be done
	Told    bool    `json:"told"`  // the peer knows
	Reason  string  `json:"reason,omitempty"`
	Took    float64 `json:"tookMs"`
}

// Cert is a certificate that matters to this node.
type Cert struct {
	// Name: "authority", "agent" (this node at the own store), "peering" (this node's API), "peer NAME" (this cluster at a peer's store).
	Name        string    `json:"name"`
	User        string    `json:"user"` // common name
	Issuer      string    `json:"issuer"`
	Fingerprint string    `json:"fingerprint"` // SHA-256, in hex
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	// Renews is when it is renewed by itself; zero: never.
	Renews time.Time `json:"renews,omitzero"`
	File   string    `json:"file,omitempty"`
	// State: valid, expires soon, expired, not valid yet.
	State string `json:"state"`
	// Problem with renewing it, if any.
	Problem string `json:"problem,omitempty"`
}

// XDSCertificateRequest is a PKCS #10 request (PEM) of a client of xDS.
type XDSCertificateRequest struct {
	Request string `json:"request"`
}

// XDSCertificate is what it gets, with the authority's own; both PEM.
type XDSCertificate struct {
	Cert string `json:"cert"`
	CA   string `json:"ca"`
}

// CertsRequest asks to renew certificates now.
type CertsRequest struct {
	// Name as in Cert; empty: all that can be.
	Name string `json:"name,omitempty"`
}

// TroubleshootRequest asks to walk the connections.
type TroubleshootRequest struct {
	Peer string `json:"peer,omitempty"` // all if empty
}

// TroubleshootEvent is a check, or the verdict on a peer.
type TroubleshootEvent struct {
	Peer  string `json:"peer"`
	Check *Check `json:"check,omitempty"`
	// Verdict is set in the last event of a peer: what is broken first and the likely cause; OK if nothing is.
	Verdict string `json:"verdict,omitempty"`
	OK      bool   `json:"ok,omitempty"`
}
