package sim

import (
	"math"
	"math/rand/v2"
)

// binomial returns how many of n independent trials of probability p succeed. It takes time for each success when these are
// few; when they are many it rounds a normal variable, which then differs by less than the model's other simplifications.
func binomial(r *rand.Rand, n int, p float64) int {
	switch {
	case n <= 0 || p <= 0:
		return 0
	case p >= 1:
		return n
	case p > 0.5:
		return n - binomial(r, n, 1-p)
	case float64(n)*p < 16:
		return byWaiting(r, n, p)
	}
	mean := float64(n) * p
	x := math.Round(mean + math.Sqrt(mean*(1-p))*r.NormFloat64())
	return int(min(max(x, 0), float64(n)))
}

// byWaiting jumps from success to success: the trials between two have a geometric distribution.
func byWaiting(r *rand.Rand, n int, p float64) (successes int) {
	scale := 1 / math.Log1p(-p)
	for at := 0.0; ; successes++ {
		at += math.Floor(math.Log(1-r.Float64())*scale) + 1
		if at > float64(n) {
			return successes
		}
	}
}

// geometric returns how many independent trials of probability p fail before the first that succeeds.
func geometric(r *rand.Rand, p float64) int {
	return int(math.Log(1-r.Float64()) / math.Log1p(-p))
}

// distinct returns k different numbers below n in random order; k must be much smaller than n, or n be small.
func distinct(r *rand.Rand, k, n int) []int {
	if n <= 4*k {
		return r.Perm(n)[:min(k, n)]
	}
	out := make([]int, 0, k)
next:
	for len(out) < k {
		x := r.IntN(n)
		for _, y := range out {
			if x == y {
				continue next
			}
		}
		out = append(out, x)
	}
	return out
}
