package sim

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func random() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// near tells whether two values differ by at most a share of the second.
func near(got, want, share float64) bool { return math.Abs(got-want) <= share*want }

// TestModelAgreesWithRealMembers runs members of memberlist in fake time, so that a busy machine changes nothing. The median
// of ten deaths has a standard error of about a tenth.
func TestModelAgreesWithRealMembers(t *testing.T) {
	if testing.Short() {
		t.Skip("seconds of computing")
	}
	o := Defaults()
	o.Trials = 1000
	model := o.modelOf(20, 0.05)
	synctest.Test(t, func(t *testing.T) {
		real, err := experiment{members: 20, pools: 2, deaths: 5, loss: 0.05, rtt: o.RTT, idle: 8 * time.Second, profile: o.Cluster}.run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			what        string
			model, real float64
			share       float64
		}{
			{"first accusation, ms", model.Accused.P50, real.Accused.P50, 0.35},
			{"accusation by all, ms", model.AccusedByAll.P50, real.AccusedByAll.P50, 0.35},
			{"packets a second", model.PacketsPerSecond, real.PacketsPerSecond, 0.10},
			{"bytes a second", model.BytesPerSecond, real.BytesPerSecond, 0.30}, // exchanges of states have hardly begun
		} {
			t.Logf("%s: model %.0f, real %.0f", c.what, c.model, c.real)
			if !near(c.model, c.real, c.share) {
				t.Errorf("%s: the model says %.0f, real members %.0f: more than %.0f %% apart", c.what, c.model, c.real, 100*c.share)
			}
		}
		time.Sleep(time.Minute) // time stands still after this function, and what memberlist left behind waits for timers
	})
}

// TestSeedDecides has rows computed in another order, and alone.
func TestSeedDecides(t *testing.T) {
	o := Defaults()
	o.Nodes, o.Clusters, o.Loss, o.Trials = []int{10, 1000}, []int{1, 3}, []float64{0, 0.05}, 20
	all := simulated(t, o)
	if again := simulated(t, o); !reflect.DeepEqual(all, again) {
		t.Error("the same seed gave another result")
	}
	last := all[len(all)-1]
	o.Nodes, o.Clusters, o.Loss = []int{last.Nodes}, []int{last.Clusters}, []float64{last.Loss}
	if alone := simulated(t, o); !reflect.DeepEqual(alone[0], last) {
		t.Errorf("alone: %+v, among others: %+v", alone[0], last)
	}
	o.Seed++
	if other := simulated(t, o); reflect.DeepEqual(other[0], last) {
		t.Error("another seed gave the same result")
	}
}

func simulated(t *testing.T, o Options) []Row {
	t.Helper()
	rows, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// TestBounds holds the promises for the profile as it is: 2 s for a node, where 5,000 in one cluster have no reserve and chance may
// add something (docs/gossip.md), and 5 s for a cluster.
func TestBounds(t *testing.T) {
	for _, size := range []struct {
		nodes, clusters int
		everywhere      float64
	}{{9, 3, 2000}, {3000, 1, 2000}, {5000, 1, 2050}, {5000, 255, 2000}} {
		o := Defaults()
		o.Nodes, o.Clusters, o.Loss, o.Trials = []int{size.nodes}, []int{size.clusters}, []float64{0, 0.01}, 400
		for _, r := range simulated(t, o) {
			if r.Everywhere.P99 > size.everywhere || r.ClusterEverywhere != nil && r.ClusterEverywhere.P99 > 5000 || r.FalseQuarantinesPerDay > 1e-6 {
				t.Errorf("%d nodes, loss %v: %+v", r.Nodes, r.Loss, r)
			}
		}
	}
}

// TestLargePools asks for what no machine could run.
func TestLargePools(t *testing.T) {
	o := Defaults()
	o.Nodes, o.Clusters, o.Loss, o.Trials = []int{MaxNodes}, []int{1, MaxClusters}, []float64{0.05}, 3
	for _, r := range simulated(t, o) {
		if r.Detected.P50 < 1000 || r.Everywhere.P50 <= r.Detected.P50 {
			t.Errorf("implausible: %+v", r)
		}
	}
}

func TestBinomial(t *testing.T) {
	r := random()
	for _, c := range []struct {
		n int
		p float64
	}{{0, 0.5}, {10, 0}, {10, 1}, {10, 0.3}, {10, 0.9}, {1000, 0.001}, {1000, 0.5}, {1_000_000, 0.25}} {
		const draws = 4000
		sum, squares := 0.0, 0.0
		for range draws {
			x := float64(binomial(r, c.n, c.p))
			sum, squares = sum+x, squares+x*x
		}
		mean, variance := float64(c.n)*c.p, float64(c.n)*c.p*(1-c.p)
		got := sum / draws
		if math.Abs(got-mean) > 5*math.Sqrt(variance/draws) || !near(squares/draws-got*got, variance, 0.15) {
			t.Errorf("%d trials of %v: mean %v, variance %v; want %v, %v", c.n, c.p, got, squares/draws-got*got, mean, variance)
		}
	}
}

// TestUnawareIsHowManyAreMissed compares how often somebody is missed with what the packets made likely.
func TestUnawareIsHowManyAreMissed(t *testing.T) {
	o := Defaults()
	row := Row{Nodes: 30, Clusters: 1, Loss: 0.5}
	m := o.mesh(&row).pool(0, 0)
	m.exhaust = true
	r, missed, likely := random(), 0.0, 0.0
	const times = 3000
	for range times {
		c := spread(r, m, []seed{{0, 5}})
		missed += float64(len(c.late)) / float64(m.live)
		likely += c.unaware(math.MaxInt, m.live)
	}
	if !near(likely, missed, 0.35) {
		t.Errorf("missed %v of the members, the packets made %v likely", missed/times, likely/times)
	}
}

func TestCurve(t *testing.T) {
	c := &curve{first: 10, known: []int{1, 1, 3}, late: []int{40, 50}}
	for rank, want := range []int{10, 12, 12, 40, 50} {
		if got := c.at(rank); got != want {
			t.Errorf("rank %d learns at %d, want %d", rank, got, want)
		}
	}
	if got, want := c.later(5), []seed{{15, 1}, {17, 2}}; !reflect.DeepEqual(got, want) {
		t.Errorf("later: got %v, want %v", got, want)
	}
	if c.last() != 50 {
		t.Errorf("last: %d", c.last())
	}
}

func TestEachMemberIsProbedOncePerRound(t *testing.T) {
	const others, draws = 9, 20_000
	r, longest := random(), 0
	for range draws {
		longest = max(longest, turns(r, others))
	}
	if want := 2*others - 2; longest > want+1 || longest < want-2 {
		t.Errorf("the longest wait was %d probes of others, want about %d", longest, want)
	}
}

func TestCheck(t *testing.T) {
	for want, change := range map[string]func(*Options){
		"2 nodes":                func(o *Options) { o.Nodes = []int{2} },
		"1000001 nodes":          func(o *Options) { o.Nodes = []int{1_000_001} },
		"0 clusters":             func(o *Options) { o.Clusters = []int{0} },
		"256 clusters":           func(o *Options) { o.Clusters = []int{256} },
		"-1 % loss":              func(o *Options) { o.Loss = []float64{-0.01} },
		"NaN % loss":             func(o *Options) { o.Loss = []float64{math.NaN()} },
		"0 trials":               func(o *Options) { o.Trials = 0 },
		"round trip":             func(o *Options) { o.MeshRTT = time.Minute },
		"retransmit":             func(o *Options) { o.Cluster.RetransmitMult = 0 },
		"no combination":         func(o *Options) { o.Nodes, o.Clusters = []int{10}, []int{255} },
		"suspicion multiplier 3": func(o *Options) { o.Cluster.SuspicionMult = 3 },
		"probe interval 1ms":     func(o *Options) { o.Cluster.ProbeInterval = time.Millisecond },
		"gossip interval 0s":     func(o *Options) { o.Mesh.GossipInterval = 0 },
	} {
		o := Defaults()
		change(&o)
		if _, err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	o := Defaults()
	o.Progress = func(int, int) { cancel() }
	if _, err := Run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := Compare(ctx, o, 10); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
