// Package sim asks how gossip behaves without any network: how soon a mesh of a given size knows that a node or a cluster is dead,
// what that costs, and how often it is wrong. There is a model for any size, and real members of memberlist on a network
// in memory, for sizes that one machine can run, to check the model with. docs/gossip.md has the results.
package sim

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"causeway/clustermesh/gossip"
	"causeway/identity"

	"golang.org/x/sync/errgroup"
)

// Options is what to simulate: every combination of Nodes, Clusters and Loss that has at least MinPerCluster nodes a cluster.
type Options struct {
	Nodes    []int     // of the whole mesh, 3 to MaxNodes
	Clusters []int     // 1 to MaxClusters
	Loss     []float64 // share of packets that get lost, each for itself; 0 to MaxLoss

	Trials int    // deaths of nodes, and of clusters, for each combination
	Seed   uint64 // the same seed gives the same rows

	RTT     time.Duration  // between nodes of one cluster
	MeshRTT time.Duration  // between clusters
	Cluster gossip.Profile // of the cluster pools
	Mesh    gossip.Profile // of the mesh pool
	Timing  gossip.Timing  // of the verdicts

	// Progress is told how many of all rows are done, from any goroutine; it may be nil.
	Progress func(done, all int)
}

// Bounds of Options.
const (
	MinPerCluster = 3
	MaxClusters   = int(^identity.ClusterID(0))
	MaxNodes      = 1_000_000
	MaxTrials     = 100_000
	MaxLoss       = 0.5
	MaxRTT        = time.Second
)

// Defaults returns what docs/gossip.md shows.
func Defaults() Options {
	rtt := 30 * time.Millisecond
	return Options{
		Nodes:    []int{10, 100, 1000, 5000, 10_000, 100_000, 1_000_000},
		Clusters: []int{1, 3, 255},
		Loss:     []float64{0, 0.01, 0.05},
		Trials:   200, Seed: 1,
		RTT: time.Millisecond, MeshRTT: rtt,
		Cluster: gossip.ClusterProfile(), Mesh: gossip.MeshProfile(rtt),
		Timing: gossip.DefaultTiming(),
	}
}

// Row is what the model says of one combination. Times are in milliseconds from the death on.
type Row struct {
	Nodes    int     `json:"nodes"`
	Clusters int     `json:"clusters"`
	Loss     float64 `json:"loss"`
	Trials   int     `json:"trials"`

	// Accused is when the first member of the dead node's pool declares it dead, Detected when there is a verdict, and
	// Everywhere when the last node of the mesh knows.
	Accused    Quantiles `json:"accusedMs"`
	Detected   Quantiles `json:"detectedMs"`
	Everywhere Quantiles `json:"everywhereMs"`
	// Missed is the share of verdicts that gossip did not carry to everyone, so that an exchange of states had to.
	Missed float64 `json:"missed"`
	// ClusterEverywhere is when the last node of the others knows that a whole cluster is dead; nil with one cluster.
	ClusterEverywhere *Quantiles `json:"clusterEverywhereMs,omitempty"`

	// What an ordinary node and a speaker send in a second while nothing changes, and what an ordinary node sends of each
	// change.
	PacketsPerSecond      float64 `json:"packetsPerSecond"`
	BytesPerSecond        float64 `json:"bytesPerSecond"`
	SpeakerBytesPerSecond float64 `json:"speakerBytesPerSecond"`
	BytesPerChange        float64 `json:"bytesPerChange"`

	// FalseAccusationsPerHour is how often a live node is declared dead by a member of its pool, and FalseQuarantinesPerDay how
	// often there is a verdict on one, each for one node. Both are too rare to be counted in trials: they are how often a
	// probe fails, times the probability that the refutation is late, the mean of all trials, times that of losing all echoes.
	FalseAccusationsPerHour float64 `json:"falseAccusationsPerNodeHour"`
	FalseQuarantinesPerDay  float64 `json:"falseQuarantinesPerNodeDay"`
}

// Quantiles are of trials, in milliseconds.
type Quantiles struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// Check returns why there is nothing to simulate, or nil.
func (o Options) Check() error {
	for _, n := range o.Nodes {
		if n < MinPerCluster || n > MaxNodes {
			return fmt.Errorf("%d nodes: it must be %d to %d", n, MinPerCluster, MaxNodes)
		}
	}
	for _, c := range o.Clusters {
		if c < 1 || c > MaxClusters {
			return fmt.Errorf("%d clusters: it must be 1 to %d", c, MaxClusters)
		}
	}
	for _, l := range o.Loss {
		if !(l >= 0 && l <= MaxLoss) {
			return fmt.Errorf("%v %% loss: it must be 0 to %v", 100*l, 100*MaxLoss)
		}
	}
	return errors.Join(o.checkRest(), o.checkProfile(o.Cluster), o.checkProfile(o.Mesh))
}

func (o Options) checkRest() error {
	switch {
	case o.Trials < 1 || o.Trials > MaxTrials:
		return fmt.Errorf("%d trials: it must be 1 to %d", o.Trials, MaxTrials)
	case o.RTT < 0 || o.RTT > MaxRTT || o.MeshRTT < 0 || o.MeshRTT > MaxRTT:
		return fmt.Errorf("a round trip must be 0 to %v", MaxRTT)
	case len(o.combinations()) == 0:
		return fmt.Errorf("no combination has %d nodes in each cluster", MinPerCluster)
	}
	return nil
}

func (o Options) checkProfile(p gossip.Profile) error {
	switch {
	case p.SuspicionMult < 1 || p.SuspicionMult > 2:
		return fmt.Errorf("suspicion multiplier %d: the model knows 1 and 2, with which memberlist does not wait for others to confirm", p.SuspicionMult)
	case p.ProbeInterval < 4*step || p.ProbeInterval > time.Minute:
		return fmt.Errorf("probe interval %v: it must be %v to 1m", p.ProbeInterval, 4*step)
	case p.RetransmitMult < 1 || p.RetransmitMult > 100:
		return fmt.Errorf("retransmit multiplier %d: it must be 1 to 100", p.RetransmitMult)
	case p.GossipInterval < step || p.GossipInterval > time.Minute:
		return fmt.Errorf("gossip interval %v: it must be %v to 1m", p.GossipInterval, step)
	}
	return nil
}

func (o Options) combinations() (rows []Row) {
	for _, n := range o.Nodes {
		for _, c := range o.Clusters {
			for _, l := range o.Loss {
				if n >= MinPerCluster*c {
					rows = append(rows, Row{Nodes: n, Clusters: c, Loss: l, Trials: o.Trials})
				}
			}
		}
	}
	return rows
}

// Run returns a row for each combination, in the order of Options. It ends early with the context's error.
func Run(ctx context.Context, o Options) ([]Row, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	rows := o.combinations()
	var done atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range rows {
		g.Go(func() error {
			err := o.simulate(ctx, &rows[i])
			if n := done.Add(1); err == nil && o.Progress != nil {
				o.Progress(int(n), len(rows))
			}
			return err
		})
	}
	return rows, g.Wait()
}

func (o Options) mesh(row *Row) mesh {
	return mesh{
		nodes: row.Nodes, clusters: row.Clusters, loss: row.Loss,
		delay: max(1, steps(o.RTT/2)), far: max(1, steps(o.MeshRTT/2)),
		cluster: o.Cluster, mesh: o.Mesh, timing: o.Timing,
	}
}

// simulate fills in a row. Its random numbers depend on nothing but the seed and the combination, so that rows can be simulated
// in any order, and alone.
func (o Options) simulate(ctx context.Context, row *Row) error {
	r := rand.New(rand.NewPCG(o.Seed, uint64(row.Nodes)<<32|uint64(row.Clusters)<<16|uint64(row.Loss*10_000)))
	w := o.mesh(row)
	var accused, detected, everywhere, cluster []int
	wronged, missed := 0.0, 0
	for range o.Trials {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d := w.killNode(r)
		accused, detected, everywhere = append(accused, d.accused), append(detected, d.verdict), append(everywhere, d.everywhere)
		if d.missed {
			missed++
		}
		wronged += w.pool(0, 0).wronged(r)
		if w.clusters > 1 {
			cluster = append(cluster, w.killCluster(r).everywhere)
		}
	}
	row.Accused, row.Detected, row.Everywhere = quantiles(accused), quantiles(detected), quantiles(everywhere)
	row.Missed = float64(missed) / float64(o.Trials)
	if w.clusters > 1 {
		q := quantiles(cluster)
		row.ClusterEverywhere = &q
	}
	w.costs(row)
	w.mistakes(row, wronged)
	return nil
}

func (w mesh) costs(row *Row) {
	m := w.pool(0, 0)
	idle := m.idle()
	row.PacketsPerSecond, row.BytesPerSecond = idle.packets, idle.bytes
	row.SpeakerBytesPerSecond = idle.bytes
	if w.clusters > 1 {
		row.SpeakerBytesPerSecond += w.speakerPool(0).idle().bytes + w.echoes()*echoBytes
	}
	row.BytesPerChange = m.news().perChange()
}

// mistakes fills in how often a live node is taken for dead. wronged is the sum over all trials of the probability that one which is
// suspected is declared dead.
func (w mesh) mistakes(row *Row, wronged float64) {
	m := w.pool(0, 0)
	perSecond := m.suspicions() * wronged / float64(row.Trials)
	row.FalseAccusationsPerHour = perSecond * hour
	row.FalseQuarantinesPerDay = perSecond * m.unanswered(w.timing) * day
}

// quantiles sorts what it is given, in steps.
func quantiles(at []int) Quantiles {
	slices.Sort(at)
	ms := float64(step / time.Millisecond)
	return Quantiles{P50: ms * float64(quantile(at, 0.50)), P99: ms * float64(quantile(at, 0.99))}
}

// quantile returns the smallest of sorted values that at least that share of them does not exceed.
func quantile[T int | float64](sorted []T, share float64) T {
	i := int(math.Ceil(share*float64(len(sorted)))) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}
