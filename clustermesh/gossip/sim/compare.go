package sim

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"causeway/clustermesh/gossip"

	"golang.org/x/sync/errgroup"
)

// Measured is what the model says of one pool, or what its real members did. It goes as far as memberlist does: to the
// declaration of death, which is an accusation to us.
type Measured struct {
	Engine  string  `json:"engine"` // "model" or "real"
	Members int     `json:"members"`
	Loss    float64 `json:"loss"`
	Deaths  int     `json:"deaths"`
	// Accused is when the first member declares the dead one dead, AccusedByAll when the last does.
	Accused      Quantiles `json:"accusedMs"`
	AccusedByAll Quantiles `json:"accusedByAllMs"`
	// What a member sends in a second while nothing changes, and how often one that lives is declared dead.
	PacketsPerSecond        float64 `json:"packetsPerSecond"`
	BytesPerSecond          float64 `json:"bytesPerSecond"`
	FalseAccusationsPerHour float64 `json:"falseAccusationsPerNodeHour"`
}

// MaxReal is up to how many real members Compare runs at a time. More need more than two processors, and would be late.
const MaxReal = 300

// Compare returns, for every size in o.Nodes up to most and every loss, what the model says of one pool of that size and what real
// members did, in real time: about half a minute for each. It ends early with the context's error.
func Compare(ctx context.Context, o Options, most int) (all []Measured, err error) {
	for _, n := range o.Nodes {
		for _, loss := range o.Loss {
			if n > most {
				continue
			}
			real, err := experiment{
				members: n, loss: loss, rtt: o.RTT, profile: o.Cluster,
				pools: max(1, min(10, most/n)), deaths: min(3, n-MinPerCluster+1), idle: 15 * time.Second,
			}.run(ctx)
			if err != nil {
				return nil, err
			}
			all = append(all, o.modelOf(n, loss), real)
		}
	}
	return all, nil
}

// modelOf returns what the model says of one pool.
func (o Options) modelOf(n int, loss float64) Measured {
	row := Row{Nodes: n, Clusters: 1, Loss: loss, Trials: o.Trials}
	w := o.mesh(&row)
	r := rand.New(rand.NewPCG(o.Seed, uint64(n)))
	var first, last []int
	wronged := 0.0
	for range o.Trials {
		a := accuse(r, w.pool(0, 1), 1)
		first, last = append(first, a.first()), append(last, a.dead.last())
		wronged += w.pool(0, 0).wronged(r)
	}
	w.costs(&row)
	w.mistakes(&row, wronged)
	return Measured{
		Engine: "model", Members: n, Loss: loss, Deaths: o.Trials, Accused: quantiles(first), AccusedByAll: quantiles(last),
		PacketsPerSecond: row.PacketsPerSecond, BytesPerSecond: row.BytesPerSecond, FalseAccusationsPerHour: row.FalseAccusationsPerHour,
	}
}

// experiment is some pools of real members, which sit idle for a while, and in which then some die one after the other.
type experiment struct {
	members, pools int
	deaths         int // in each pool
	loss           float64
	rtt, idle      time.Duration
	profile        gossip.Profile
}

// outcome is what all pools of an experiment did.
type outcome struct {
	mu             sync.Mutex
	first, last    []time.Duration
	packets, bytes int64
	accusations    int
}

func (e experiment) run(ctx context.Context) (Measured, error) {
	var out outcome
	g, ctx := errgroup.WithContext(ctx)
	for range e.pools {
		g.Go(func() error { return e.runPool(ctx, &out) })
	}
	if err := g.Wait(); err != nil {
		return Measured{}, err
	}
	seconds := e.idle.Seconds() * float64(e.members*e.pools)
	return Measured{
		Engine: "real", Members: e.members, Loss: e.loss, Deaths: len(out.first),
		Accused: measured(out.first), AccusedByAll: measured(out.last),
		PacketsPerSecond: float64(out.packets) / seconds, BytesPerSecond: float64(out.bytes) / seconds,
		FalseAccusationsPerHour: float64(out.accusations) / seconds * hour,
	}, nil
}

func (e experiment) runPool(ctx context.Context, out *outcome) error {
	p, err := newPool(ctx, e.members, e.rtt/2, e.profile)
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.settle(ctx); err != nil {
		return err
	}
	p.net.lose(e.loss)
	if err := e.watchIdle(ctx, p, out); err != nil {
		return err
	}
	for range e.deaths {
		// Members that missed a probe probe more slowly for a while, by Lifeguard's awareness. Deaths are far apart here.
		if err := sleep(ctx, 3*time.Second); err != nil {
			return err
		}
		first, last, err := p.kill(ctx)
		if err != nil {
			return err
		}
		out.mu.Lock()
		out.first, out.last = append(out.first, first), append(out.last, last)
		out.mu.Unlock()
	}
	return nil
}

func (e experiment) watchIdle(ctx context.Context, p *pool, out *outcome) error {
	packets, bytes := p.traffic()
	accused := p.log.accusations()
	if err := sleep(ctx, e.idle); err != nil {
		return err
	}
	afterPackets, afterBytes := p.traffic()
	out.mu.Lock()
	defer out.mu.Unlock()
	out.packets += afterPackets - packets
	out.bytes += afterBytes - bytes
	out.accusations += p.log.accusations() - accused
	return nil
}

// measured sorts what it is given.
func measured(took []time.Duration) Quantiles {
	at := make([]float64, len(took))
	for i, d := range took {
		at[i] = float64(d) / float64(time.Millisecond)
	}
	slices.Sort(at)
	return Quantiles{P50: quantile(at, 0.50), P99: quantile(at, 0.99)}
}
