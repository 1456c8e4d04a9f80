package testbed

import (
	"context"
	"fmt"
	"strings"
	"time"

	"causeway/agent"
	"causeway/identity"

	"golang.org/x/sync/errgroup"
)

// SetClock lets the agents of a place, a cluster or CLUSTER/NODE, take the time for so much later than it is, or earlier if
// offset is negative; 0 ends it. Agents that run are killed and started again for it. Those that do not will have it when they are started.
//
// Linux has no clock of its own for a namespace, so it is the agent that adds the offset. Everything else on the nodes has the
// machine's time, the stores included.
func (b *Bed) SetClock(ctx context.Context, place string, offset time.Duration) error {
	return b.changeClocks(ctx, func(s *State) ([]identity.NodeName, error) { return s.nodesOf(place) }, offset)
}

// healClocks ends every offset.
func (b *Bed) healClocks(ctx context.Context) error {
	return b.changeClocks(ctx, func(s *State) ([]identity.NodeName, error) { return s.wrongClocks(), nil }, 0)
}

// wrongClocks returns the nodes whose agents have an offset.
func (s *State) wrongClocks() (nodes []identity.NodeName) {
	for _, c := range s.Clusters {
		for _, n := range c.Nodes {
			if n.ClockOffset != 0 {
				nodes = append(nodes, identity.NodeName{Cluster: c.Name, Node: n.Name})
			}
		}
	}
	return nodes
}

// changeClocks records the offset of nodes, then restarts their agents so that they have it.
func (b *Bed) changeClocks(ctx context.Context, choose func(*State) ([]identity.NodeName, error), offset time.Duration) error {
	return b.within(ctx, func(s *State) error {
		nodes, err := choose(s)
		if err != nil || len(nodes) == 0 {
			return err
		}
		err = b.update(ctx, func(s *State) error {
			for _, name := range nodes {
				n, err := s.node(name.Cluster, name.Node)
				if err != nil {
					return err
				}
				n.ClockOffset = offset
			}
			return nil
		})
		if err != nil {
			return err
		}
		return b.renewAgents(ctx, s, nodes)
	})
}

// renewAgents kills those of the nodes' agents that run, all of them first, then starts them again.
func (b *Bed) renewAgents(ctx context.Context, s *State, nodes []identity.NodeName) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("it was not well within %v", startTimeout))
	defer cancel()
	var killed []identity.NodeName
	for _, name := range nodes {
		n, err := s.node(name.Cluster, name.Node)
		if err != nil {
			return err
		}
		if !n.Agent.alive() {
			continue
		}
		v := Victim{Kind: kindAgent, Cluster: name.Cluster, Node: name.Node}
		if err := b.killProcess(ctx, s.cgroup(cgroupAgent(name.Cluster, name.Node)), n.Agent, v); err != nil {
			return fmt.Errorf("restarting %v with another clock: %w", v, err)
		}
		killed = append(killed, name)
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, name := range killed {
		g.Go(func() error {
			if err := b.restartAgent(ctx, s, name.Cluster, name.Node); err != nil {
				return fmt.Errorf("restarting agent %v with another clock: %w", name, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// nodesOf returns the nodes of a cluster, or the one that CLUSTER/NODE names.
func (s *State) nodesOf(place string) (nodes []identity.NodeName, err error) {
	if strings.Contains(place, "/") {
		name, err := ParseNode(place)
		if err == nil {
			_, err = s.node(name.Cluster, name.Node)
		}
		return []identity.NodeName{name}, err
	}
	c, err := s.cluster(place)
	if err != nil {
		return nil, err
	}
	for _, n := range c.Nodes {
		nodes = append(nodes, identity.NodeName{Cluster: place, Node: n.Name})
	}
	return nodes, nil
}

// agentEnviron is the environment of a node's agent, with the offset of its clock as it is recorded now.
func (b *Bed) agentEnviron(cluster, node string) ([]string, error) {
	env := b.environ(b.socket(cluster, node))
	s, err := b.readState()
	if err != nil {
		return nil, err
	}
	n, err := s.node(cluster, node)
	if err != nil {
		return nil, err
	}
	if n.ClockOffset != 0 {
		env = append(env, fmt.Sprintf("%s=%v", agent.ClockOffsetEnv, n.ClockOffset))
	}
	return env, nil
}

// ParseClockOffset reads how far a clock is wrong: a duration with its sign, like +5m or -1h, or 0.
func ParseClockOffset(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%q is no offset of a clock; write it like +5m or -1h, or 0 to end it", s)
	}
	return d, nil
}
