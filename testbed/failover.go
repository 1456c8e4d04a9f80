package testbed

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"causeway/identity"
)

const (
	// FailoverDir is the directory of the test-bed that failover is measured on.
	FailoverDir = "/run/causeway/failover"

	// outInterval is how often the kernels are read: it bounds the error of a measured time.
	outInterval = 2 * time.Millisecond
	// outTimeout is when a kernel is no longer waited for.
	outTimeout = 15 * time.Second
	// leadTime and trailTime are for how long requests are sent before a kill and after it is out of every kernel.
	leadTime  = 300 * time.Millisecond
	trailTime = 500 * time.Millisecond
	// maxLate kernels in a row of rounds end the measurement: nothing seems to notice.
	maxLate = 3
	// spareClient sends where the first client would be killed.
	spareClient = "client-2"
)

// settledAgain is what has to hold before the next kill.
const settledAgain = "all is well; exactly the running servers in every kernel; every node is alive in every view; nothing is quarantined in any view"

// FailoverOptions say what is killed, how often, and under what load. Zero values are no defaults.
type FailoverOptions struct {
	// Dir of the measurement's own bed; empty: [FailoverDir].
	Dir string
	// Clusters and Nodes per cluster of the bed, each at least 2.
	Clusters, Nodes int
	// Kills of a random node, and ClusterKills of a random cluster.
	Kills, ClusterKills int
	// Rate of new connections per second from every cluster.
	Rate float64
	// Report, if set, is told each round when it is over, and of how many it is.
	Report func(round FailoverRound, n, of int)
}

func (o *FailoverOptions) validate() error {
	switch {
	case o.Clusters < 2 || o.Nodes < 2:
		return errors.New("failover takes at least 2 clusters of 2 nodes")
	case o.Kills < 0 || o.ClusterKills < 0 || o.Kills+o.ClusterKills == 0:
		return errors.New("say how many nodes or clusters to kill")
	case !(o.Rate > 0):
		return errors.New("the rate must be above 0 requests per second")
	}
	return nil
}

// FailoverRound is what came of one kill.
type FailoverRound struct {
	// Kind is node or cluster, Victim its name.
	Kind   string    `json:"kind"`
	Victim string    `json:"victim"`
	At     time.Time `json:"at"` // just before the first link was cut
	// OutMS is, by the node whose kernel it is, how long after that no backend of the victim was chosen from any more, in
	// milliseconds. Late are the nodes where that had not come after 15 s.
	OutMS map[string]float64 `json:"outMs"`
	Late  []string           `json:"late,omitempty"`
	// BackMS is how long after the links were up again all of them were chosen from.
	BackMS map[string]float64 `json:"backMs"`
	// Requests of all clients, how many of them failed, and how many of these were sent when the kernel of the client's node had
	// nothing of the victim, or well before the kill.
	Requests int            `json:"requests"`
	Failed   int            `json:"failed"`
	Stray    int            `json:"stray"`
	Errors   map[string]int `json:"errors"`
}

// failover is one measurement.
type failover struct {
	o     FailoverOptions
	world *bedWorld
}

// Failover kills nodes and clusters under load, one after the other on a bed of its own, and measures in the kernel of every node
// that is left how long it takes until nothing new goes there. The result has the rounds that were done, also with an error.
func Failover(ctx context.Context, o FailoverOptions) (*FailoverResult, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if o.Dir == "" {
		o.Dir = FailoverDir
	}
	setup := Setup{Nodes: o.Nodes, Service: "shop"}
	for i := range o.Clusters {
		setup.Clusters += fmt.Sprintf("c%d ", i+1)
	}
	bed, err := Up(ctx, Options{Dir: o.Dir, Clusters: setup.clusters(), Nodes: o.Nodes, Ephemeral: true})
	if err != nil {
		return nil, err
	}
	f := &failover{o: o}
	result := new(FailoverResult)
	if f.world, err = newBedWorld(ctx, bed, setup); err == nil {
		began := time.Now()
		if err = f.rounds(ctx, result); err != nil {
			err = f.world.explain(err, began)
		}
		err = errors.Join(err, f.world.close())
	}
	// Also when ctx has ended: Ctrl-C must not leave anything.
	err = errors.Join(err, bed.Down(context.WithoutCancel(ctx)))
	result.conclude()
	return result, err
}

func (f *failover) rounds(ctx context.Context, result *FailoverResult) error {
	for _, c := range f.world.setup.clusters() {
		if err := f.world.runClient(ctx, identity.NodeName{Cluster: c, Node: nodeName(2)}, spareClient); err != nil {
			return err
		}
	}
	if err := f.world.await(ctx, settledAgain); err != nil {
		return err
	}
	late := 0
	for n := range f.o.Kills + f.o.ClusterKills {
		round, err := f.round(ctx, f.victim(n))
		if err != nil {
			return fmt.Errorf("kill %d: %w", n+1, err)
		}
		result.Rounds = append(result.Rounds, *round)
		if f.o.Report != nil {
			f.o.Report(*round, n+1, f.o.Kills+f.o.ClusterKills)
		}
		if late += len(round.Late); len(round.Late) == 0 {
			late = 0
		}
		if late >= maxLate {
			return fmt.Errorf("%s stays in the kernels of %v after %v; giving up", round.Victim, round.Late, outTimeout)
		}
	}
	return nil
}

// victim chooses who is killed in round n: a node first, then clusters.
func (f *failover) victim(n int) Victim {
	node := f.world.nodes()[rand.IntN(f.o.Clusters*f.o.Nodes)]
	if n >= f.o.Kills {
		return Victim{Kind: kindCluster, Cluster: node.Cluster}
	}
	return Victim{Kind: kindNode, Cluster: node.Cluster, Node: node.Node}
}

// hits tells whether a node is killed with a victim.
func (v Victim) hits(n identity.NodeName) bool {
	return n.Cluster == v.Cluster && (v.Node == "" || v.Node == n.Node)
}

func (f *failover) round(ctx context.Context, v Victim) (*FailoverRound, error) {
	clients, stop, err := f.send(v)
	if err != nil {
		return nil, errors.Join(err, stop(nil))
	}
	round := &FailoverRound{Kind: v.Kind, Victim: scope{v.Cluster, v.Node}.String(), OutMS: map[string]float64{}, BackMS: map[string]float64{}, Errors: map[string]int{}}
	out, err := f.killAndWatch(ctx, v, round)
	if err != nil {
		return nil, errors.Join(err, stop(nil))
	}
	err = stop(func(cluster string, r *LoadResult) { round.count(r, out[clients[cluster]]) })
	if err != nil {
		return nil, err
	}
	if err := f.startAndWatch(ctx, v, round); err != nil {
		return nil, err
	}
	return round, f.world.await(ctx, settledAgain)
}

// send has a client of every cluster that is left send requests, from a node that is left. It returns those nodes, and what
// ends it and hands over the results.
func (f *failover) send(v Victim) (map[string]identity.NodeName, func(func(string, *LoadResult)) error, error) {
	clients := map[string]identity.NodeName{}
	stops := map[string]func() (*LoadResult, error){}
	stop := func(each func(string, *LoadResult)) error { return endAll(stops, each) }
	for _, c := range f.world.setup.clusters() {
		client, node := clientName, identity.NodeName{Cluster: c, Node: nodeName(1)}
		if v.hits(node) {
			client, node.Node = spareClient, nodeName(2)
		}
		if v.hits(node) {
			continue
		}
		end, err := f.world.send(Target{Cluster: c, Pod: client}, f.o.Rate)
		if err != nil {
			return nil, stop, err
		}
		clients[c], stops[c] = node, end
	}
	return clients, stop, nil
}

// endAll ends the sending of all clusters at once.
func endAll(stops map[string]func() (*LoadResult, error), each func(string, *LoadResult)) error {
	errs := new(collector)
	var mu sync.Mutex
	for cluster, stop := range stops {
		errs.run(func() error {
			result, err := stop()
			mu.Lock()
			defer mu.Unlock()
			if result != nil && each != nil {
				each(cluster, result)
			}
			return err
		})
	}
	return errs.wait()
}

// killAndWatch kills the victim and returns when each kernel that is left had nothing of it any more.
func (f *failover) killAndWatch(ctx context.Context, v Victim, round *FailoverRound) (map[identity.NodeName]time.Time, error) {
	if err := pause(ctx, leadTime); err != nil {
		return nil, err
	}
	gone, err := makeNone(arguments{round.Victim, ""}, &f.world.setup)
	if err != nil {
		return nil, err
	}
	out, err := f.watch(ctx, v, gone, func() (err error) {
		round.At, err = f.world.kill(ctx, v)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, n := range f.left(v) {
		if at, ok := out[n]; ok {
			round.OutMS[n.String()] = milliseconds(at.Sub(round.At))
		} else {
			round.Late = append(round.Late, n.String())
		}
	}
	return out, pause(ctx, trailTime)
}

// startAndWatch starts the victim again, and notes when each kernel had all of it back.
func (f *failover) startAndWatch(ctx context.Context, v Victim, round *FailoverRound) error {
	back, err := makeEvery(arguments{round.Victim, ""}, &f.world.setup)
	if err != nil {
		return err
	}
	var up time.Time
	seen, err := f.watch(ctx, v, back, func() error { return f.world.start(ctx, v, func(at time.Time) { up = at }) })
	for n, at := range seen {
		// Where it was never out it is not back either.
		if round.OutMS[n.String()] > 0 {
			round.BackMS[n.String()] = milliseconds(at.Sub(up))
		}
	}
	return err
}

// left are the nodes that are not killed with a victim.
func (f *failover) left(v Victim) []identity.NodeName {
	return slices.DeleteFunc(f.world.nodes(), v.hits)
}

// watch runs do, and meanwhile reads the kernels of the nodes that are left until a condition holds in each, or time is over. It
// returns when it did.
func (f *failover) watch(ctx context.Context, v Victim, c condition, do func() error) (map[identity.NodeName]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, outTimeout)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		err := do()
		if err != nil {
			cancel() // there is nothing to wait for
		}
		done <- err
	}()
	met, waiting := map[identity.NodeName]time.Time{}, f.left(v)
	for len(waiting) > 0 && ctx.Err() == nil {
		next := time.Now().Add(outInterval)
		waiting = slices.DeleteFunc(waiting, func(n identity.NodeName) bool {
			at, holds := f.lookAt(n, c)
			if holds {
				met[n] = at
			}
			return holds
		})
		_ = pause(ctx, time.Until(next))
	}
	return met, <-done
}

// lookAt tells whether a condition holds in one node's kernel, and when that was.
func (f *failover) lookAt(n identity.NodeName, c condition) (time.Time, bool) {
	s := &sight{kernels: map[identity.NodeName][]frontend{n: f.world.kernel(n)}}
	f.world.snapshot(s)
	holds := c.problem(s) == ""
	return time.Now(), holds
}

// count adds the requests of a client, whose kernel had nothing of the victim any more at a time; the zero time: never.
func (r *FailoverRound) count(l *LoadResult, out time.Time) {
	r.Requests += l.Requests
	r.Failed += l.Failed
	for reason, n := range l.Errors {
		r.Errors[reason] += n
	}
	for _, failed := range l.Failures {
		early := failed.Sent.Before(r.At.Add(-beforeFault))
		late := !out.IsZero() && failed.Sent.After(out.Add(outInterval))
		if early || late {
			r.Stray++
		}
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
