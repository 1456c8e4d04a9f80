package peering

import (
	"context"
	"time"

	"causeway/kvstore"
)

// Keys of the records, all for the cluster's own agents alone.
const (
	AuthorityKey = kvstore.PrivatePrefix + "ca"
	RingKey      = kvstore.PrivatePrefix + "gossip"
	tokensPrefix = kvstore.PrivatePrefix + "tokens/"
	PeersPrefix  = kvstore.PrivatePrefix + "peers/"
)

// PeerKey is where the record of a peer is.
func PeerKey(cluster string) string { return PeersPrefix + cluster }

// EncodePeer returns the stored form of a record.
func EncodePeer(p Peer) []byte { return nil }

// DecodePeer reads a record, and refuses what does not fit its key.
func DecodePeer(key string, value []byte) (Peer, error) { return Peer{}, errTODO }

// TokenRecord is what is kept of a token: nothing that could be used instead of it.
type TokenRecord struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// Node that made it.
	Node string `json:"node"`
	// Secret is the SHA-256 of the token's.
	Secret   []byte `json:"secret"`
	Isolated bool   `json:"isolated,omitempty"`
	// For is the only cluster that may use it, by name, if it was made to introduce one.
	For    string    `json:"for,omitempty"`
	UsedBy string    `json:"usedBy,omitempty"`
	UsedAt time.Time `json:"usedAt,omitzero"`
}

// WatchPeers delivers all records of peers, at once and whenever one has changed, until ctx ends. A record that cannot be read is logged and left out.
func WatchPeers(ctx context.Context, store kvstore.Store, warn func(key string, err error)) <-chan []Peer {
	return nil
}
