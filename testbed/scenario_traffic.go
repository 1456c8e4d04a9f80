package testbed

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"causeway/identity"
)

// startTraffic has clients send requests until stopTraffic.
func (r *scenarioRun) startTraffic(ctx context.Context, clusters []string, rate float64) error {
	for _, c := range clusters {
		if r.sending[c] != nil {
			return fmt.Errorf("there is traffic from %s already; end it with: stop traffic", c)
		}
		stop, err := r.world.traffic(ctx, c, rate)
		if err != nil {
			return err
		}
		r.sending[c] = stop
	}
	return nil
}

// stopTraffic ends all traffic and keeps its results, in place of those of earlier traffic.
func (r *scenarioRun) stopTraffic(context.Context) error {
	if len(r.sending) == 0 {
		return errors.New("there is no traffic to stop")
	}
	stops := r.sending
	r.sending, r.traffic = map[string]func() (*LoadResult, error){}, map[string]*LoadResult{}
	var errs []error
	for cluster, stop := range stops {
		result, err := stop()
		if errs = append(errs, err); result != nil {
			r.traffic[cluster] = result
		}
	}
	return errors.Join(errs...)
}

// churn runs and deletes servers until it is stopped.
type churn struct {
	stop context.CancelFunc
	done sync.WaitGroup
	err  error
}

func (r *scenarioRun) startChurn(ctx context.Context, cluster string, every time.Duration) error {
	if r.churn != nil {
		return errors.New("servers are churned already; end it with: stop churn")
	}
	ctx, stop := context.WithCancel(ctx)
	c := &churn{stop: stop}
	c.done.Go(func() {
		for n := 1; ctx.Err() == nil && c.err == nil; n++ {
			// On the first node alone: the others may be killed meanwhile.
			c.err = r.churnOnce(ctx, identity.NodeName{Cluster: cluster, Node: nodeName(1)}, fmt.Sprintf("churn-%d", n), every)
		}
	})
	r.churn = c
	return nil
}

// churnOnce runs a server for a while. When it ends early the server is deleted all the same.
func (r *scenarioRun) churnOnce(ctx context.Context, node identity.NodeName, name string, alive time.Duration) error {
	ctx, early := context.WithoutCancel(ctx), ctx
	if err := r.runServer(ctx, node, name); err != nil {
		return fmt.Errorf("running server %s on %v: %w", name, node, err)
	}
	_ = pause(early, alive)
	if err := r.deleteServer(ctx, node.Cluster+"/"+name); err != nil {
		return fmt.Errorf("deleting server %s/%s: %w", node.Cluster, name, err)
	}
	return nil
}

// stopChurn ends the churn, and returns what went wrong in it.
func (r *scenarioRun) stopChurn() error {
	if r.churn == nil {
		return nil
	}
	c := r.churn
	r.churn = nil
	c.stop()
	c.done.Wait()
	return c.err
}
