package testbed

import (
	"context"
	"net/netip"
	"time"

	"causeway/identity"

	"golang.org/x/sync/errgroup"
)

// statusTimeout bounds how long one agent is waited for.
const statusTimeout = time.Second

// Status is a bed as it is now.
type Status struct {
	Dir     string    `json:"dir"`
	ID      string    `json:"id"`
	Phase   string    `json:"phase"`
	Created time.Time `json:"created"`
	// OK is true if everything that should run does, and every agent is well.
	OK         bool            `json:"ok"`
	Clusters   []ClusterStatus `json:"clusters"`
	Pods       []PodStatus     `json:"pods"`
	Partitions []Partition     `json:"partitions"`
	PathMTUs   []PathMTU       `json:"pathMTUs"`
	// Loss on every link of the underlay, which the partitions come on top of.
	Loss Loss `json:"loss,omitzero"`
	// Underlay is the network namespace of the switch between the nodes.
	Underlay string `json:"underlay"`
	// UnderlayFamily is the family of its addresses.
	UnderlayFamily Underlay `json:"underlayFamily"`
}

// ClusterStatus is one cluster.
type ClusterStatus struct {
	Name string             `json:"name"`
	ID   identity.ClusterID `json:"id"`
	// PodCIDRs and ServiceCIDRs: IPv4, IPv6.
	PodCIDRs     []netip.Prefix `json:"podCIDRs"`
	ServiceCIDRs []netip.Prefix `json:"serviceCIDRs"`
	// Encryption is what its nodes encrypt, as configured.
	Encryption identity.Encryption `json:"encryption"`
	KVStore    ProcessStatus       `json:"kvstore"`
	Nodes      []NodeStatus        `json:"nodes"`
	// Kubernetes of the cluster, if it has one.
	Kubernetes *KubernetesStatus `json:"kubernetes,omitempty"`
}

// ProcessStatus is a store, or the part of a node that every process has.
type ProcessStatus struct {
	Address netip.Addr `json:"address"`
	PID     int        `json:"pid,omitempty"`
	Alive   bool       `json:"alive"`
	NetNS   string     `json:"netns"`
	Log     string     `json:"log"`
}

// NodeStatus is one node; its process is its agent.
type NodeStatus struct {
	Name     string         `json:"name"`
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	ProcessStatus
	Socket string `json:"socket"`
	// WireGuard has the processes that are WireGuard on the node, if it is not the kernel.
	WireGuard []int `json:"wireGuardPIDs,omitempty"`
	// Down is true for a node that was killed.
	Down bool `json:"down"`
	// ClockOffset is how far the agent's clock is ahead of the machine's, in nanoseconds; negative: behind it.
	ClockOffset time.Duration `json:"clockOffset,omitempty"`
	// OK and Problems are what the agent says of itself.
	OK       bool     `json:"ok"`
	Problems []string `json:"problems"`
}

// Status returns how everything in the bed is, as asked just now.
func (b *Bed) Status(ctx context.Context) (*Status, error) {
	s, err := b.readState()
	if err != nil {
		return nil, err
	}
	partitions, loss, err := b.partitions(s)
	if err != nil {
		return nil, err
	}
	mtus, err := b.pathMTUs(s)
	if err != nil {
		return nil, err
	}
	st := &Status{
		Dir: b.dir, ID: b.id, Phase: s.Phase, Created: s.Created, OK: true, Underlay: b.underlayNS(), UnderlayFamily: s.Underlay,
		Pods: b.podStatuses(s), Partitions: partitions, PathMTUs: mtus, Loss: loss,
		Clusters: make([]ClusterStatus, len(s.Clusters)),
	}
	var g errgroup.Group
	g.SetLimit(parallel)
	for i, c := range s.Clusters {
		st.Clusters[i] = ClusterStatus{
			Name: c.Name, ID: c.ID, PodCIDRs: clusterPodCIDRs(c.ID), ServiceCIDRs: clusterServiceCIDRs(c.ID), Encryption: c.Encryption,
			KVStore: processStatus(c.KVStore.Process, c.KVStore.Address, b.kvstoreNS(c.Name), b.kvstoreLog(c.Name)),
			Nodes:   make([]NodeStatus, len(c.Nodes)),
		}
		if c.Kubernetes != nil {
			g.Go(func() error {
				st.Clusters[i].Kubernetes = b.kubernetesStatus(ctx, &c)
				return nil
			})
		}
		for j, n := range c.Nodes {
			g.Go(func() error {
				st.Clusters[i].Nodes[j] = b.nodeStatus(ctx, s, c.Name, n)
				return nil
			})
		}
	}
	_ = g.Wait()
	for _, c := range st.Clusters {
		st.OK = st.OK && c.KVStore.Alive && (c.Kubernetes == nil || len(c.Kubernetes.Problems) == 0)
		for _, n := range c.Nodes {
			st.OK = st.OK && n.OK
		}
	}
	return st, nil
}

func processStatus(p *Process, address netip.Addr, netns, log string) ProcessStatus {
	st := ProcessStatus{Address: address, Alive: p.alive(), NetNS: netns, Log: log}
	if st.Alive {
		st.PID = p.PID
	}
	return st
}

func (b *Bed) nodeStatus(ctx context.Context, s *State, cluster string, n NodeState) NodeStatus {
	st := NodeStatus{
		Name: n.Name, PodCIDRs: n.PodCIDRs, Socket: b.socket(cluster, n.Name), Down: n.Down, ClockOffset: n.ClockOffset, Problems: []string{},
		ProcessStatus: processStatus(n.Agent, n.Address, b.nodeNS(cluster, n.Name), b.agentLog(cluster, n.Name)),
	}
	ps, err := s.wireGuardProcesses(cluster, n.Name)
	if err != nil {
		st.Problems = append(st.Problems, err.Error())
	}
	for _, p := range ps {
		st.WireGuard = append(st.WireGuard, p.PID)
	}
	switch {
	case n.Down:
		st.Problems = append(st.Problems, "the node was killed")
	case !st.Alive:
		st.Problems = append(st.Problems, "its agent does not run")
	default:
		ctx, cancel := context.WithTimeout(ctx, statusTimeout)
		defer cancel()
		client := b.Client(cluster, n.Name)
		defer client.Close()
		problem := agentProblem(ctx, client, 1)
		if st.OK = problem == "" && err == nil; problem != "" {
			st.Problems = append(st.Problems, problem)
		}
	}
	return st
}
