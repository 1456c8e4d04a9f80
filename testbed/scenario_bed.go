package testbed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/datapath"
	"causeway/identity"

	"golang.org/x/sync/errgroup"
)

const (
	// viewTimeout bounds the wait for one agent's answer.
	viewTimeout = time.Second
	clientName  = "client"
	// quiesceTimeout bounds the wait for a bed that is to be as it was before.
	quiesceTimeout = 20 * time.Second
)

// bedWorld is a bed as scenarios act on it and look at it. What it does itself it remembers, so that a look
// costs no more than what is read.
type bedWorld struct {
	bed   *Bed
	setup Setup
	// maps and clients by node, addresses of the service by cluster.
	maps      map[identity.NodeName]*datapath.Maps
	clients   map[identity.NodeName]*api.Client
	addresses map[string]netip.Addr

	// reading guards what was last read of the kernels, which is not changed any more.
	reading sync.Mutex
	readAt  time.Time
	read    map[identity.NodeName][]frontend

	mu      sync.Mutex
	servers map[string]server
	// off are the nodes that are down, and mute those whose agent does not run besides.
	off  map[identity.NodeName]bool
	mute map[identity.NodeName]bool
	// stores that do not run.
	stores map[string]bool
}

// newBedWorld puts a scenario's service on a bed: a server on each node, a client in each cluster on its first node, and
// waits until each node's kernel knows them all. Its close is the caller's.
func newBedWorld(ctx context.Context, b *Bed, setup Setup) (*bedWorld, error) {
	w := &bedWorld{
		bed: b, setup: setup, maps: map[identity.NodeName]*datapath.Maps{}, clients: map[identity.NodeName]*api.Client{}, addresses: map[string]netip.Addr{},
		servers: map[string]server{}, off: map[identity.NodeName]bool{}, mute: map[identity.NodeName]bool{}, stores: map[string]bool{},
	}
	err := w.deploy(ctx)
	if err == nil {
		err = w.open()
	}
	if err == nil {
		err = w.await(ctx, "exactly the running servers in every kernel")
	}
	if err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *bedWorld) nodes() (nodes []identity.NodeName) {
	for _, c := range w.setup.clusters() {
		for n := 1; n <= w.setup.Nodes; n++ {
			nodes = append(nodes, identity.NodeName{Cluster: c, Node: nodeName(n)})
		}
	}
	return nodes
}

func (w *bedWorld) deploy(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, n := range w.nodes() {
		g.Go(func() error { return w.runServer(gctx, n, w.setup.Service+"-"+n.Node) })
	}
	for _, c := range w.setup.clusters() {
		g.Go(func() error { return w.runClient(gctx, identity.NodeName{Cluster: c, Node: nodeName(1)}, clientName) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, c := range w.setup.clusters() {
		if err := w.declare(ctx, c); err != nil {
			return fmt.Errorf("declaring the service in %s: %w", c, err)
		}
	}
	return nil
}

func (w *bedWorld) runClient(ctx context.Context, node identity.NodeName, name string) error {
	_, err := w.bed.RunPod(ctx, PodSpec{
		Cluster: node.Cluster, Node: node.Node, Name: name, Labels: map[string]string{"app": clientName}, Command: []string{"sleep", "infinity"},
	})
	return err
}

// declare applies the service in a cluster and remembers its address there.
func (w *bedWorld) declare(ctx context.Context, cluster string) error {
	client := w.bed.Client(cluster, nodeName(1))
	defer client.Close()
	results, err := client.ApplyServices(ctx, []byte(strings.ReplaceAll(shopManifest, "shop", w.setup.Service)))
	if err != nil {
		return err
	}
	w.addresses[cluster], err = serviceAddress(results, false)
	return err
}

// open opens the maps of every node's kernel and a client for its agent.
func (w *bedWorld) open() error {
	for _, n := range w.nodes() {
		maps, err := datapath.OpenMaps(w.bed.PinDir(n.Cluster, n.Node))
		if err != nil {
			return err
		}
		w.maps[n], w.clients[n] = maps, w.bed.Client(n.Cluster, n.Node)
	}
	return nil
}

func (w *bedWorld) close() error {
	var errs []error
	for _, m := range w.maps {
		errs = append(errs, m.Close())
	}
	for _, c := range w.clients {
		c.Close()
	}
	return errors.Join(errs...)
}

// mark remembers that what v names does not run, or does again.
func (w *bedWorld) mark(v Victim, dead bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if v.Kind == kindWireGuard {
		return // the agent answers, and starts it
	}
	if v.Kind == kindKVStore || v.Kind == kindCluster {
		w.stores[v.Cluster] = dead
	}
	for _, n := range w.nodes() {
		if n.Cluster != v.Cluster || v.Kind == kindKVStore || v.Node != "" && v.Node != n.Node {
			continue
		}
		if v.Kind != kindAgent {
			w.off[n] = dead
		}
		w.mute[n] = dead
	}
	for name, s := range w.servers {
		s.runs = !w.off[s.node]
		w.servers[name] = s
	}
}

func (w *bedWorld) kill(ctx context.Context, v Victim) (time.Time, error) {
	// What is about to die is not looked at any more.
	w.mark(v, true)
	return w.bed.killAt(ctx, v)
}

func (w *bedWorld) start(ctx context.Context, v Victim, begun func(time.Time)) error {
	return w.bed.startAt(ctx, v, func(at time.Time) {
		w.mark(v, false)
		begun(at)
	})
}

func (w *bedWorld) partition(ctx context.Context, p Partition) error { return w.bed.Partition(ctx, p) }
func (w *bedWorld) lose(ctx context.Context, percent float64) error {
	return w.bed.LoseEverywhere(ctx, percent)
}
func (w *bedWorld) mtu(ctx context.Context, p PathMTU) error { return w.bed.SetPathMTU(ctx, p) }

func (w *bedWorld) clock(ctx context.Context, place string, offset time.Duration) error {
	return w.renew(func(s *State) ([]identity.NodeName, error) { return s.nodesOf(place) }, func() error { return w.bed.SetClock(ctx, place, offset) })
}

func (w *bedWorld) heal(ctx context.Context) error {
	return w.renew(func(s *State) ([]identity.NodeName, error) { return s.wrongClocks(), nil }, func() error { return w.bed.HealAll(ctx) })
}

// renew does what restarts the agents of nodes, which are not looked at meanwhile.
func (w *bedWorld) renew(choose func(*State) ([]identity.NodeName, error), restart func() error) error {
	s, err := w.bed.State()
	if err != nil {
		return err
	}
	nodes, err := choose(s)
	if err != nil {
		return err
	}
	nodes = slices.DeleteFunc(nodes, w.silent)
	for _, n := range nodes {
		w.mark(Victim{Kind: kindAgent, Cluster: n.Cluster, Node: n.Node}, true)
	}
	if err := restart(); err != nil {
		return err
	}
	for _, n := range nodes {
		w.mark(Victim{Kind: kindAgent, Cluster: n.Cluster, Node: n.Node}, false)
	}
	return nil
}

// silent tells whether the node's agent does not run.
func (w *bedWorld) silent(n identity.NodeName) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mute[n]
}

func (w *bedWorld) flap(ctx context.Context, node identity.NodeName, o FlapOptions) error {
	_, err := w.bed.Flap(ctx, node, o)
	return err
}

func (w *bedWorld) runServer(ctx context.Context, node identity.NodeName, name string) error {
	full := node.Cluster + "/" + name
	pod, err := w.bed.RunPod(ctx, PodSpec{
		Cluster: node.Cluster, Node: node.Node, Name: name, Labels: map[string]string{"app": w.setup.Service}, ReadyPort: backendPort,
		Command: []string{"clustermesh", "testbed", "serve", "--name", full, "--listen", fmt.Sprintf(":%d", backendPort)},
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.servers[full] = server{name: full, node: node, address: netip.AddrPortFrom(pod.Address, backendPort), runs: !w.off[node]}
	return nil
}

func (w *bedWorld) deleteServer(ctx context.Context, name string) error {
	w.mu.Lock()
	if s, ok := w.servers[name]; ok {
		s.runs = false // it is expected no more from now on; the name stays, for messages
		w.servers[name] = s
	}
	w.mu.Unlock()
	cluster, pod, _ := strings.Cut(name, "/")
	if _, err := w.bed.DeletePod(ctx, cluster, pod, DefaultGrace); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.servers, name)
	return nil
}

func (w *bedWorld) traffic(_ context.Context, cluster string, rate float64) (func() (*LoadResult, error), error) {
	return w.send(Target{Cluster: cluster, Pod: clientName}, rate)
}

// look takes a sight of the nodes whose agent runs.
func (w *bedWorld) look(ctx context.Context, what looks) *sight {
	s := &sight{at: time.Now()}
	live := w.snapshot(s)
	if what&lookKernels != 0 {
		w.lookKernels(live, what&lookAgain != 0, s)
	}
	if what&lookViews != 0 {
		w.lookViews(ctx, live, s)
	}
	if what&lookStatus != 0 {
		w.lookStatus(ctx, s)
	}
	return s
}

// snapshot copies the servers into a sight, and returns the nodes whose agent runs.
func (w *bedWorld) snapshot(s *sight) (live []identity.NodeName) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, server := range w.servers {
		s.servers = append(s.servers, server)
	}
	slices.SortFunc(s.servers, func(a, b server) int { return strings.Compare(a.name, b.name) })
	for _, n := range w.nodes() {
		if !w.mute[n] {
			live = append(live, n)
		}
	}
	return live
}

// lookKernels reads the kernels, or takes what was read just now: several expectations may look at the same time.
func (w *bedWorld) lookKernels(live []identity.NodeName, again bool, s *sight) {
	w.reading.Lock()
	defer w.reading.Unlock()
	if again || time.Since(w.readAt) > kernelInterval/2 {
		w.readAt, w.read = time.Now(), map[identity.NodeName][]frontend{}
		for _, n := range live {
			w.read[n] = w.kernel(n)
		}
	}
	s.at, s.kernels = w.readAt, w.read
}

// kernel reads the service's addresses out of a node's maps.
func (w *bedWorld) kernel(n identity.NodeName) (list []frontend) {
	entries, err := w.maps[n].ListFrontends()
	for _, c := range w.setup.clusters() {
		f := frontend{address: w.addresses[c], unread: err}
		for _, e := range entries {
			if e.Address != f.address || e.Port != shopPort {
				continue
			}
			f.known = true
			for _, b := range e.Backends {
				f.backends = append(f.backends, b.Address)
			}
		}
		list = append(list, f)
	}
	return list
}

func (w *bedWorld) lookViews(ctx context.Context, live []identity.NodeName, s *sight) {
	ctx, cancel := context.WithTimeout(ctx, viewTimeout)
	defer cancel()
	s.views = map[identity.NodeName]*api.Members{}
	var mu sync.Mutex
	var group sync.WaitGroup
	for _, n := range live {
		group.Go(func() {
			m, err := w.clients[n].Members(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				s.silent = append(s.silent, fmt.Sprintf("%v: %v", n, err))
				return
			}
			s.views[n] = m
		})
	}
	group.Wait()
}

func (w *bedWorld) lookStatus(ctx context.Context, s *sight) {
	s.problems = map[identity.NodeName][]string{}
	st, err := w.bed.Status(ctx)
	if err != nil {
		s.unwell = append(s.unwell, err.Error())
		return
	}
	for _, c := range st.Clusters {
		if !c.KVStore.Alive {
			s.unwell = append(s.unwell, "the store of "+c.Name+" does not run")
		}
		for _, n := range c.Nodes {
			s.problems[identity.NodeName{Cluster: c.Name, Node: n.Name}] = n.Problems
			if !n.OK {
				s.unwell = append(s.unwell, fmt.Sprintf("%s/%s: %s", c.Name, n.Name, strings.Join(n.Problems, "; ")))
			}
		}
	}
}

// await waits until conditions hold, written as in a scenario.
func (w *bedWorld) await(ctx context.Context, text string) error {
	p := &parser{scenario: &Scenario{Setup: w.setup}}
	list, err := p.conditions(text)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, quiesceTimeout)
	defer cancel()
	for {
		problem := firstProblem(list, w.look(ctx, needs(list)), true)
		if problem == "" {
			return nil
		}
		if err := pause(ctx, viewInterval); err != nil {
			return fmt.Errorf("%s: %w", problem, err)
		}
	}
}

// restore heals and starts everything, removes what a scenario has run, and waits until the bed is as it was before.
func (w *bedWorld) restore(ctx context.Context, s *Scenario) error {
	if err := w.heal(ctx); err != nil {
		return err
	}
	for _, c := range w.setup.clusters() {
		if w.dead(c) {
			if err := w.start(ctx, Victim{Kind: kindCluster, Cluster: c}, func(time.Time) {}); err != nil {
				return err
			}
		}
	}
	for _, name := range w.extra() {
		if err := w.deleteServer(ctx, name); err != nil {
			return err
		}
	}
	settled := "all is well; exactly the running servers in every kernel"
	if s.needs()&lookViews != 0 {
		settled += "; every node is alive in every view; nothing is quarantined in any view"
	}
	return w.await(ctx, settled)
}

// needs of all of a scenario's conditions.
func (s *Scenario) needs() (all looks) {
	for _, st := range s.steps {
		all |= needs(st.conditions)
	}
	return all
}

// dead tells whether anything of a cluster does not run.
func (w *bedWorld) dead(cluster string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stores[cluster] {
		return true
	}
	for n, mute := range w.mute {
		if n.Cluster == cluster && mute {
			return true
		}
	}
	return false
}

// extra are the servers that are not of the setup.
func (w *bedWorld) extra() (names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, s := range w.servers {
		if name != s.node.Cluster+"/"+w.setup.Service+"-"+s.node.Node {
			names = append(names, name)
		}
	}
	return names
}
