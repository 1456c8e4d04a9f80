package balance

import (
	"sync/atomic"
	"time"
)

// budget is a bucket of tokens, as Finagle has it: requests put a part of a token into it, a retry takes a whole one. So when all backends fail, retries do not multiply
// what they have to bear.
type budget struct {
	tokens atomic.Int64 // thousandths
	last   atomic.Int64 // when time put some in, nanoseconds since 1970
}

const (
	token = 1000
	// leastRetries a second are always allowed: a service with few requests has retries too.
	leastRetries = 10
	// mostTokens bounds what a quiet time can save up, in tokens.
	mostTokens = 1000
)

func (b *budget) begin(now time.Time) {
	b.tokens.Store(leastRetries * token)
	b.last.Store(now.UnixNano())
}

// arrived is called for each request.
func (b *budget) arrived(percent int) {
	if b.tokens.Load() < mostTokens*token {
		b.tokens.Add(int64(percent) * token / 100)
	}
}

// tick puts in what time brings, which is no more than a second's worth if it is not used.
func (b *budget) tick(now time.Time) {
	passed := now.UnixNano() - b.last.Swap(now.UnixNano())
	if passed > 0 && b.tokens.Load() < leastRetries*token {
		b.tokens.Add(min(passed, int64(time.Second)) * leastRetries * token / int64(time.Second))
	}
}

func (b *budget) take() bool {
	for {
		have := b.tokens.Load()
		if have < token {
			return false
		}
		if b.tokens.CompareAndSwap(have, have-token) {
			return true
		}
	}
}

func (p *port) arrived() { p.budget.arrived(p.route().Options.RetryBudget) }

func (p *port) retry(attempt int) bool {
	return attempt <= p.route().Options.Retries && p.budget.take()
}
