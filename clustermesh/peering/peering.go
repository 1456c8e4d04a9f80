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

	"golang.org/x/sync/errgroup"

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
	CheckWireGuard = "WireGuard UDP" // in place of the tunnel's, which is inside of it, if the clusters encrypt
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
	// StageRenumber: the own cluster takes another ID, and its agents begin anew. Connect again with the same token, which was not used.
	StageRenumber Stage = "renumber"
	StageDone     Stage = "done"
	StageUndo     Stage = "undo" // it failed, and what was written is taken back
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
	// Problems are what is wrong with the link as the node sees it, a sentence each.
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
	// Requires are capabilities that a peer must have.
	Requires []string
	Store    kvstore.Store
	// StoreEndpoints are those that peers reach the own store at, Address is where this node serves the API, and Endpoints lists where live
	// nodes of the cluster do, this one first.
	StoreEndpoints []string
	// Resolve, if not nil, turns StoreEndpoints into those that hold in other clusters, when they are told: names may mean something in this one only.
	Resolve   func(ctx context.Context, endpoints []string) ([]string, error)
	Address   netip.AddrPort
	Endpoints func() []string
	// Known lists other addresses (host:port) where a peer's API may be served: those of its nodes that the store has named.
	Known func(cluster string) []string
	// Administer connects to the own store as root, with a certificate of the authority.
	Administer func(ctx context.Context, authority *pki.Authority) (Administrator, error)
	// Ring is the mesh's gossip keys; its At is 0 until the cluster's nodes agree on them. Adopt takes over those of the mesh that is joined.
	Ring  func() gossip.Ring
	Adopt func(ctx context.Context, keys [][]byte) error
	// Verify makes every check of the link to a peer from this node, and reports each as it ends. With wait it goes on until all are well or ctx ends. The error names
	// the first one that is not.
	Verify func(ctx context.Context, peer Peer, wait bool, report func(Check)) error
	// Report says how this node sees the link to a peer, from what it knows already.
	Report func(peer string) Report
	// Forgotten waits until nothing of a cluster that was disconnected is in force on this node.
	Forgotten func(ctx context.Context, cluster string) error
	// Renumber assigns the own cluster an ID that is free in the mesh that it joins. Nil: its ID is configured, and stays.
	Renumber func(ctx context.Context, id identity.ClusterID) error
	// Follows tells whether this node still follows a peer by the connection of this user. A record that is missing nevertheless is not taken for a
	// disconnect: the store may have lost it. Nil: it does not.
	Follows func(cluster, user string) bool
	// Now is the clock; nil is the real one.
	Now func() time.Time
	Log *slog.Logger
}

// Service is a node's part in peering: it serves the API, and does what is asked of it locally.
type Service struct {
	Config
	trust    trust
	pending  pending
	attempts attempts
	renewals renewals
	// verifying has a place for each Verify that may run for peers at a time.
	verifying chan struct{}
	// dialer opens connections to peers; tests of what others send have none.
	dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

// New returns a service that serves nothing until Run.
func New(cfg Config) *Service {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{Config: cfg, verifying: make(chan struct{}, maxVerifying), dialer: kvstore.NewDialer().DialContext}
}

// Run serves the API on the listener, and renews the certificates of this cluster's peers, until ctx ends. While the own store has not been read there is no certificate to
// serve with, and connections are refused.
func (s *Service) Run(ctx context.Context, listener net.Listener) error {
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return s.watchAuthority(ctx) })
	tasks.Go(func() error { return s.renewAll(ctx) })
	tasks.Go(func() error { return s.serve(ctx, listener) })
	return tasks.Wait()
}

// ErrLeft says that a peer has disconnected this cluster.
var ErrLeft = errors.New("peer left")
