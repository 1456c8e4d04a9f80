package gossip

import (
	"cmp"
	"slices"

	"github.com/cespare/xxhash/v2"

	"causeway/identity"
)

// Speakers is how many nodes of a cluster speak for it in the mesh: enough that one may die and another be slow.
const Speakers = 3

// choose returns the k candidates that rank highest for a purpose, by rendezvous hashing (Thaler and Ravishankar, 1998):
// whoever has the same candidates chooses the same, and one candidate more or less changes as little as possible.
func choose(purpose string, candidates []identity.NodeName, k int) []identity.NodeName {
	type ranked struct {
		name  identity.NodeName
		score uint64
	}
	all := make([]ranked, 0, len(candidates))
	for _, name := range candidates {
		all = append(all, ranked{name, xxhash.Sum64String(purpose + "\x00" + name.String())})
	}
	slices.SortFunc(all, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(b.score, a.score), cmp.Compare(a.name.String(), b.name.String()))
	})
	out := make([]identity.NodeName, 0, k)
	for _, r := range all[:min(k, len(all))] {
		out = append(out, r.name)
	}
	return out
}

// speakersOf chooses a cluster's speakers among its live nodes.
func speakersOf(live []identity.NodeName) []identity.NodeName {
	return choose("speaker", live, Speakers)
}

// watchersOf chooses who watches a node that does not answer, among the live nodes of its cluster.
func watchersOf(subject identity.NodeName, live []identity.NodeName) []identity.NodeName {
	return choose("watcher of "+subject.String(), live, 2)
}
