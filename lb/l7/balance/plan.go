package balance

import (
	"cmp"
	"math"
	"slices"
	"time"

	"causeway/lb"
)

// plan is who gets how much of a port's requests, as of one moment. It is immutable.
type plan struct {
	algorithm lb.L7Algorithm
	// all endpoints, in the order of their addresses; preferred are those that get anything, fallback the others.
	all, preferred, fallback []*Endpoint
	// sequence has each preferred endpoint as often as its share, evenly spread: round_robin walks along it, the others choose a place by chance.
	sequence []uint16
	// maglev is the table that hashes are looked up in; nil if the port does not hash.
	maglev []uint16
	// starting: some endpoint does not have its whole share yet.
	starting bool
}

const (
	// longestSequence bounds the sequence of unequal shares, and so how exact they are: within 1/4096 of all.
	longestSequence = 4096
	// maxEndpoints that a plan can tell apart.
	maxEndpoints = math.MaxUint16
)

func newPlan(r *lb.Route, all []*Endpoint, own string, near []string, now time.Time) *plan {
	all = all[:min(len(all), maxEndpoints)]
	p := &plan{algorithm: r.Options.Algorithm, all: all}
	shares, starting := sharesOf(&r.Options, all, own, near, now)
	p.starting = starting
	var weights []float64
	for i, e := range all {
		if shares[i] > 0 {
			p.preferred, weights = append(p.preferred, e), append(weights, shares[i])
		} else {
			p.fallback = append(p.fallback, e)
		}
	}
	// Those that are well come first when all that were preferred have been tried.
	slices.SortStableFunc(p.fallback, func(a, b *Endpoint) int { return cmp.Compare(rank(a), rank(b)) })
	p.sequence = interleave(weights)
	if r.Options.Algorithm == lb.Hashed {
		p.maglev = maglev(p.preferred, weights)
	}
	return p
}

func rank(e *Endpoint) int {
	if e.healthy() {
		return 0
	}
	return 1
}

func (p *plan) at(n uint64) *Endpoint { return p.preferred[p.sequence[n%uint64(len(p.sequence))]] }

func (p *plan) hashed(q *Query) (*Endpoint, error) {
	start := q.Hash % uint64(len(p.maglev))
	// Somebody else's turn is found within a few entries, as they are spread at random.
	for i := range uint64(min(len(p.maglev), 64)) {
		e := p.preferred[p.maglev[(start+i)%uint64(len(p.maglev))]]
		if !slices.Contains(q.Tried, e) {
			return e, nil
		}
	}
	return p.another(q.Tried, q.Hash)
}

// another finds an endpoint that was not tried yet.
func (p *plan) another(tried []*Endpoint, start uint64) (*Endpoint, error) {
	for i := range uint64(len(p.preferred)) {
		e := p.preferred[(start+i)%uint64(len(p.preferred))]
		if !slices.Contains(tried, e) {
			return e, nil
		}
	}
	for _, e := range p.fallback {
		if !slices.Contains(tried, e) {
			return e, nil
		}
	}
	return nil, ErrNoBackend
}

// interleave returns a sequence in which each index is as often as its weight wants, at even distances.
func interleave(weights []float64) []uint16 {
	if len(weights) == 0 {
		return nil
	}
	counts := countsOf(weights)
	type turn struct {
		at    float64
		index int
	}
	var turns []turn
	for i, n := range counts {
		for k := range n {
			turns = append(turns, turn{(float64(k) + 0.5) / float64(n), i})
		}
	}
	slices.SortFunc(turns, func(a, b turn) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.index, b.index)) })
	sequence := make([]uint16, len(turns))
	for i, t := range turns {
		sequence[i] = uint16(t.index)
	}
	return sequence
}

// countsOf turns weights into how often each index is in the sequence: once if all are equal; otherwise by largest remainders, at least once.
func countsOf(weights []float64) []int {
	counts := make([]int, len(weights))
	equal, sum := true, 0.0
	for i, w := range weights {
		counts[i], sum = 1, sum+w
		equal = equal && math.Abs(w-weights[0]) < 1e-9
	}
	if equal {
		return counts
	}
	length := max(longestSequence, len(weights))
	rest := make([]float64, len(weights))
	left := length
	for i, w := range weights {
		exact := w / sum * float64(length)
		counts[i] = max(1, int(exact))
		rest[i] = exact - float64(counts[i])
		left -= counts[i]
	}
	order := make([]int, len(weights))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(rest[b], rest[a]) })
	for _, i := range order[:max(0, min(left, len(order)))] {
		counts[i]++
	}
	return counts
}
