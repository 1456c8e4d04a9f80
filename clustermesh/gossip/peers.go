package gossip

import (
	"context"
	"errors"
	"net/netip"
	"time"
)

// SetPeers says which the other clusters are now. What is known of others is forgotten: their nodes' states and verdicts,
// and what they have said.
func (g *Gossip) SetPeers(clusters []string) {}

// Ring is the mesh's gossip keys, the first encrypts, with the time of the change that made them so, in milliseconds since 1970.
type Ring struct {
	At   uint64
	Keys [][]byte
}

// Ring returns the keys that this node has now.
func (g *Gossip) Ring() Ring { return Ring{} }

// LearnRing takes over a newer ring, which came by another way than gossip: a node that was away while keys were changed has it from
// its cluster's store. An older one changes nothing.
func (g *Gossip) LearnRing(r Ring) error { return nil }

// AdoptRing has the own cluster change to another mesh's keys, without a moment in which its nodes do not understand each
// other: first all accept them, then all encrypt with the first of them, then all forget their own. It returns when all live nodes of the
// cluster encrypt with it. On failure the own keys stay in use.
func (g *Gossip) AdoptRing(ctx context.Context, keys [][]byte) error {
	return errors.New("not implemented")
}

// Probe asks over UDP whether a node's gossip port answers, without being a member of its pool, and returns the round trip. Only nodes that are known from
// a store are answered.
func (g *Gossip) Probe(ctx context.Context, to netip.AddrPort) (time.Duration, error) {
	return 0, errors.New("not implemented")
}
