package sim

import (
	"math/rand/v2"
	"slices"
	"time"

	"causeway/clustermesh/gossip"
)

// What turns an accusation into a verdict, besides gossip.Timing; clustermesh/gossip has the same.
const (
	watchers      = 2                     // of a node; they are chosen by rendezvous, so they are any two
	stepInterval  = 30 * time.Millisecond // between two looks of a watcher that has something to look at
	urgentMembers = 16                    // that who issues a verdict, or carries it to another tier, tells at once
)

// accusation is how a pool comes to call members dead that are.
type accusation struct {
	heard *curve // of the suspicion
	dead  *curve // of the declaration of death
}

// first returns when the first member declares it: it was the first that suspected.
func (a *accusation) first() int { return a.dead.first }

// accuse simulates what follows when some members of a pool die at step 0. m.live must not count them.
func accuse(r *rand.Rand, m medium, dead int) *accusation {
	failed := missed(r, m, dead)
	a := &accusation{}
	for i := range failed {
		failed[i].at += steps(m.ProbeInterval) // until then there may be an answer, indirectly or over TCP
	}
	a.heard = spread(r, m, failed)
	a.dead = spread(r, m, a.heard.later(steps(m.suspicion())))
	return a
}

// later returns the curve as seeds, all that much later: each suspicion runs out by itself.
func (c *curve) later(by int) (seeds []seed) {
	before := 0
	for i, known := range c.known {
		if known > before {
			seeds = append(seeds, seed{c.first + i + by, known - before})
			before = known
		}
	}
	return seeds
}

// few is up to how many members each one's probes are drawn; of more, only how many hit a dead one.
const few = 2000

// missed returns when probes are sent to the dead members that start a suspicion: the first, and those until its failure
// has gone round.
func missed(r *rand.Rand, m medium, dead int) []seed {
	interval := steps(m.ProbeInterval)
	if m.live <= few {
		return merge(firstProbes(r, m, dead, interval), 2*interval)
	}
	var found []seed
	share := float64(dead) / float64(m.members-1)
	for at := 0; len(found) == 0 || at < found[0].at+2*interval; at++ {
		if hits := binomial(r, binomial(r, m.live, 1/float64(interval)), share); hits > 0 {
			found = append(found, seed{at, hits})
		}
	}
	return found
}

// firstProbes returns for each live member when it first probes a dead one.
func firstProbes(r *rand.Rand, m medium, dead, interval int) []int {
	out := make([]int, m.live)
	for i := range out {
		wait := turns(r, m.members-1)
		for range dead - 1 {
			wait = min(wait, turns(r, m.members-1))
		}
		out[i] = r.IntN(interval) + wait*interval
	}
	slices.Sort(out)
	return out
}

// turns returns how many probes of others come before the one of a given member, of so many: all are probed in an order
// that is shuffled after each round.
func turns(r *rand.Rand, others int) int {
	next, victim := r.IntN(others), r.IntN(others)
	if victim >= next {
		return victim - next
	}
	return others - next + r.IntN(others)
}

// merge makes seeds of ascending steps, up to window after the first.
func merge(at []int, window int) (seeds []seed) {
	for _, x := range at {
		switch last := len(seeds) - 1; {
		case last >= 0 && x > seeds[0].at+window:
			return seeds
		case last >= 0 && seeds[last].at == x:
			seeds[last].members++
		default:
			seeds = append(seeds, seed{x, 1})
		}
	}
	return seeds
}

// verdict returns when a dead node is one for sure: when the first of its watchers has known of the accusation for as long as
// the data path's silence takes, and the other has said that it gets no answer either.
func verdict(r *rand.Rand, m medium, t gossip.Timing, a *accusation) int {
	heard := m.live
	for _, rank := range distinct(r, watchers, m.live) {
		heard = min(heard, rank)
	}
	// The first echo is sent at once, and the last counts as soon as it is sent.
	echoes := time.Duration(t.Echoes-1) * (t.Urgent + stepInterval - 1) / stepInterval * stepInterval
	at := a.dead.at(heard) + steps(max(t.Silence-m.Accused(m.members), echoes)) + r.IntN(steps(stepInterval))
	for m.live > 1 && r.Float64() < m.loss { // the other's report gets lost; there is one with each of its echoes
		at += steps(t.Urgent)
	}
	return at
}
