// Package peering joins clusters: tokens, the API between clusters, and the records of who is a peer. What clusters know of
// each other afterwards is in the records (records.go), which each cluster keeps in its own store, so every agent can
// serve the API.
package peering

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"causeway/clustermesh/gossip"
	"causeway/identity"
	"causeway/identity/pki"
	"causeway/kvstore"
)

// Protocol is the version of the API between clusters. Clusters of different ones refuse each other.
const Protocol = 1

// DefaultPort of the API, TCP, at every node's address.
const DefaultPort = 7958

// DefaultTTL of a token.
const DefaultTTL = 15 * time.Minute

var errTODO = errors.New("not implemented")

// State of a peer, as its record has it.
type State string

const (
	// Joining peers have exchanged trust, but no packet has been seen to go both ways yet: nothing is sent to their services.
	Joining State = "joining"
	// Connected is said once packets have made the round trip in both directions.
	Connected State = "connected"
	// Left peers have disconnected this cluster. The record stays, so that people see it, until it is disconnected here too
	// or connected anew.
	Left State = "left"
)

// Peer is a cluster that this one is connected with: the record that the own store keeps of it, for the own agents alone.
type Peer struct {
	// Cluster is what it said of itself when it was connected.
	Cluster identity.ClusterInfo `json:"cluster"`
	State   State                `json:"state"`
	// Since when it is in this state.
	Since time.Time `json:"since"`
	// StoreEndpoints are those of its etcd, Endpoints (host:port) of its peering API.
	StoreEndpoints []string `json:"storeEndpoints"`
	Endpoints      []string `json:"endpoints"`
	// Authority is its certificate authority, Cert what that has signed for this cluster and Key the key of that: PEM.
	Authority string `json:"authority"`
	Cert      string `json:"cert"`
	Key       string `json:"key"`
	// User is the peer's in the own store.
	User string `json:"user"`
	// UserExpires is when the certificate ends that the peer was given for it last.
	UserExpires time.Time `json:"userExpires"`
	// Isolated: one of the two does not want the other's peers as its own, so neither introduces them.
	Isolated bool `json:"isolated,omitempty"`
}

// Name of the peer's cluster.
func (p *Peer) Name() string { return p.Cluster.Name }

// Outcome of a check.
type Outcome string

const (
	OK      Outcome = "ok"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped" // it could not be tried, since something before it failed, or there is nothing to try
)

// Check is one thing that was tried between two clusters.
type Check struct {
	// Name says what was tried: one of the Check… names.
	Name string `json:"name"`
	// From and To are clusters: who tried, and whom it tried to reach.
	From string `json:"from"`
	To   string `json:"to"`
	// Target is what was asked, such as "172.29.2.2:2379/tcp".
	Target  string  `json:"target,omitempty"`
	Outcome Outcome `json:"outcome"`
	// Detail is what came of it, in a few words: "TLS 1.3, valid until …", or the error. Cause says, if it failed, what the likely reason is and what to do.
	Detail string        `json:"detail,omitempty"`
	Cause  string        `json:"cause,omitempty"`
	Took   time.Duration `json:"took"`
}

// Names of checks, in the order that they depend on each other.
const (
	CheckName      = "name resolution"
	CheckTCP       = "TCP"
	CheckTLS       = "TLS and chain"
	CheckClock     = "clock"
	CheckAPI       = "peering API"
	CheckStore     = "etcd read"
	CheckGossipTCP = "gossip TCP"
	CheckGossipUDP = "gossip UDP"
	CheckTunnel    = "tunnel UDP"
	CheckMTU       = "path MTU"
	CheckPods      = "pod to pod"
)

// Stage of a Connect.
type Stage string

const (
	StagePreflight Stage = "preflight" // nothing is written yet
	StagePlan      Stage = "plan"      // what will be done, in sentences
	StageJoin      Stage = "join"      // trust is exchanged
	StageVerify    Stage = "verify"    // packets are sent both ways
	StageDone      Stage = "done"
	StageUndo      Stage = "undo" // it failed, and what was written is taken back
)

// Event is progress of a Connect.
type Event struct {
	Stage Stage `json:"stage"`
	// Peer is the cluster that it is about; empty as long as it isn't known.
	Peer  string        `json:"peer,omitempty"`
	Check *Check        `json:"check,omitempty"`
	Text  string        `json:"text,omitempty"`
	At    time.Duration `json:"at"` // since the beginning
}

// Report is how an agent sees the link to a peer, for the other side to show.
type Report struct {
	At time.Time // of its clock
	// Node that says so, and the cluster it is of.
	Node identity.NodeName
	// Store, Gossip, Tunnel: nil if well, else what is wrong in a sentence.
	Problems []string
	// RTT of the last echo from a pod-side address to one of the peer's; 0 if none came back lately. Last is how long ago that was, Loss
	// the percentage of the last ones that were not answered. MTU is the largest packet of pods that gets through.
	RTT  time.Duration
	Last time.Duration
	Loss float64
	MTU  int
	// State of the asking cluster in the reporting one's records.
	State State
}

// Administrator makes and removes users of the own store: kvstore.Access.
type Administrator interface {
	GrantRead(ctx context.Context, user, prefix string) error
	Revoke(ctx context.Context, user string) error
	Close() error
}

// Config of a node's part in peering. All functions may be called at any time, several at once.
type Config struct {
	Self identity.NodeName
	// Mesh names the mesh; a token of another one is refused.
	Mesh string
	// Cluster is what this cluster says of itself.
	Cluster func() identity.ClusterInfo
	Store   kvstore.Store
	// StoreEndpoints are those that peers reach the own store at, Address is where this node serves the API, and Endpoints lists where live
	// nodes of the cluster do, this one first.
	StoreEndpoints []string
	Address        netip.AddrPort
	Endpoints      func() []string
	// Known lists other addresses (host:port) where a peer's API may be served: those of its nodes that the store has named.
	Known func(cluster string) []string
	// Administer connects to the own store as root, with a certificate of the authority.
	Administer func(ctx context.Context, authority *pki.Authority) (Administrator, error)
	// Ring is the mesh's gossip keys, Adopt takes over those of the mesh that is joined.
	Ring  func() gossip.Ring
	Adopt func(ctx context.Context, keys [][]byte) error
	// Verify makes every check of the link to a peer from this node, and reports each as it ends. With wait it goes on until all are well or ctx ends. The error names
	// the first one that is not.
	Verify func(ctx context.Context, peer Peer, wait bool, report func(Check)) error
	// Report says how this node sees the link to a peer, from what it knows already.
	Report func(peer string) Report
	// Forgotten waits until nothing of a cluster that was disconnected is in force on this node.
	Forgotten func(ctx context.Context, cluster string) error
	// Now is the clock; nil is the real one.
	Now func() time.Time
	Log *slog.Logger
}

// Service is a node's part in peering: it serves the API, and does what is asked of it locally.
type Service struct{ Config }

// New returns a service that serves nothing until Run.
func New(cfg Config) *Service { return &Service{cfg} }

// Run serves the API on the listener, and renews the certificates of this cluster's peers, until ctx ends. While the own store has not been read there is no certificate to
// serve with, and connections are refused.
func (s *Service) Run(ctx context.Context, listener net.Listener) error {
	<-ctx.Done()
	return listener.Close()
}

// TokenOptions of CreateToken.
type TokenOptions struct {
	TTL time.Duration // DefaultTTL if 0; 10 s to 24 h
	// Isolated: who joins with it is not introduced to this cluster's peers.
	Isolated bool
}

// CreateToken makes a token, which one cluster can join with, once.
func (s *Service) CreateToken(ctx context.Context, o TokenOptions) (Token, error) {
	return Token{}, errTODO
}

// Tokens lists the tokens that were made and have not been forgotten yet: a used or expired one is for a while.
func (s *Service) Tokens(ctx context.Context) ([]TokenRecord, error) { return nil, errTODO }

// DeleteToken makes a token worthless.
func (s *Service) DeleteToken(ctx context.Context, id string) error { return errTODO }

// ConnectOptions of Connect.
type ConnectOptions struct {
	// Isolated: the peers of the peer are not joined.
	Isolated bool
}

// Connect joins the cluster that a token is of, and its peers, and reports progress. It returns nil only when packets have made the round
// trip in both directions. Otherwise nothing is left of it.
func (s *Service) Connect(ctx context.Context, token string, o ConnectOptions, report func(Event)) error {
	return errTODO
}

// Disconnected is what came of a Disconnect.
type Disconnected struct {
	Cluster string `json:"cluster"`
	// Known is false if there was no such peer: nothing had to be done.
	Known bool `json:"known"`
	// Told: the peer has acknowledged it. If not, it finds out when it asks next; Reason says why it could not be told.
	Told   bool   `json:"told"`
	Reason string `json:"reason,omitempty"`
}

// Disconnect ends the connection with a cluster: its user and certificate are revoked, nothing of it stays in force. It takes less than a second, whether the peer can be reached or not; force
// does not even try to tell it.
func (s *Service) Disconnect(ctx context.Context, name string, force bool) (Disconnected, error) {
	return Disconnected{}, errTODO
}

// Ask asks a peer how it sees the link. ErrLeft says that the peer has disconnected this cluster.
func (s *Service) Ask(ctx context.Context, peer Peer) (Report, error) { return Report{}, errTODO }

// AskChecks has a peer make every check toward this cluster once, and passes on what it reports.
func (s *Service) AskChecks(ctx context.Context, peer Peer, report func(Check)) error {
	return errTODO
}

// ErrLeft says that a peer has disconnected this cluster.
var ErrLeft = errors.New("peer left")

// Renew has a peer sign a new certificate for this cluster, and puts it into the record.
func (s *Service) Renew(ctx context.Context, name string) error { return errTODO }

// Authority returns this cluster's authority, from the own store.
func (s *Service) Authority(ctx context.Context) (*pki.Authority, error) { return nil, errTODO }
