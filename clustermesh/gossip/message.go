package gossip

import (
	"crypto/ed25519"

	"causeway/identity"
)

// Messages between members, beside memberlist's own. The first byte says which; the rest is CBOR.
const (
	msgDeltas      = 'd' // []Delta: news
	msgAsk         = 'a' // ask: please probe a node and say what you see
	msgObservation = 'o' // observation: the answer
	msgPull        = 'p' // pull: what I lack of these nodes' entries
)

// ask begs another node to probe the subject's data path for a while.
type ask struct {
	_       struct{} `cbor:",toarray"`
	From    identity.NodeName
	Subject identity.NodeName
	// Back is where to answer: the gossip address of the pool that the question came through.
	Back string
}

// observation is what a node's own echoes say of another node. Times are durations, since clocks differ.
type observation struct {
	_        struct{} `cbor:",toarray"`
	From     identity.NodeName
	Subject  identity.NodeName
	Answered bool
	// Probes that have gone unanswered since the last answer or the first probe.
	Probes uint32
	// Stamp is the observer's time in nanoseconds: an old one that is sent again is not taken for new.
	Stamp     int64
	Signature []byte
}

const observationContext = "causeway gossip observation v1\x00"

func (o *observation) signed() []byte {
	unsigned := *o
	unsigned.Signature = nil
	return append([]byte(observationContext), encode(&unsigned)...)
}

func (o *observation) sign(key ed25519.PrivateKey) { o.Signature = ed25519.Sign(key, o.signed()) }

func (o *observation) verify(key ed25519.PublicKey) error {
	if len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, o.signed(), o.Signature) {
		return ErrForged
	}
	return nil
}

// pull asks for entries of these signers that differ.
type pull struct {
	_       struct{} `cbor:",toarray"`
	Back    string
	Signers []identity.NodeName
}

// digest is what a member has of one signer's entries.
type digest struct {
	_      struct{} `cbor:",toarray"`
	Signer identity.NodeName
	Count  uint32
	// Hash is the exclusive or of the entries' hashes, so that order does not count.
	Hash uint64
}

// state is what two members exchange at times, to find what news has missed.
type state struct {
	_       struct{} `cbor:",toarray"`
	Back    string
	Digests []digest
}

func message(kind byte, v any) []byte { return append([]byte{kind}, encode(v)...) }
