package testbed

import (
	"context"
	"errors"
	"fmt"

	"causeway/agent/api"
)

// connectAll joins all clusters as people do: a token of the first one for each of the others, one after the other, who learn of each other by it.
func (b *Bed) connectAll(ctx context.Context, s *State) error {
	first := s.Clusters[0]
	for _, c := range s.Clusters[1:] {
		if err := b.Connect(ctx, first.Name, c.Name); err != nil {
			return err
		}
	}
	now, err := b.readState() // with the agents' processes
	if err != nil {
		return err
	}
	return b.eachNode(ctx, now, func(ctx context.Context, s *State, c *ClusterState, n *NodeState) error {
		return b.waitAgent(ctx, c.Name, n.Name, n.Agent, len(s.Clusters))
	})
}

// Connect joins a cluster to another, on the first node of each, and returns when packets go both ways.
func (b *Bed) Connect(ctx context.Context, to, cluster string) error {
	issuer := b.Client(to, nodeName(1))
	defer issuer.Close()
	token, err := issuer.CreateToken(ctx, api.TokenRequest{})
	if err != nil {
		return fmt.Errorf("a token of cluster %s: %w", to, err)
	}
	joiner := b.Client(cluster, nodeName(1))
	defer joiner.Close()
	for ev, err := range joiner.Connect(ctx, api.ConnectRequest{Token: token.Text}) {
		if err == nil && ev.Error != "" {
			err = errors.New(ev.Error)
		}
		if err != nil {
			return withLog(fmt.Errorf("joining cluster %s to %s: %w", cluster, to, err), b.agentLog(cluster, nodeName(1)))
		}
	}
	return nil
}
