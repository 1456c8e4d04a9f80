package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
)

// How the data path to a peer is watched: a few of its nodes are asked by echoes on the way of pods' packets.
const (
	// echoInterval is the time between two echoes to a peer, as long as there are at most echoPeers; with more of them it
	// grows, so that what a node sends does not grow with the mesh.
	echoInterval = time.Second
	echoPeers    = 16
	// echoNodes of a peer are asked in turn.
	echoNodes = 2
	// echoWindow is how many of the last echoes loss is counted over.
	echoWindow = 20
	// fullEvery is how many echoes a full-size one comes after.
	fullEvery = 2
	// echoPatience is how long the data path may be silent before it counts as broken, in intervals.
	echoPatience = 3
	// echoTimeout is how long an answer may take. Until the first one, which is waited for, questions follow faster.
	echoTimeout   = time.Second
	firstTimeout  = 200 * time.Millisecond
	firstInterval = 50 * time.Millisecond
)

// asker sends echoes: datapath.Echo.
type asker interface {
	Send(node netip.Addr, nonce uint64) error
	SendPods(podSide netip.Addr, nonce uint64, size int) error
}

// links watches the data path to every peer.
type links struct {
	tables *clustermesh.Tables
	self   identity.NodeName
	echo   asker
	mtu    int // of pods

	mu      sync.Mutex
	links   map[*link]struct{}
	waiting map[uint64]*sent
}

// sent is an echo that may still be answered.
type sent struct {
	at       time.Time
	answered chan time.Duration // buffered; gets the round trip
}

// link is the data path to one peer.
type link struct {
	*links
	cluster string
	end     context.CancelFunc
	done    chan struct{}

	// measured is when the path's MTU was searched last.
	measured time.Time

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
	node        identity.NodeName
	// window are the outcomes of the last echoes, the newest last.
	window []bool
	// full is the same of the last full-size ones, of which only those count that a small one got through beside.
	full []bool
	// mtu is the largest packet that gets through, 0 if not known; it is measured when full-size ones do not.
	mtu      int
	interval time.Duration
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
	return now.Sub(since) > echoPatience*max(s.interval, echoInterval)
}

// narrow tells whether packets of the pods' size are lost while small ones get through.
func (s linkState) narrow() bool {
	return len(s.full) >= 2 && !slices.Contains(s.full[len(s.full)-2:], true)
}

func newLinks(tables *clustermesh.Tables, self identity.NodeName, echo asker, mtu int) *links {
	return &links{tables: tables, self: self, echo: echo, mtu: mtu, links: map[*link]struct{}{}, waiting: map[uint64]*sent{}}
}

// open watches the data path to a peer until close.
func (ls *links) open(c *channel) *link {
	l := &link{links: ls, cluster: c.cluster, done: make(chan struct{}), state: linkState{opened: time.Now()}}
	var ctx context.Context
	ctx, l.end = context.WithCancel(context.Background())
	ls.mu.Lock()
	ls.links[l] = struct{}{}
	ls.mu.Unlock()
	go func() {
		defer close(l.done)
		l.run(ctx)
	}()
	return l
}

func (ls *links) close(l *link) {
	l.end()
	<-l.done
	ls.mu.Lock()
	defer ls.mu.Unlock()
	delete(ls.links, l)
}

// answered takes an echo's answer, if it is to one of these; others are gossip's.
func (ls *links) answered(a datapath.EchoAnswer) bool {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	s, ok := ls.waiting[a.Nonce]
	if !ok {
		return false
	}
	delete(ls.waiting, a.Nonce)
	s.answered <- a.At.Sub(s.at)
	return true
}

// interval between two echoes to a peer.
func (ls *links) interval() time.Duration {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return max(echoInterval, echoInterval*time.Duration(len(ls.links))/echoPeers)
}

// errNoAnswer says that an echo was not answered in time.
var errNoAnswer = errors.New("no answer")

// ask sends an echo and waits for the answer.
func (ls *links) ask(ctx context.Context, timeout time.Duration, send func(nonce uint64) error) (time.Duration, error) {
	nonce := rand.Uint64()
	s := &sent{at: time.Now(), answered: make(chan time.Duration, 1)}
	ls.mu.Lock()
	ls.waiting[nonce] = s
	ls.mu.Unlock()
	defer func() {
		ls.mu.Lock()
		defer ls.mu.Unlock()
		delete(ls.waiting, nonce)
	}()
	if err := send(nonce); err != nil {
		return 0, err
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case rtt := <-s.answered:
		return rtt, nil
	case <-timer.C:
		return 0, fmt.Errorf("%w within %s", errNoAnswer, timeout)
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// askPods sends an echo of a size from this node's pod side to another's.
func (ls *links) askPods(ctx context.Context, node identity.Node, size int, timeout time.Duration) (time.Duration, error) {
	return ls.ask(ctx, timeout, func(nonce uint64) error { return ls.echo.SendPods(node.PodSide(), nonce, size) })
}

// nodesToAsk returns the nodes of a cluster that this one asks: those that are in service before others, and
// each node of this cluster other ones.
func (ls *links) nodesToAsk(cluster string) []identity.Node {
	txn := ls.tables.DB.ReadTxn()
	type candidate struct {
		node identity.Node
		dead bool
		rank uint64
	}
	var all []candidate
	for row := range ls.tables.Nodes.All(txn) {
		if row.Object.Cluster != cluster || !row.Object.PodSide().IsValid() {
			continue
		}
		h := fnv.New64a()
		h.Write([]byte(ls.self.String() + " " + row.Object.Name))
		c := candidate{node: row.Object, rank: h.Sum64()}
		if life, _, ok := ls.tables.Liveness.Get(txn, ls.tables.Liveness.ByKey(row.Object.NodeName().String())); ok {
			c.dead = life.Object.State == identity.NodeDead || life.Object.State == identity.NodeSuspect || life.Object.State == identity.NodeLeft
		}
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b candidate) int {
		return cmp.Or(compareBool(a.dead, b.dead), cmp.Compare(a.rank, b.rank))
	})
	var nodes []identity.Node
	for _, c := range all[:min(len(all), echoNodes)] {
		nodes = append(nodes, c.node)
	}
	return nodes
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// run asks until ctx ends. The first echoes follow each other fast, until one has been answered.
func (l *link) run(ctx context.Context) {
	for n := 0; ; n++ {
		interval := l.interval()
		nodes := l.nodesToAsk(l.cluster)
		if len(nodes) > 0 {
			l.round(ctx, nodes[n%len(nodes)], n%fullEvery == 0 || l.snapshot().mtu == 0, interval)
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

// round asks one node.
func (l *link) round(ctx context.Context, node identity.Node, full bool, interval time.Duration) {
	begun, timeout := time.Now(), echoTimeout
	if l.snapshot().last.IsZero() {
		timeout = firstTimeout
	}
	rtt, err := l.askPods(ctx, node, 0, timeout)
	if ctx.Err() != nil {
		return
	}
	l.mu.Lock()
	l.state.tried, l.state.node, l.state.interval = begun, node.NodeName(), interval
	if err == nil && l.state.last.IsZero() {
		l.state.window = nil // what was sent before the other side knew of this one was not lost on the way
	}
	l.state.window = appendWindow(l.state.window, err == nil)
	if err == nil {
		l.state.last, l.state.rtt = begun.Add(rtt), rtt
	}
	l.mu.Unlock()
	if err != nil || !full {
		return
	}
	_, err = l.askPods(ctx, node, l.mtu, echoTimeout)
	if ctx.Err() != nil {
		return
	}
	l.mu.Lock()
	l.state.full = appendWindow(l.state.full, err == nil)
	narrow := l.state.narrow()
	if !narrow && err == nil {
		l.state.mtu = l.links.mtu
	}
	l.mu.Unlock()
	if narrow && begun.Sub(l.measured) > measureInterval {
		l.measured = begun
		mtu := l.measureMTU(ctx, node, echoTimeout/4, l.heard)
		l.mu.Lock()
		l.state.mtu = mtu
		l.mu.Unlock()
	}
}

// heard notes that an echo was answered just now.
func (l *link) heard(rtt time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.last, l.state.rtt = time.Now(), rtt
}

func appendWindow(window []bool, ok bool) []bool {
	window = append(window, ok)
	return slices.Clone(window[max(0, len(window)-echoWindow):])
}

// smallestMTU is the least that IPv4 may be sent over everywhere, RFC 791 and common sense; below it nothing is searched.
const smallestMTU = 576

// measureInterval is how often the MTU of a path that is too narrow is searched again.
const measureInterval = 10 * time.Second

// measureMTU returns the largest packet of pods that gets through to a node, by halving: about 10 echoes. 0 is none.
func (ls *links) measureMTU(ctx context.Context, node identity.Node, timeout time.Duration, heard func(time.Duration)) int {
	through := func(size int) bool {
		for range 2 {
			if rtt, err := ls.askPods(ctx, node, size, timeout); err == nil {
				heard(rtt)
				return true
			}
		}
		return false
	}
	low, high := smallestMTU, ls.mtu
	if !through(low) {
		return 0
	}
	for low < high && ctx.Err() == nil {
		middle := (low + high + 1) / 2
		if through(middle) {
			low = middle
		} else {
			high = middle - 1
		}
	}
	return low
}

func (l *link) snapshot() linkState {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.state
	s.window, s.full = slices.Clone(s.window), slices.Clone(s.full)
	return s
}
