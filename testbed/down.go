package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killPatience is how long killed processes may take to be gone.
const killPatience = 10 * time.Second

// Clean takes away everything that a bed in dir has on this machine: one that is up, one that was cut off in the
// middle, or what is left of one whose directory is damaged or gone. Where there is nothing, it does
// nothing. The error names everything that stayed, one line each.
func Clean(ctx context.Context, dir string) error {
	l, err := newLayout(dir)
	if err != nil {
		return err
	}
	lock, err := l.operate(ctx, true)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer lock.unlock()
	return l.clean(ctx)
}

// clean is Clean under the lock.
func (l layout) clean(ctx context.Context) error {
	m, _ := l.readMarker()
	if err := l.wipe(ctx); err != nil {
		return err
	}
	return l.removeDir(m)
}

// Leftovers lists what a bed in dir has on this machine: namespaces, cgroups, mounts, sockets and files.
func Leftovers(dir string) ([]string, error) {
	l, err := newLayout(dir)
	if err != nil {
		return nil, err
	}
	names, err := l.listNS()
	if err != nil {
		return nil, err
	}
	var left []string
	for _, n := range names {
		left = append(left, "network namespace "+n)
	}
	for _, root := range l.cgroupRoots() {
		left = append(left, "cgroup "+root)
	}
	points, err := mountsBelow(l.dir)
	if err != nil {
		return nil, err
	}
	for _, p := range points {
		left = append(left, "mount "+p)
	}
	sockets, err := l.wireGuardSockets()
	if err != nil {
		return nil, err
	}
	for _, s := range sockets {
		left = append(left, "socket "+s)
	}
	if l.ownsDir() {
		left = append(left, "directory "+l.dir)
	}
	return left, nil
}

// ownsDir tells whether the files in the bed's directory are a bed's. A directory that somebody named by mistake is not.
func (l layout) ownsDir() bool {
	if _, err := os.Stat(l.dir); err != nil {
		return false
	}
	if _, err := os.Stat(l.marker()); err == nil || l.isDefault() {
		return true
	}
	_, err := l.readState()
	return err == nil
}

// cgroupRoots returns the bed's cgroups that exist, whichever mount they were made through.
func (l layout) cgroupRoots() []string {
	mounts := []string{l.ownCgroupMount()}
	if m, err := findCgroupMount(); err == nil && m != "" {
		mounts = append(mounts, m)
	}
	var roots []string
	for _, m := range mounts {
		root := filepath.Join(m, l.id)
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		if owner := cgroupOwner(root); owner == "" || owner == l.dir {
			roots = append(roots, root)
		}
	}
	return roots
}

// wipe removes everything of the bed but its directory and marker, for which see removeDir.
func (l layout) wipe(ctx context.Context) error {
	s, stateErr := l.readState()
	if stateErr == nil && s.Phase != PhaseStopping {
		s.Phase = PhaseStopping
		// A full disk must not keep anything from being removed.
		_ = l.writeState(s)
	}
	// Processes first: everything else is held by them. If one does not end, the rest goes all the same.
	killErr := l.killAll(ctx, s)
	errs := new(collector)
	errs.add(killErr)
	names, err := l.listNS()
	errs.add(err)
	for _, n := range names {
		errs.run(func() error { return deleteNS(n) })
	}
	if killErr == nil {
		for _, root := range l.cgroupRoots() {
			errs.run(func() error { return removeCgroup(ctx, root) })
		}
	}
	errs.run(l.removeWireGuardSockets)
	errs.run(func() error { return l.unmountAll(ctx, func(p string) bool { return p != l.ownCgroupMount() }) })
	if err := errs.wait(); err != nil {
		return err
	}
	// The cgroups are gone only now, and their file system with them.
	if err := l.unmountAll(ctx, func(string) bool { return true }); err != nil {
		return err
	}
	if !l.ownsDir() {
		return nil
	}
	return l.removeFiles()
}

// killAll kills every process of the bed, by cgroup and by what the state has recorded.
func (l layout) killAll(ctx context.Context, s *State) error {
	ctx, cancel := context.WithTimeout(ctx, killPatience)
	defer cancel()
	var errs []error
	for _, root := range l.cgroupRoots() {
		errs = append(errs, killCgroup(ctx, root))
	}
	boot, err := bootID()
	if err != nil || s == nil || s.Boot != boot {
		return errors.Join(append(errs, err)...)
	}
	for _, p := range s.processes() {
		errs = append(errs, p.signal(unix.SIGKILL))
	}
	for _, p := range s.processes() {
		if !p.waitGone(ctx) {
			errs = append(errs, fmt.Errorf("process %d does not end although it was killed", p.PID))
		}
		p.reap()
	}
	return errors.Join(errs...)
}

// processes returns every process that the state has recorded.
func (s *State) processes() []*Process {
	var ps []*Process
	for _, c := range s.Clusters {
		ps = append(ps, c.KVStore.Process)
		if c.Kubernetes != nil {
			ps = slices.AppendSeq(ps, maps.Values(c.Kubernetes.Processes))
		}
		for _, n := range c.Nodes {
			ps = append(ps, n.Agent, n.Kubelet)
		}
	}
	for _, p := range s.Pods {
		ps = append(ps, p.Process)
	}
	return slices.DeleteFunc(ps, func(p *Process) bool { return p == nil })
}

func (l layout) unmountAll(ctx context.Context, which func(string) bool) error {
	points, err := mountsBelow(l.dir)
	if err != nil {
		return err
	}
	errs := new(collector)
	for _, p := range points {
		if which(p) {
			errs.run(func() error { return unmount(ctx, p) })
		}
	}
	return errs.wait()
}

// removeFiles empties the bed's directory but for its marker. It must not reach into a mount.
func (l layout) removeFiles() error {
	if points, err := mountsBelow(l.dir); err != nil || len(points) > 0 {
		return errors.Join(err, fmt.Errorf("still mounted in the test-bed's directory: %v", points))
	}
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if p := l.path(e.Name()); p != l.marker() {
			errs = append(errs, os.RemoveAll(p))
		}
	}
	return errors.Join(errs...)
}

// removeDir removes the marker and the directories that were made for the bed.
func (l layout) removeDir(m marker) error {
	releaseNetnsDir()
	if err := os.Remove(l.marker()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dirs := m.Dirs
	if l.isDefault() {
		dirs = append(dirs, l.dir)
	}
	if common := filepath.Dir(DefaultDir); strings.HasPrefix(l.dir, common+"/") {
		dirs = append(dirs, common) // whichever of several beds has made it
	}
	for _, d := range dirs {
		// Only if empty: others may have come to use it.
		if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}
