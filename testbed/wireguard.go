package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"causeway/identity"

	"golang.org/x/sys/unix"
)

// wireGuardDir is where WireGuard in user space has its sockets, one a device: namespaces of the network do not part them.
const wireGuardDir = "/var/run/wireguard"

// wireGuardName is the name of a node's WireGuard devices less the number of the slot, at most 14 bytes: cluster and node as hexadecimal numbers.
func (l layout) wireGuardName(c identity.ClusterID, n int) string {
	return fmt.Sprintf("%s-%02x%02xw", l.id, int(c), n)
}

var wireGuardSocket = regexp.MustCompile(`^[0-9a-f]{4}w[0-9]\.sock$`)

// wireGuardSockets returns the sockets of the bed's devices.
func (l layout) wireGuardSockets() ([]string, error) {
	entries, err := os.ReadDir(wireGuardDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var sockets []string
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Name(), l.id+"-"); ok && wireGuardSocket.MatchString(rest) {
			sockets = append(sockets, filepath.Join(wireGuardDir, e.Name()))
		}
	}
	return sockets, err
}

// removeWireGuardSockets removes what killed processes have left.
func (l layout) removeWireGuardSockets() error {
	sockets, err := l.wireGuardSockets()
	errs := []error{err}
	for _, s := range sockets {
		if err := os.Remove(s); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// wireGuardProcesses returns the processes that are WireGuard on a node; none if the kernel is, or if nothing is encrypted.
func (s *State) wireGuardProcesses(cluster, node string) ([]*Process, error) {
	return processesIn(s.cgroup(cgroupWireGuard(cluster, node)))
}

// processesIn returns the processes of a cgroup; none if it is not there.
func processesIn(cgroup string) ([]*Process, error) {
	b, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var ps []*Process
	for field := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("a process of the cgroup %s: %w", cgroup, err)
		}
		if p, err := processOf(pid); err == nil && p.alive() {
			ps = append(ps, p)
		}
	}
	return ps, nil
}

// killWireGuard kills a node's WireGuard processes, which its agent starts anew.
func (b *Bed) killWireGuard(ctx context.Context, s *State, v Victim) error {
	if _, err := s.node(v.Cluster, v.Node); err != nil {
		return err
	}
	ps, err := s.wireGuardProcesses(v.Cluster, v.Node)
	if err != nil {
		return err
	}
	if len(ps) == 0 {
		return fmt.Errorf("node %s/%s has no WireGuard process: it encrypts nothing, or the kernel does it", v.Cluster, v.Node)
	}
	return killAll(ctx, v, ps)
}

// killAll kills processes at once, without their cgroup, and waits for their ends.
func killAll(ctx context.Context, v Victim, ps []*Process) error {
	for _, p := range ps {
		if err := p.signal(unix.SIGKILL); err != nil {
			return err
		}
	}
	for _, p := range ps {
		if !p.waitGone(ctx) {
			return fmt.Errorf("process %d of %v does not end although it was killed: %w", p.PID, v, ctx.Err())
		}
	}
	return nil
}

// encryptionOf returns a cluster's mode.
func (o *Options) encryptionOf(cluster string) identity.Encryption {
	if mode, ok := o.EncryptionOf[cluster]; ok {
		return mode
	}
	if o.Encryption == "" {
		return identity.EncryptAll
	}
	return o.Encryption
}

func (o *Options) validateEncryption() error {
	for _, cluster := range slices.Sorted(maps.Keys(o.EncryptionOf)) {
		if !slices.Contains(o.Clusters, cluster) {
			return fmt.Errorf("encryption of cluster %q: the clusters are %s", cluster, strings.Join(o.Clusters, ", "))
		}
	}
	off := ""
	for _, cluster := range o.Clusters {
		mode, err := identity.ParseEncryption(string(o.encryptionOf(cluster)))
		if err != nil {
			return err
		}
		if mode == identity.EncryptOff {
			off = cluster
		}
	}
	for _, cluster := range o.Clusters {
		if mode := o.encryptionOf(cluster); off != "" && mode != identity.EncryptOff && !o.Unconnected {
			return fmt.Errorf("cluster %s encrypts nothing and cluster %s %s: they refuse to be joined; set the same for all, or leave them unconnected", off, cluster, mode)
		}
	}
	return nil
}
