package gossip

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"

	"causeway/identity"
)

// maxEntries bounds what one node may have in the ledger, so that a peer cannot fill an agent's memory. A node has
// an address for each of its pods, and one or a few slices for each service of theirs.
const maxEntries = 8192

// ledger holds the newest delta of every key that is still news: until the store has it too. It is how members that
// missed something find out. It knows no time, signature or network.
type ledger struct {
	entries map[string]*entry
	count   map[identity.NodeName]int // by signer
}

type entry struct {
	Delta
	at   time.Time // when it came
	hash uint64
}

func newLedger() *ledger {
	return &ledger{entries: map[string]*entry{}, count: map[identity.NodeName]int{}}
}

// get returns the newest delta of a key, or nil.
func (l *ledger) get(key string) *Delta {
	if e := l.entries[key]; e != nil {
		return &e.Delta
	}
	return nil
}

// news tells whether d is newer than what is known.
func (l *ledger) news(d *Delta) bool {
	old := l.get(d.Key)
	return old == nil || d.newer(old)
}

// put keeps d, which must be news.
func (l *ledger) put(d Delta, now time.Time) error {
	signer := d.Signer()
	old := l.entries[d.Key]
	if (old == nil || old.Signer() != signer) && l.count[signer] >= maxEntries {
		return fmt.Errorf("%s: node %s has %d entries that no store has taken yet, and more are not kept", d.Key, signer, maxEntries)
	}
	l.drop(d.Key)
	l.count[signer]++
	l.entries[d.Key] = &entry{Delta: d, at: now, hash: xxhash.Sum64(encode(&d))}
	return nil
}

func (l *ledger) drop(key string) {
	old := l.entries[key]
	if old == nil {
		return
	}
	signer := old.Signer()
	if l.count[signer]--; l.count[signer] == 0 {
		delete(l.count, signer)
	}
	delete(l.entries, key)
}

// forget drops all that nodes of a cluster have signed.
func (l *ledger) forget(cluster string) {
	for key, e := range l.entries {
		if e.Cluster == cluster {
			l.drop(key)
		}
	}
}

// retire drops the entries that done says are no news any more, among those that came before a time.
func (l *ledger) retire(before time.Time, done func(*Delta) bool) {
	for key, e := range l.entries {
		if e.at.Before(before) && done(&e.Delta) {
			l.drop(key)
		}
	}
}

// digests summarizes, by signer, the entries that may be shared.
func (l *ledger) digests(share func(*Delta) bool) []digest {
	by := map[identity.NodeName]*digest{}
	for _, e := range l.entries {
		if !share(&e.Delta) {
			continue
		}
		d := by[e.Signer()]
		if d == nil {
			d = &digest{Signer: e.Signer()}
			by[e.Signer()] = d
		}
		d.Count++
		d.Hash ^= e.hash
	}
	out := make([]digest, 0, len(by))
	for _, d := range by {
		out = append(out, *d)
	}
	slices.SortFunc(out, func(a, b digest) int { return cmp.Compare(a.Signer.String(), b.Signer.String()) })
	return out
}

// lacking returns the signers of whom another member has something else than this one.
func (l *ledger) lacking(theirs []digest, share func(*Delta) bool) (signers []identity.NodeName) {
	ours := map[identity.NodeName]digest{}
	for _, d := range l.digests(share) {
		ours[d.Signer] = d
	}
	for _, d := range theirs {
		if d.Count > 0 && ours[d.Signer] != d {
			signers = append(signers, d.Signer)
		}
	}
	return signers
}

// of returns the entries of these signers that may be shared, ordered by key.
func (l *ledger) of(signers []identity.NodeName, share func(*Delta) bool) (out []Delta) {
	for _, e := range l.entries {
		if slices.Contains(signers, e.Signer()) && share(&e.Delta) {
			out = append(out, e.Delta)
		}
	}
	slices.SortFunc(out, func(a, b Delta) int { return cmp.Compare(a.Key, b.Key) })
	return out
}
