package testbed

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// startTimeout bounds the wait for something that was started again.
const startTimeout = 30 * time.Second

// Kinds of what can be killed and started.
const (
	kindAgent   = "agent"
	kindKVStore = kvstoreName
	kindNode    = "node"
	kindCluster = "cluster"
	// kindWireGuard and kindProxy can only be killed: the agent starts them.
	kindWireGuard = "wireguard"
	kindProxy     = "proxy"
	// What Kubernetes adds.
	kindKubelet           = "kubelet"
	kindAPIServer         = partAPIServer
	kindControllerManager = partControllerManager
	kindScheduler         = partScheduler
)

// Victim names what Kill and Start work on.
type Victim struct {
	Kind    string // "agent", "kvstore", "node", "cluster", "wireguard", "proxy", "kubelet", "apiserver", "controller-manager" or "scheduler"
	Cluster string
	Node    string // empty for what is a cluster's
}

// ParseVictim reads a kind, and a CLUSTER or CLUSTER/NODE, whichever such a thing is of.
func ParseVictim(kind, where string) (Victim, error) {
	switch kind {
	case kindKVStore, kindCluster, kindAPIServer, kindControllerManager, kindScheduler:
		if err := validateCluster(where); err != nil {
			return Victim{}, fmt.Errorf("name the cluster that is meant: %w", err)
		}
		return Victim{Kind: kind, Cluster: where}, nil
	case kindAgent, kindNode, kindWireGuard, kindProxy, kindKubelet:
		n, err := ParseNode(where)
		return Victim{Kind: kind, Cluster: n.Cluster, Node: n.Node}, err
	}
	return Victim{}, fmt.Errorf("%q is nothing that can be killed and started: write agent, kvstore, node, cluster, wireguard, proxy, kubelet, apiserver, controller-manager or scheduler", kind)
}

func (v Victim) String() string {
	return v.Kind + " " + filepath.Join(v.Cluster, v.Node)
}

// Kill ends an agent, a store, a whole node or a whole cluster as kill -9 or a power cut would. A killed node loses its
// link to the underlay and all of its processes, a killed cluster all of its nodes and its store. What is WireGuard on a node, and its L7 proxy, stay
// when its agent is killed; killed by themselves they are started anew by the agent.
func (b *Bed) Kill(ctx context.Context, v Victim) error {
	_, err := b.killAt(ctx, v)
	return err
}

// killAt is Kill; it also returns the moment just before anything was taken away.
func (b *Bed) killAt(ctx context.Context, v Victim) (at time.Time, err error) {
	err = b.within(ctx, func(s *State) error {
		c, err := s.cluster(v.Cluster)
		if err != nil {
			return err
		}
		at = time.Now()
		switch v.Kind {
		case kindKVStore:
			return b.killProcess(ctx, s.cgroup(cgroupKVStore(v.Cluster)), c.KVStore.Process, v)
		case kindWireGuard:
			return b.killWireGuard(ctx, s, v)
		case kindProxy:
			return b.killProxy(ctx, s, v)
		case kindAgent:
			n, err := s.node(v.Cluster, v.Node)
			if err != nil {
				return err
			}
			return b.killProcess(ctx, s.cgroup(cgroupAgent(v.Cluster, v.Node)), n.Agent, v)
		case kindKubelet:
			n, err := s.node(v.Cluster, v.Node)
			if err != nil {
				return err
			}
			if c.Kubernetes == nil {
				return errNoKubernetes
			}
			return b.killProcess(ctx, s.cgroup(cgroupKubelet(v.Cluster, v.Node)), n.Kubelet, v)
		case kindAPIServer, kindControllerManager, kindScheduler:
			return b.killPart(ctx, s, c, v)
		}
		m, err := s.machines(v, false)
		if err != nil {
			return err
		}
		if m.none() {
			return fmt.Errorf("%v is down already; start it with: clustermesh testbed start %[1]v", v)
		}
		at, err = b.powerOff(ctx, s, m)
		return err
	})
	return at, err
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

// machines are the nodes of one cluster, and perhaps its store, that a power cut hits.
type machines struct {
	cluster *ClusterState
	nodes   []*NodeState
	store   bool
}

// machines returns those that v means and that are down, or that are not.
func (s *State) machines(v Victim, down bool) (machines, error) {
	c, err := s.cluster(v.Cluster)
	if err != nil {
		return machines{}, err
	}
	m := machines{cluster: c, store: v.Kind == kindCluster && c.KVStore.Down == down}
	if v.Kind == kindNode {
		n, err := s.node(v.Cluster, v.Node)
		if err == nil && n.Down == down {
			m.nodes = append(m.nodes, n)
		}
		return m, err
	}
	for i := range c.Nodes {
		if c.Nodes[i].Down == down {
			m.nodes = append(m.nodes, &c.Nodes[i])
		}
	}
	return m, nil
}

func (m machines) none() bool { return len(m.nodes) == 0 && !m.store }

// ports that the machines are plugged into.
func (m machines) ports() (names []string) {
	for _, n := range m.nodes {
		names = append(names, portName(m.cluster.Name, n.Name))
	}
	if m.store {
		names = append(names, portName(m.cluster.Name, kvstoreName))
	}
	return names
}

// powerOff takes the machines' links down, then all of their processes, and returns the moment just before the first link.
func (b *Bed) powerOff(ctx context.Context, s *State, m machines) (time.Time, error) {
	if err := b.setDown(ctx, m, true); err != nil {
		return time.Time{}, err
	}
	at := time.Now()
	// The links first, so that no dying process says goodbye.
	if err := b.setPorts(m.ports(), false); err != nil {
		return at, err
	}
	errs := new(collector)
	for _, n := range m.nodes {
		errs.run(func() error { return killCgroup(ctx, s.cgroup(cgroupNode(m.cluster.Name, n.Name))) })
	}
	if m.store {
		for _, cgroup := range s.storeCgroups(m.cluster) {
			errs.run(func() error { return killCgroup(ctx, cgroup) })
		}
	}
	err := errs.wait()
	for _, p := range m.processes() {
		b.exits.of(*p)
	}
	return at, err
}

// processes of the machines that the bed has started.
func (m machines) processes() (ps []*Process) {
	for _, n := range m.nodes {
		ps = append(ps, n.Agent, n.Kubelet)
	}
	if m.store {
		ps = append(ps, m.cluster.KVStore.Process)
		if k := m.cluster.Kubernetes; k != nil {
			for _, part := range controlPlane {
				ps = append(ps, k.Processes[part])
			}
		}
	}
	return slices.DeleteFunc(ps, func(p *Process) bool { return p == nil })
}

// setDown records that the machines are down, or no more.
func (b *Bed) setDown(ctx context.Context, m machines, down bool) error {
	return b.update(ctx, func(s *State) error {
		for _, n := range m.nodes {
			n, err := s.node(m.cluster.Name, n.Name)
			if err != nil {
				return err
			}
			n.Down = down
		}
		c, err := s.cluster(m.cluster.Name)
		if err == nil && m.store {
			c.KVStore.Down = down
		}
		return err
	})
}

// Start starts again what Kill has ended, and waits until it is well. A node comes back with its pods. Of a cluster everything
// is started that does not run.
func (b *Bed) Start(ctx context.Context, v Victim) error {
	return b.startAt(ctx, v, func(time.Time) {})
}

// startAt is Start; begun is told the moment when the links are up again, or the process is there.
func (b *Bed) startAt(ctx context.Context, v Victim, begun func(time.Time)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("%v was not well within %v", v, startTimeout))
	defer cancel()
	return b.within(ctx, func(s *State) error {
		c, err := s.cluster(v.Cluster)
		if err != nil {
			return err
		}
		switch v.Kind {
		case kindCluster:
			return b.startCluster(ctx, s, v, begun)
		case kindKVStore:
			return b.restartKVStore(ctx, s, c, v, begun)
		case kindAPIServer, kindControllerManager, kindScheduler:
			return b.restartPart(ctx, s, c, v, begun)
		case kindWireGuard, kindProxy:
			return fmt.Errorf("%v is started by the node's agent, as soon as that runs", v)
		}
		n, err := s.node(v.Cluster, v.Node)
		if err != nil {
			return err
		}
		switch {
		case v.Kind == kindNode && !n.Down:
			return fmt.Errorf("%v is not down", v)
		case v.Kind == kindNode:
			return b.startNode(ctx, s, v, begun)
		case n.Down:
			return fmt.Errorf("the node of %v is down; start it with: clustermesh testbed start node %s/%s", v, v.Cluster, v.Node)
		case v.Kind == kindKubelet && c.Kubernetes == nil:
			return errNoKubernetes
		case v.Kind == kindKubelet && n.Kubelet.alive(), v.Kind == kindAgent && n.Agent.alive():
			return fmt.Errorf("%v runs already", v)
		case v.Kind == kindKubelet:
			begun(time.Now())
			return b.startKubelet(ctx, s, c, n)
		}
		begun(time.Now())
		return b.restartAgent(ctx, s, v.Cluster, v.Node)
	})
}

func (b *Bed) restartKVStore(ctx context.Context, s *State, c *ClusterState, v Victim, begun func(time.Time)) error {
	if c.KVStore.Process.alive() {
		return fmt.Errorf("%v runs already", v)
	}
	if c.KVStore.Down {
		if err := b.powerOn(ctx, machines{cluster: c, store: true}); err != nil {
			return err
		}
	}
	begun(time.Now())
	return b.startKVStore(ctx, s, c)
}

// powerOn plugs machines in again.
func (b *Bed) powerOn(ctx context.Context, m machines) error {
	if err := b.setPorts(m.ports(), true); err != nil {
		return err
	}
	return b.setDown(ctx, m, false)
}

// restartAgent waits for the agent itself, not for stores: one that is down is no fault of the agent.
func (b *Bed) restartAgent(ctx context.Context, s *State, cluster, node string) error {
	p, err := b.launchAgent(ctx, s, cluster, node)
	if err != nil {
		return err
	}
	now, err := b.readState()
	if err != nil {
		return err
	}
	stores := 0
	for _, c := range now.Clusters {
		if c.KVStore.Process.alive() {
			stores++
		}
	}
	if stores < len(now.Clusters) || now.faulty() || now.missing(cluster, node) || now.withoutAPIServer(cluster) {
		return b.waitAgentAnswers(ctx, cluster, node, p)
	}
	return b.waitAgent(ctx, cluster, node, p, 1) // its own; which clusters it is joined with is not the bed's to know
}

// faulty tells whether there is a fault that an agent would rightly complain about.
func (s *State) faulty() bool {
	return len(s.Partitions) > 0 || len(s.PathMTUs) > 0 || s.Loss > 0 || len(s.wrongClocks()) > 0
}

// missing tells whether anybody else is down, which the agent of a node would rightly complain about.
func (s *State) missing(cluster, node string) bool {
	for _, c := range s.Clusters {
		for _, n := range c.Nodes {
			if (c.Name != cluster || n.Name != node) && (n.Down || !n.Agent.alive()) {
				return true
			}
		}
	}
	return false
}

// withoutAPIServer tells whether the API server that a cluster's agents complain about does not run.
func (s *State) withoutAPIServer(cluster string) bool {
	c, err := s.cluster(cluster)
	return err == nil && c.Kubernetes != nil && !c.Kubernetes.Processes[partAPIServer].alive()
}

// startNode brings a node back: its pods' commands before its link, so that no connection finds a pod without its server.
func (b *Bed) startNode(ctx context.Context, s *State, v Victim, begun func(time.Time)) error {
	m, err := s.machines(v, true)
	if err != nil {
		return err
	}
	if err := b.startPods(ctx, s, m); err != nil {
		return err
	}
	if err := b.powerOn(ctx, m); err != nil {
		return err
	}
	begun(time.Now())
	return b.restartNode(ctx, s, m.cluster, m.nodes[0])
}

// restartNode starts what of a node does not run but its pods: its agent, then its kubelet.
func (b *Bed) restartNode(ctx context.Context, s *State, c *ClusterState, n *NodeState) error {
	if !n.Agent.alive() {
		if err := b.restartAgent(ctx, s, c.Name, n.Name); err != nil {
			return err
		}
	}
	if c.Kubernetes == nil || n.Kubelet.alive() {
		return nil
	}
	return b.startKubelet(ctx, s, c, n)
}

// startCluster starts all of a cluster that does not run: what was on machines that are down in the order of startNode, and
// the store ahead of the agents, which wait for it.
func (b *Bed) startCluster(ctx context.Context, s *State, v Victim, begun func(time.Time)) error {
	m, err := s.machines(v, true)
	if err != nil {
		return err
	}
	var nodes []*NodeState
	for i := range m.cluster.Nodes {
		n := &m.cluster.Nodes[i]
		if !n.Agent.alive() || m.cluster.Kubernetes != nil && !n.Kubelet.alive() {
			nodes = append(nodes, n)
		}
	}
	storeRuns := m.cluster.KVStore.Process.alive()
	if m.none() && storeRuns && len(nodes) == 0 && len(m.cluster.Kubernetes.stopped()) == 0 {
		return fmt.Errorf("%v is not down: all of it runs", v)
	}
	if err := b.startPods(ctx, s, m); err != nil {
		return err
	}
	if err := b.powerOn(ctx, m); err != nil {
		return err
	}
	begun(time.Now())
	if !storeRuns {
		if err := b.startKVStore(ctx, s, m.cluster); err != nil {
			return err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.restartKubernetes(ctx, s, m.cluster) })
	for _, n := range nodes {
		g.Go(func() error { return b.restartNode(ctx, s, m.cluster, n) })
	}
	return g.Wait()
}

// startPods starts the commands of the pods on machines that are down, and waits until those that have a port listen on it.
func (b *Bed) startPods(ctx context.Context, s *State, m machines) error {
	g, gctx := errgroup.WithContext(ctx)
	for i := range s.Pods {
		pod := &s.Pods[i]
		if pod.Cluster != m.cluster.Name || !m.has(pod.Node) || pod.Process == nil || pod.Process.alive() {
			continue
		}
		p, err := b.startPod(ctx, s, pod)
		if err != nil {
			return errors.Join(err, g.Wait())
		}
		if pod.ReadyPort != 0 {
			g.Go(func() error { return b.waitPod(gctx, s, pod, p) })
		}
	}
	return g.Wait()
}

func (m machines) has(node string) bool {
	for _, n := range m.nodes {
		if n.Name == node {
			return true
		}
	}
	return false
}
