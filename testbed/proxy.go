package testbed

import (
	"context"
	"fmt"
)

// killProxy kills a node's L7 proxy, and those that finish what they have. Its agent starts another one.
func (b *Bed) killProxy(ctx context.Context, s *State, v Victim) error {
	if _, err := s.node(v.Cluster, v.Node); err != nil {
		return err
	}
	ps, err := processesIn(s.cgroup(cgroupProxy(v.Cluster, v.Node)))
	if err != nil {
		return err
	}
	if len(ps) == 0 {
		return fmt.Errorf("node %s/%s has no L7 proxy: no service is annotated with service.cilium.io/lb-l7: enabled, or its agent is down", v.Cluster, v.Node)
	}
	return killAll(ctx, v, ps)
}
