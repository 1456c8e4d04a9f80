package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"causeway/datapath"

	"golang.org/x/sync/errgroup"
)

const (
	// parallel bounds how many things are made or removed at once.
	parallel = 32
	// cleanTimeout bounds the cleaning up after a failed Up.
	cleanTimeout = 30 * time.Second
)

// Up brings a bed up and returns when every store answers and every agent is well. If it fails, nothing is left.
//
// What an earlier bed in the same directory left behind is removed first. A bed that is up
// is not touched: the error is [ErrAlreadyUp].
func Up(ctx context.Context, o Options) (*Bed, error) {
	l, err := newLayout(o.Dir)
	if err != nil {
		return nil, err
	}
	if err := o.validate(l); err != nil {
		return nil, err
	}
	if err := check(); err != nil {
		return nil, err
	}
	if o.Timeout == 0 {
		o.Timeout = 30*time.Second + time.Duration(len(o.Clusters)*o.Nodes)*time.Second/2
		if o.Kubernetes {
			o.Timeout += 90 * time.Second
		}
	}
	// Ahead of the bed: it may take minutes, and needs nothing of it.
	if o.Kubernetes && o.KubernetesProgram == "" {
		if o.KubernetesProgram, err = BuildKubernetes(ctx, o.Progress); err != nil {
			return nil, err
		}
	}
	b := &Bed{layout: l}
	lock, err := b.claim(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	if err := b.up(ctx, &o); err != nil {
		// Also when ctx has ended: Ctrl-C must not leave anything.
		cleanCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		if cleanErr := b.clean(cleanCtx); cleanErr != nil {
			err = errors.Join(err, fmt.Errorf("and cleaning up failed: %w", cleanErr))
		}
		return nil, err
	}
	return b, nil
}

// claim makes the directory the bed's, locks it, and removes what an earlier bed left.
func (b *Bed) claim(ctx context.Context) (*fileLock, error) {
	for {
		if err := b.makeDir(); err != nil {
			return nil, err
		}
		lock, err := b.operate(ctx, true)
		if errors.Is(err, fs.ErrNotExist) {
			continue // somebody who took a bed down has removed it just now
		}
		if err != nil {
			return nil, err
		}
		if err := b.checkFree(); err != nil {
			lock.unlock()
			return nil, err
		}
		if err := b.wipe(ctx); err != nil {
			lock.unlock()
			return nil, fmt.Errorf("removing what an earlier test-bed left: %w", err)
		}
		return lock, nil
	}
}

// makeDir makes the bed's directory and marks it.
func (b *Bed) makeDir() error {
	if b.ownsDir() && fileExists(b.marker()) {
		return nil
	}
	if entries, err := os.ReadDir(b.dir); err == nil && len(entries) > 0 && !b.ownsDir() {
		return fmt.Errorf("%s is not empty and not a test-bed's directory: name another one with --dir", b.dir)
	}
	var made []string
	for d := b.dir; !fileExists(d); d = filepath.Dir(d) {
		made = append(made, d)
	}
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return fmt.Errorf("making the test-bed's directory: %w", err)
	}
	return b.writeMarker(marker{ID: b.id, Dirs: made})
}

func fileExists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// checkFree tells whether a bed is up in the directory that must not be disturbed.
func (b *Bed) checkFree() error {
	s, err := b.readState()
	if err != nil || s.Phase != PhaseUp {
		return nil // none, damaged, or cut off in the middle: we hold the lock
	}
	if boot, err := bootID(); err != nil || boot != s.Boot {
		return err
	}
	if s.Owner != nil && !s.Owner.alive() {
		return nil
	}
	if s.Owner != nil {
		return fmt.Errorf("%w in %s, and belongs to the running process %d; wait for it to end", ErrAlreadyUp, b.dir, s.Owner.PID)
	}
	return fmt.Errorf("%w in %s; take it down with: clustermesh testbed down%s", ErrAlreadyUp, b.dir, b.dirFlag())
}

// up makes everything, in the order that its parts need each other.
func (b *Bed) up(ctx context.Context, o *Options) error {
	ctx, cancel := context.WithTimeoutCause(ctx, o.Timeout, fmt.Errorf("the test-bed was not ready within %v", o.Timeout))
	defer cancel()
	tell := progress(o.Progress)
	s, err := newState(b.layout, o)
	if err != nil {
		return err
	}
	if err := b.prepare(s, o); err != nil {
		return err
	}
	if err := b.makeNetwork(ctx, s); err != nil {
		return err
	}
	nodes := 0
	for _, c := range s.Clusters {
		nodes += len(c.Nodes)
	}
	tell("%s and %s on one underlay", count(len(s.Clusters), "cluster"), count(nodes, "node"))
	if err := b.startClusters(ctx, s, tell); err != nil {
		return err
	}
	if err := b.eachNode(ctx, s, b.startAgent); err != nil {
		return err
	}
	tell("%s", count(nodes, "agent")+verb(nodes, " is", " are")+" well")
	if s.hasKubernetes() {
		if err := b.eachNode(ctx, s, b.startKubelet); err != nil {
			return err
		}
	}
	if !o.Unconnected && len(s.Clusters) > 1 {
		if err := b.connectAll(ctx, s); err != nil {
			return err
		}
		tell("%d clusters are joined, and every agent follows all of them", len(s.Clusters))
	}
	if s.hasKubernetes() {
		if err := b.eachCluster(ctx, s, b.waitKubernetes); err != nil {
			return err
		}
		tell("%s", count(nodes, "Kubernetes node")+verb(nodes, " is", " are")+" ready, and cluster DNS is available")
	}
	return b.update(ctx, func(s *State) error {
		s.Phase = PhaseUp
		return nil
	})
}

// startClusters starts the clusters' stores, and the control planes of their Kubernetes beside them.
func (b *Bed) startClusters(ctx context.Context, s *State, tell func(string, ...any)) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := b.eachCluster(ctx, s, b.startKVStore); err != nil {
			return err
		}
		tell("%s", count(len(s.Clusters), "store")+verb(len(s.Clusters), " answers", " answer"))
		return nil
	})
	if s.hasKubernetes() {
		g.Go(func() error {
			if err := b.prepareKubernetes(ctx, s); err != nil {
				return err
			}
			if err := b.eachCluster(ctx, s, b.bringUpKubernetes); err != nil {
				return err
			}
			tell("%s", count(len(s.Clusters), "Kubernetes control plane")+verb(len(s.Clusters), " is", " are")+" well")
			return nil
		})
	}
	return g.Wait()
}

// progress returns a function that reports steps, with their time since now.
func progress(report func(Event)) func(format string, args ...any) {
	began := time.Now()
	var mu sync.Mutex
	return func(format string, args ...any) {
		if report == nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		report(Event{Text: fmt.Sprintf(format, args...), Elapsed: time.Since(began)})
	}
}

func count(n int, noun string) string { return fmt.Sprintf("%d %s%s", n, noun, verb(n, "", "s")) }

func verb(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// prepare writes down what is going to be made, then makes what is not network: files, cgroups.
func (b *Bed) prepare(s *State, o *Options) error {
	mount, err := b.cgroupMount()
	if err != nil {
		return err
	}
	if err := datapath.Check(); err != nil {
		return err
	}
	s.CgroupRoot = filepath.Join(mount, b.id)
	if err := b.writeState(s); err != nil {
		return err
	}
	if err := b.installBinary(o.Binary); err != nil {
		return err
	}
	if o.Kubernetes {
		if err := b.installKubernetes(o.KubernetesProgram); err != nil {
			return err
		}
	}
	if err := b.makeCgroupRoot(s.CgroupRoot); err != nil {
		return err
	}
	for _, c := range s.Clusters {
		for _, dir := range []string{b.path(c.Name, kvstoreName), b.path(c.Name, kvstoreName, "data")} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
		}
		for _, n := range c.Nodes {
			if err := b.prepareNode(s, c, n, o); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *Bed) prepareNode(s *State, c ClusterState, n NodeState, o *Options) error {
	for _, dir := range []string{"state", "pods"} {
		if err := os.MkdirAll(b.path(c.Name, n.Name, dir), 0o700); err != nil {
			return err
		}
	}
	if err := mountBPF(b.bpffs(c.Name, n.Name)); err != nil {
		return err
	}
	if err := makeCgroup(s.cgroup(cgroupNode(c.Name, n.Name))); err != nil {
		return err
	}
	if o.Kubernetes {
		if err := b.prepareCNI(c.Name, n.Name); err != nil {
			return err
		}
	}
	return b.writeAgentConfig(s, c, n, o)
}

// installBinary copies the program into the bed: the original may be gone while the bed is up, as "go run" removes it.
func (b *Bed) installBinary(from string) error {
	if from == "" {
		from = "/proc/self/exe"
	}
	if err := os.MkdirAll(b.binDir(), 0o700); err != nil {
		return err
	}
	return copyProgram(from, b.binary())
}

// makeNetwork makes the underlay and the namespace of every store and node.
func (b *Bed) makeNetwork(ctx context.Context, s *State) error {
	// From the first namespace on, /run/netns stays.
	if err := withNetnsDir(ctx, b.makeUnderlay); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, c := range s.Clusters {
		g.Go(func() error {
			return b.plug(b.kvstoreNS(c.Name), portName(c.Name, kvstoreName), s.Underlay, c.KVStore.Address)
		})
		for _, n := range c.Nodes {
			g.Go(func() error {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				return b.plug(b.nodeNS(c.Name, n.Name), portName(c.Name, n.Name), s.Underlay, n.Address)
			})
		}
	}
	return g.Wait()
}

func (b *Bed) eachCluster(ctx context.Context, s *State, fn func(context.Context, *State, *ClusterState) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for i := range s.Clusters {
		g.Go(func() error { return fn(ctx, s, &s.Clusters[i]) })
	}
	return g.Wait()
}

func (b *Bed) eachNode(ctx context.Context, s *State, fn func(context.Context, *State, *ClusterState, *NodeState) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for i := range s.Clusters {
		c := &s.Clusters[i]
		for j := range c.Nodes {
			g.Go(func() error { return fn(ctx, s, c, &c.Nodes[j]) })
		}
	}
	return g.Wait()
}
