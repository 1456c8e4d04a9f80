package testbed

import (
	"crypto/rand"
	"encoding/base64"
)

// gossipKeySize in bytes, for AES-256.
const gossipKeySize = 32

// newGossipKey returns a key for the gossip of a bed's nodes, as their key files have it.
func newGossipKey() []byte {
	key := make([]byte, gossipKeySize)
	rand.Read(key) // never fails
	return append([]byte(base64.StdEncoding.EncodeToString(key)), '\n')
}

// writeGossipKey gives a node its own copy of the key: its agent rewrites the file when keys are rotated.
func (l layout) writeGossipKey(cluster, node string, key []byte) error {
	return writeFile(l.gossipKey(cluster, node), key, 0o600)
}
