package testbed

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// startTimeout bounds the wait for something that was started again.
const startTimeout = 30 * time.Second

// Victim names what Kill and Start work on.
type Victim struct {
	Kind    string // "agent", "kvstore" or "node"
	Cluster string
	Node    string // empty for a kvstore
}

// ParseVictim reads agent CLUSTER/NODE, kvstore CLUSTER, or node CLUSTER/NODE.
func ParseVictim(kind, where string) (Victim, error) {
	switch kind {
	case kvstoreName:
		if err := validateCluster(where); err != nil {
			return Victim{}, fmt.Errorf("name the cluster whose kvstore is meant: %w", err)
		}
		return Victim{Kind: kind, Cluster: where}, nil
	case "agent", "node":
		n, err := ParseNode(where)
		return Victim{Kind: kind, Cluster: n.Cluster, Node: n.Node}, err
	}
	return Victim{}, fmt.Errorf("%q is nothing that can be killed and started: write agent, kvstore or node", kind)
}

func (v Victim) String() string {
	return v.Kind + " " + filepath.Join(v.Cluster, v.Node)
}

// Kill ends an agent, a store or a whole node as kill -9 or a power cut would. A killed node loses its
// link to the underlay and all of its processes.
func (b *Bed) Kill(ctx context.Context, v Victim) error {
	return b.within(ctx, func(s *State) error {
		switch v.Kind {
		case kvstoreName:
			c, err := s.cluster(v.Cluster)
			if err != nil {
				return err
			}
			return b.killProcess(ctx, s.cgroup(cgroupKVStore(v.Cluster)), c.KVStore.Process, v)
		case "agent":
			n, err := s.node(v.Cluster, v.Node)
			if err != nil {
				return err
			}
			return b.killProcess(ctx, s.cgroup(cgroupAgent(v.Cluster, v.Node)), n.Agent, v)
		}
		return b.killNode(ctx, s, v)
	})
}

func (b *Bed) killProcess(ctx context.Context, cgroup string, p *Process, v Victim) error {
	if !p.alive() {
		return fmt.Errorf("%v does not run; start it with: clustermesh testbed start %[1]v", v)
	}
	if err := killCgroup(ctx, cgroup); err != nil {
		return err
	}
	b.exits.of(*p)
	return nil
}

func (b *Bed) killNode(ctx context.Context, s *State, v Victim) error {
	n, err := s.node(v.Cluster, v.Node)
	if err != nil {
		return err
	}
	if n.Down {
		return fmt.Errorf("%v is down already; start it with: clustermesh testbed start %[1]v", v)
	}
	if err := b.setDown(ctx, v, true); err != nil {
		return err
	}
	// The link first, so that no dying process says goodbye.
	if err := b.setPort(portName(v.Cluster, v.Node), false); err != nil {
		return err
	}
	if err := killCgroup(ctx, s.cgroup(cgroupNode(v.Cluster, v.Node))); err != nil {
		return err
	}
	if n.Agent != nil {
		b.exits.of(*n.Agent)
	}
	return nil
}

func (b *Bed) setDown(ctx context.Context, v Victim, down bool) error {
	return b.update(ctx, func(s *State) error {
		n, err := s.node(v.Cluster, v.Node)
		if err == nil {
			n.Down = down
		}
		return err
	})
}

// Start starts again what Kill has ended, and waits until it is well. A node comes back with its pods.
func (b *Bed) Start(ctx context.Context, v Victim) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("%v was not well within %v", v, startTimeout))
	defer cancel()
	return b.within(ctx, func(s *State) error {
		c, err := s.cluster(v.Cluster)
		if err != nil {
			return err
		}
		if v.Kind == kvstoreName {
			if c.KVStore.Process.alive() {
				return fmt.Errorf("%v runs already", v)
			}
			return b.startKVStore(ctx, s, c)
		}
		n, err := s.node(v.Cluster, v.Node)
		if err != nil {
			return err
		}
		switch {
		case v.Kind == "node":
			return b.startNode(ctx, s, v, n)
		case n.Down:
			return fmt.Errorf("the node of %v is down; start it with: clustermesh testbed start node %s/%s", v, v.Cluster, v.Node)
		case n.Agent.alive():
			return fmt.Errorf("%v runs already", v)
		}
		return b.restartAgent(ctx, s, v)
	})
}

// restartAgent waits for the agent itself, not for stores: one that is down is no fault of the agent.
func (b *Bed) restartAgent(ctx context.Context, s *State, v Victim) error {
	p, err := b.launchAgent(ctx, s, v.Cluster, v.Node)
	if err != nil {
		return err
	}
	stores := 0
	for _, c := range s.Clusters {
		if c.KVStore.Process.alive() {
			stores++
		}
	}
	if stores < len(s.Clusters) || len(s.Partitions) > 0 {
		return b.waitAgentAnswers(ctx, v.Cluster, v.Node, p)
	}
	return b.waitAgent(ctx, v.Cluster, v.Node, p, stores)
}

// startNode brings a node back: its pods' commands before its link, so that no connection finds a pod without its server.
func (b *Bed) startNode(ctx context.Context, s *State, v Victim, n *NodeState) error {
	if !n.Down {
		return fmt.Errorf("%v is not down", v)
	}
	g, gctx := errgroup.WithContext(ctx)
	for i := range s.Pods {
		pod := &s.Pods[i]
		if pod.Cluster != v.Cluster || pod.Node != v.Node || pod.Process == nil || pod.Process.alive() {
			continue
		}
		p, err := b.startPod(ctx, s, pod, pod.Address)
		if err != nil {
			return err
		}
		if pod.ReadyPort != 0 {
			g.Go(func() error { return b.waitPod(gctx, s, pod, p) })
		}
	}
	if err := b.setPort(portName(v.Cluster, v.Node), true); err != nil {
		return err
	}
	if err := b.setDown(ctx, v, false); err != nil {
		return err
	}
	g.Go(func() error { return b.restartAgent(gctx, s, v) })
	return g.Wait()
}
