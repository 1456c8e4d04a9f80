package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"causeway/identity"
)

// How the data path to a peer is watched: a few of its nodes are asked by echoes on the way of pods' packets.
const (
	// echoInterval is the time between two volleys to a peer, as long as there are at most echoPeers; with more of them it
	// grows, so that what a node sends does not grow with the mesh.
	echoInterval = 300 * time.Millisecond
	echoPeers    = 8
	// echoNodes of a peer are asked in turn.
	echoNodes = 2
	// echoWindow is how many of the last echoes loss is counted over.
	echoWindow = 60
	// echoPatience is how long the data path may be silent before it counts as broken: so long, or so many intervals.
	echoPatience  = 3 * time.Second
	echoIntervals = 3
	// echoTimeout is how long an answer may take. Until the first one, which is waited for, questions follow faster.
	echoTimeout   = time.Second
	firstTimeout  = 200 * time.Millisecond
	firstInterval = 50 * time.Millisecond
)

// link is the data path to one peer.
type link struct {
	*links
	cluster string
	end     context.CancelFunc
	done    chan struct{}
	width   width

	mu    sync.Mutex
	state linkState
}

// linkState is what is known of the data path to a peer.
type linkState struct {
	// opened is when it was first looked at.
	opened time.Time
	// last is when an echo was answered, rtt its round trip; tried when the last one was sent, and to whom.
	last, tried time.Time
	rtt         time.Duration
	node        identity.Node
	// window are the outcomes of the last small echoes, the newest last.
	window   []bool
	interval time.Duration

	// mtu is the largest packet that is known to get through, in bytes; 0 if that is not known.
	mtu int
	// limit is what packets toward the peer are kept to, in bytes, since larger ones do not get through; 0 if all do.
	limit int
	// changed is when the limit did, before what packets were kept to until then.
	changed time.Time
	before  int
	// tooNarrow: not even packets of smallestMTU get through, but small ones do.
	tooNarrow bool
}

// loss of the window, in percent.
func (s linkState) loss() float64 {
	if len(s.window) == 0 {
		return 0
	}
	lost := 0
	for _, ok := range s.window {
		if !ok {
			lost++
		}
	}
	return 100 * float64(lost) / float64(len(s.window))
}

// silent tells whether the data path has been silent for too long.
func (s linkState) silent(now time.Time) bool {
	since := s.last
	if since.Before(s.opened) {
		since = s.opened
	}
	return now.Sub(since) > max(echoPatience, echoIntervals*s.interval)
}

// run asks until ctx ends. The first echoes follow each other fast, until one has been answered.
func (l *link) run(ctx context.Context) {
	for n := 0; ; n++ {
		interval := l.interval()
		nodes := l.nodesToAsk(l.cluster)
		if len(nodes) > 0 {
			l.round(ctx, nodes[n%len(nodes)], interval)
			l.widen(ctx, nodes)
		}
		if l.snapshot().last.IsZero() {
			interval = firstInterval
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return
		}
	}
}

// round asks one node by an echo as large as packets to it may be, and a small one.
func (l *link) round(ctx context.Context, node identity.Node, interval time.Duration) {
	begun, size, timeout := time.Now(), l.sizeFor(node), echoTimeout
	if l.snapshot().last.IsZero() {
		timeout = firstTimeout
	}
	v := l.volley(ctx, node, []int{size}, timeout)
	if ctx.Err() != nil {
		return
	}
	l.note(node, begun, interval, v)
	if v.err == nil && !v.through[0] {
		// Once more, as any packet may be lost.
		v = l.volley(ctx, node, []int{size}, timeout)
		if v.err == nil && !v.through[0] {
			l.lower(ctx, node, size)
		}
	}
	if v.through[0] {
		l.carries(size)
	}
}

// note keeps what came of a volley.
func (l *link) note(node identity.Node, begun time.Time, interval time.Duration, v volley) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &l.state
	s.tried, s.node, s.interval = begun, node, interval
	if v.heard() && s.last.IsZero() {
		s.window = nil // what was sent before the other side knew of this one was not lost on the way
	}
	s.window = appendWindow(s.window, v.err == nil)
	if v.err == nil {
		s.rtt = v.rtt
	}
	if v.heard() {
		s.last = begun.Add(v.rtt)
	}
}

func appendWindow(window []bool, ok bool) []bool {
	window = append(window, ok)
	return slices.Clone(window[max(0, len(window)-echoWindow):])
}

func (l *link) snapshot() linkState {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.state
	s.window = slices.Clone(s.window)
	return s
}
