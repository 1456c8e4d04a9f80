package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// errNoKubernetes says that a bed was brought up without.
var errNoKubernetes = errors.New("this test-bed has no Kubernetes: it is brought up with clustermesh testbed up --kubernetes")

// revisionBump is how far the revisions of a restored store are ahead of its snapshot's. Kubernetes' clients take a revision for a point in time;
// so those that are ahead of the snapshot are told that theirs is gone, and list anew.
const revisionBump = 1_000_000_000

// killPart ends one part of a cluster's Kubernetes.
func (b *Bed) killPart(ctx context.Context, s *State, c *ClusterState, v Victim) error {
	if c.Kubernetes == nil {
		return errNoKubernetes
	}
	return b.killProcess(ctx, s.cgroup(cgroupPart(c.Name, v.Kind)), c.Kubernetes.Processes[v.Kind], v)
}

// restartPart starts one part again, and what the API server needs if it is that.
func (b *Bed) restartPart(ctx context.Context, s *State, c *ClusterState, v Victim, begun func(time.Time)) error {
	switch {
	case c.Kubernetes == nil:
		return errNoKubernetes
	case c.KVStore.Down:
		return fmt.Errorf("the machine of %v is down; start it with: clustermesh testbed start cluster %s", v, c.Name)
	case c.Kubernetes.Processes[v.Kind].alive():
		return fmt.Errorf("%v runs already", v)
	}
	if v.Kind == kindAPIServer {
		if err := b.startParts(ctx, s, c, partEtcd); err != nil {
			return err
		}
	}
	begun(time.Now())
	return b.startParts(ctx, s, c, v.Kind)
}

// restartKubernetes starts all of a cluster's control plane that does not run; nothing if the cluster has none.
func (b *Bed) restartKubernetes(ctx context.Context, s *State, c *ClusterState) error {
	if c.Kubernetes == nil {
		return nil
	}
	if !c.Kubernetes.Processes[partForward].alive() {
		if err := b.startForward(ctx, s, c); err != nil {
			return err
		}
	}
	return b.startControlPlane(ctx, s, c)
}

// stopped returns the parts of a cluster's Kubernetes that do not run.
func (k *KubernetesState) stopped() (parts []string) {
	if k == nil {
		return nil
	}
	for _, part := range append(slices.Clone(controlPlane), partForward) {
		if !k.Processes[part].alive() {
			parts = append(parts, part)
		}
	}
	return parts
}

// storeCgroups are those of all that runs on a cluster's own machine.
func (s *State) storeCgroups(c *ClusterState) []string {
	cgroups := []string{s.cgroup(cgroupKVStore(c.Name))}
	if c.Kubernetes != nil {
		for _, part := range controlPlane {
			cgroups = append(cgroups, s.cgroup(cgroupPart(c.Name, part)))
		}
	}
	return cgroups
}

// SnapshotKubernetes saves what the Kubernetes of a cluster has in its etcd in a file.
func (b *Bed) SnapshotKubernetes(ctx context.Context, cluster, file string) error {
	file, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	return b.within(ctx, func(s *State) error {
		c, err := s.kubernetesCluster(cluster)
		if err != nil {
			return err
		}
		if !c.Kubernetes.Processes[partEtcd].alive() {
			return fmt.Errorf("the etcd of the Kubernetes of cluster %s does not run; start it with: clustermesh testbed start apiserver %[1]s", cluster)
		}
		return b.runTool(ctx, cluster, "", "etcdctl", "--endpoints="+urlAt(etcdPort), "snapshot", "save", file)
	})
}

// RestoreKubernetes stops a cluster's API server, wipes its etcd, fills it from a snapshot, and starts both again. What came after the snapshot is lost.
func (b *Bed) RestoreKubernetes(ctx context.Context, cluster, file string) error {
	file, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("the snapshot to restore: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("the restored Kubernetes was not well within %v", startTimeout))
	defer cancel()
	return b.within(ctx, func(s *State) error {
		c, err := s.kubernetesCluster(cluster)
		if err != nil {
			return err
		}
		// Beside the old one, so that a file that is no snapshot changes nothing.
		restored := b.etcdData(cluster) + ".restored"
		if err := os.RemoveAll(restored); err != nil {
			return err
		}
		defer os.RemoveAll(restored)
		peer := urlAt(etcdPeerPort)
		err = b.runTool(ctx, cluster, "", "etcdutl", "snapshot", "restore", file, "--data-dir="+restored, "--name="+etcdName,
			"--initial-advertise-peer-urls="+peer, "--initial-cluster="+etcdName+"="+peer, fmt.Sprintf("--bump-revision=%d", revisionBump), "--mark-compacted")
		if err != nil {
			return err
		}
		for _, part := range []string{partAPIServer, partEtcd} {
			if err := killCgroup(ctx, s.cgroup(cgroupPart(cluster, part))); err != nil {
				return err
			}
			if p := c.Kubernetes.Processes[part]; p != nil {
				b.exits.of(*p)
			}
		}
		if err := os.RemoveAll(b.etcdData(cluster)); err != nil {
			return err
		}
		if err := os.Rename(restored, b.etcdData(cluster)); err != nil {
			return err
		}
		return b.startControlPlane(ctx, s, c)
	})
}

func (s *State) kubernetesCluster(name string) (*ClusterState, error) {
	c, err := s.cluster(name)
	if err == nil && c.Kubernetes == nil {
		err = errNoKubernetes
	}
	return c, err
}

// runTool runs one of the bed's programs on a cluster's machine, with a text as its input; what it said is in the error if it fails.
func (b *Bed) runTool(ctx context.Context, cluster, input string, argv ...string) error {
	var out bytes.Buffer
	code, err := b.Exec(ctx, Target{Cluster: cluster}, argv, Stdio{In: strings.NewReader(input), Out: &out, Err: &out})
	if err == nil && code != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", argv[0], code, strings.TrimSpace(out.String()))
	}
	return err
}
