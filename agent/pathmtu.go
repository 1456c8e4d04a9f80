package agent

import (
	"context"
	"slices"
	"time"

	"causeway/identity"
)

// Path MTU toward a peer. Routers of the underlay may lose what is too large without a word, and what they say is not authenticated, so it is measured:
// by echoes as large as pods' packets may be, with each round. When two in a row are lost, and small ones are not, the size that gets through is searched
// at once, and packets toward that cluster are kept to it.
const (
	// smallestMTU is the least that IPv4 may be sent over everywhere, RFC 791 and common sense; below it nothing is searched.
	smallestMTU = 576
	// ladderSteps is about how many sizes are tried at the same time. Three ladders find a size to the byte.
	ladderSteps = 10
	// ladderTries is how often a ladder is sent if nothing of it is answered.
	ladderTries = 3
	// ladderTimeout is the least time that a ladder is waited for; with a slow way it is ladderRTTs round trips.
	ladderTimeout = 250 * time.Millisecond
	ladderRTTs    = 3
	// searchInterval is the least time between two searches: what is lost by chance must not set them off again and again.
	searchInterval = time.Second
	// widenInterval is the time between two tries whether packets of full size get through again; with each of widenSearch, sizes between are searched.
	widenInterval = 5 * time.Second
	widenSearch   = 6
)

// width is what a link remembers of measuring, for its own goroutine alone.
type width struct {
	searched, widened time.Time
	tries             int
	narrowest         identity.NodeName // that the limit is of
}

// fullFor is how large packets to a node are at most: this node's, or the other's if its own link is smaller.
func (l *link) fullFor(node identity.Node) int {
	if node.MTU > 0 {
		return min(l.links.mtu, node.MTU)
	}
	return l.links.mtu
}

// sizeFor is how large packets to a node may be now.
func (l *link) sizeFor(node identity.Node) int {
	if limit := l.snapshot().limit; limit > 0 {
		return min(limit, l.fullFor(node))
	}
	return l.fullFor(node)
}

// carries notes that packets of a size get through.
func (l *link) carries(size int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.mtu, l.state.tooNarrow = max(l.state.mtu, size), false
}

// lower searches the size that gets through to a node, and keeps packets toward its cluster to it.
func (l *link) lower(ctx context.Context, node identity.Node, lost int) {
	now := time.Now()
	if now.Sub(l.width.searched) < searchInterval {
		return
	}
	l.width.searched = now
	mtu, err := l.search(ctx, node, smallestMTU-1, lost, l.ladderTimeout())
	switch {
	case err != nil || mtu == lost: // the way is not clear now, or it was chance
	case mtu == 0:
		l.mu.Lock()
		l.state.tooNarrow = true
		l.mu.Unlock()
	default:
		l.width.narrowest, l.width.widened, l.width.tries = node.NodeName(), now, 0
		l.limit(mtu)
	}
}

// limit has packets toward the peer kept to a size; 0: to none.
func (l *link) limit(mtu int) {
	l.mu.Lock()
	s := &l.state
	s.before, s.limit, s.changed = s.limit, mtu, time.Now()
	if s.before == 0 {
		s.before = l.links.mtu
	}
	s.mtu, s.tooNarrow = mtu, false
	if mtu == 0 {
		s.mtu = l.links.mtu
	}
	l.mu.Unlock()
	l.tell(l.cluster, mtu)
}

// widen tries now and then whether larger packets get through again to the node that the limit is of.
func (l *link) widen(ctx context.Context, nodes []identity.Node) {
	limit, now := l.snapshot().limit, time.Now()
	if limit == 0 || now.Sub(l.width.widened) < widenInterval {
		return
	}
	l.width.widened = now
	l.width.tries++
	node := nodes[0]
	if i := slices.IndexFunc(nodes, func(n identity.Node) bool { return n.NodeName() == l.width.narrowest }); i >= 0 {
		node = nodes[i]
	}
	full := l.fullFor(node)
	if l.surely(ctx, node, full) {
		l.limit(0)
		return
	}
	if l.width.tries%widenSearch != 0 {
		return
	}
	if mtu, err := l.search(ctx, node, limit, full, l.ladderTimeout()); err == nil && mtu > limit && mtu < full && l.surely(ctx, node, mtu) {
		l.limit(mtu)
	}
}

// surely tells whether a size gets through twice.
func (l *link) surely(ctx context.Context, node identity.Node, size int) bool {
	for range 2 {
		if v := l.volley(ctx, node, []int{size}, echoTimeout); v.err != nil || !v.through[0] {
			return false
		}
	}
	return true
}

func (l *link) ladderTimeout() time.Duration {
	return min(max(ladderTimeout, ladderRTTs*l.snapshot().rtt), echoTimeout)
}

// search returns the largest packet of pods that gets through to a node, in bytes, of those that are larger than one and at most as large as another: by
// ladders of sizes, each between two steps of the one before. It returns the smaller bound if none does, or 0 if that was not searched either, as it is
// less than smallestMTU. An error means that nothing came back at all.
func (ls *links) search(ctx context.Context, node identity.Node, above, most int, timeout time.Duration) (int, error) {
	for {
		sizes := ladder(above, most)
		v, err := ls.ladder(ctx, node, sizes, timeout)
		if err != nil {
			return 0, err
		}
		switch i := slices.Index(v.through, true); {
		case i < 0 && above < smallestMTU:
			return 0, nil
		case i < 0:
			return above, nil
		case i == 0 || sizes[i-1]-sizes[i] == 1:
			return sizes[i], nil
		default:
			above, most = sizes[i], sizes[i-1]
		}
	}
}

// ladder sends a volley until the smallest echo of one was answered, so that it says something of sizes.
func (ls *links) ladder(ctx context.Context, node identity.Node, sizes []int, timeout time.Duration) (v volley, err error) {
	for range ladderTries {
		if v = ls.volley(ctx, node, sizes, timeout); v.err == nil || ctx.Err() != nil {
			break
		}
	}
	return v, v.err
}

// ladder returns about ladderSteps sizes that are larger than one and at most as large as another, both ends included, the largest first.
func ladder(above, most int) (sizes []int) {
	step := (most - above + ladderSteps - 1) / ladderSteps
	for size := most; size > above+1; size -= step {
		sizes = append(sizes, size)
	}
	return append(sizes, above+1)
}
