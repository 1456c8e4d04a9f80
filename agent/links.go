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
	"syscall"
	"time"

	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
)

// echoGrace is how long larger echoes may come after the smallest of a volley, which is sent last.
const echoGrace = 30 * time.Millisecond

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
	// narrowed is told the largest packet of pods that gets to a cluster, in bytes, when that changes; 0: as large as they are. It may be nil.
	narrowed func(cluster string, mtu int)

	mu      sync.Mutex
	links   map[*link]struct{}
	waiting map[uint64]*sent
}

// sent is an echo that may still be answered.
type sent struct {
	at       time.Time
	index    int            // in its volley
	answered chan<- arrival // has room
}

// arrival of an answer.
type arrival struct {
	index int
	rtt   time.Duration
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

// close ends the watching. What was measured counts no more.
func (ls *links) close(l *link) {
	l.end()
	<-l.done
	ls.mu.Lock()
	delete(ls.links, l)
	ls.mu.Unlock()
	if l.snapshot().limit != 0 {
		ls.tell(l.cluster, 0)
	}
}

func (ls *links) tell(cluster string, mtu int) {
	if ls.narrowed != nil {
		ls.narrowed(cluster, mtu)
	}
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
	s.answered <- arrival{s.index, a.At.Sub(s.at)}
	return true
}

// interval between two volleys to a peer.
func (ls *links) interval() time.Duration {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return max(echoInterval, echoInterval*time.Duration(len(ls.links))/echoPeers)
}

// errNoAnswer says that an echo was not answered in time.
var errNoAnswer = errors.New("no answer")

// send sends an echo whose answer comes on a channel, until forget.
func (ls *links) send(s *sent, send func(nonce uint64) error) (nonce uint64, err error) {
	nonce, s.at = rand.Uint64(), time.Now()
	ls.mu.Lock()
	ls.waiting[nonce] = s
	ls.mu.Unlock()
	return nonce, send(nonce)
}

func (ls *links) forget(nonces ...uint64) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for _, nonce := range nonces {
		delete(ls.waiting, nonce)
	}
}

// ask sends an echo and waits for the answer.
func (ls *links) ask(ctx context.Context, timeout time.Duration, send func(nonce uint64) error) (time.Duration, error) {
	answered := make(chan arrival, 1)
	nonce, err := ls.send(&sent{answered: answered}, send)
	defer ls.forget(nonce)
	if err != nil {
		return 0, err
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case a := <-answered:
		return a.rtt, nil
	case <-timer.C:
		return 0, fmt.Errorf("%w within %s", errNoAnswer, timeout)
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// volley is what came of echoes that were sent to a node together.
type volley struct {
	// through tells of each size whether its echo was answered.
	through []bool
	// rtt of the smallest possible echo, which goes with each volley, and err, why it has no answer: then the others' silence says nothing of sizes.
	rtt time.Duration
	err error
}

// heard tells whether anything was answered.
func (v volley) heard() bool { return v.err == nil || slices.Contains(v.through, true) }

// volley sends echoes of some sizes, in bytes, from this node's pod side to another's, and the smallest possible one after them, and waits for the answers. On
// their way packets hardly overtake each other, so those that are not there a moment after the smallest one were lost, however slow the way is.
func (ls *links) volley(ctx context.Context, node identity.Node, sizes []int, timeout time.Duration) volley {
	v := volley{through: make([]bool, len(sizes)), err: fmt.Errorf("%w within %s", errNoAnswer, timeout)}
	answered := make(chan arrival, len(sizes)+1)
	nonces := make([]uint64, 0, len(sizes)+1)
	defer func() { ls.forget(nonces...) }()
	for i, size := range append(slices.Clone(sizes), 0) {
		nonce, err := ls.send(&sent{index: i, answered: answered}, func(nonce uint64) error { return ls.echo.SendPods(node.PodSide(), nonce, size) })
		nonces = append(nonces, nonce)
		if err != nil && !errors.Is(err, syscall.EMSGSIZE) { // that would be too large for this node's own device
			v.err = err
			return v
		}
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for range nonces {
		select {
		case a := <-answered:
			if a.index < len(sizes) {
				v.through[a.index] = true
				continue
			}
			v.rtt, v.err = a.rtt, nil
			timer.Reset(max(echoGrace, a.rtt/2))
		case <-timer.C:
			return v
		case <-ctx.Done():
			v.err = ctx.Err()
			return v
		}
	}
	return v
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
