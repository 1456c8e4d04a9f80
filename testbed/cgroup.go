package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// dirAttr is set on the bed's cgroup to the bed's directory: it tells whose the
// cgroup is, and leads from inside a namespace to the bed.
const dirAttr = "trusted.causeway.dir"

// findCgroupMount returns where the machine has mounted the cgroup v2 hierarchy, "" if nowhere.
func findCgroupMount() (string, error) {
	mounts, err := readMounts()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		// Another test-bed's private mount goes away with it.
		if _, err := os.Stat(filepath.Join(filepath.Dir(m.point), ".causeway-testbed")); m.fstype == "cgroup2" && err != nil {
			return m.point, nil
		}
	}
	return "", nil
}

// cgroupMount returns the cgroup2 mount that the bed uses: the machine's, or one of its own, mounted if need be.
func (l layout) cgroupMount() (string, error) {
	mount, err := findCgroupMount()
	if err != nil || mount != "" {
		return mount, err
	}
	own := l.ownCgroupMount()
	if mounted, err := isMountPoint(own); err != nil || mounted {
		return own, err
	}
	if err := os.MkdirAll(own, 0o700); err != nil {
		return "", err
	}
	if err := unix.Mount("causeway", own, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return "", fmt.Errorf("cgroup v2 is not mounted on this machine, and mounting it at %s failed (%w); the kernel needs CONFIG_CGROUPS and CONFIG_CGROUP_BPF", own, err)
	}
	return own, nil
}

// makeCgroupRoot makes the bed's own cgroup and writes on it whose it is.
func (l layout) makeCgroupRoot(root string) error {
	if err := os.Mkdir(root, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making the cgroup %s: %w", root, err)
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.kill")); err != nil {
		os.Remove(root)
		return errors.New("this kernel's cgroups have no cgroup.kill; Linux 5.14 or newer is needed")
	}
	if err := unix.Setxattr(root, dirAttr, []byte(l.dir), 0); err != nil {
		return fmt.Errorf("marking the cgroup %s: %w", root, err)
	}
	return nil
}

// cgroupOwner returns the directory of the bed that a cgroup is marked with, "" without a mark.
func cgroupOwner(root string) string {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getxattr(root, dirAttr, buf)
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

func makeCgroup(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the cgroup %s: %w", dir, err)
	}
	return nil
}

// killCgroup kills every process in dir and below, and waits until they are gone. A missing cgroup is no error.
// The cgroups that held them can be used again.
func killCgroup(ctx context.Context, dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("killing the processes of %s: %w", dir, err)
	}
	if err := waitEmpty(ctx, dir); err != nil {
		return err
	}
	return renewCgroup(ctx, dir)
}

// renewCgroup replaces the innermost cgroups of dir by new ones. Since Linux 6.15 a process that is cloned into a
// cgroup that was ever killed may be killed too: clone compares the number of kills of the cgroup that it comes from
// with that of the one that it goes to.
func renewCgroup(ctx context.Context, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	leaf := true
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		leaf = false
		if err := renewCgroup(ctx, filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if !leaf {
		return nil
	}
	if err := retryBusy(ctx, func() error { return unix.Rmdir(dir) }); err != nil {
		return fmt.Errorf("renewing the cgroup %s: %w", dir, err)
	}
	return makeCgroup(dir)
}

// cgroupPopulated tells whether any process is in dir or below it.
func cgroupPopulated(dir string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	return strings.Contains(string(b), "populated 1"), err
}

// waitEmpty waits until no process is left in dir and below; the kernel signals a change of cgroup.events by POLLPRI.
func waitEmpty(ctx context.Context, dir string) error {
	f, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if errors.Is(err, unix.ENODEV) || strings.Contains(string(buf[:n]), "populated 0") {
			return nil
		}
		if n == 0 && err != nil {
			return fmt.Errorf("watching %s: %w", dir, err)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("processes %s of the cgroup %s did not end: %w", pidsOf(dir), dir, ctx.Err())
		}
		// Short, because ctx may end meanwhile.
		unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}, 50)
	}
}

// pidsOf lists the processes in dir and below, for messages.
func pidsOf(dir string) string {
	var pids []string
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "cgroup.procs" {
			b, _ := os.ReadFile(path)
			pids = append(pids, strings.Fields(string(b))...)
		}
		return nil
	})
	return strings.Join(pids, ", ")
}

// removeCgroup removes dir and every cgroup below it; their processes must be gone.
func removeCgroup(ctx context.Context, dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(ctx, filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := waitEmpty(ctx, dir); err != nil {
		return err
	}
	if err := retryBusy(ctx, func() error { return unix.Rmdir(dir) }); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the cgroup %s: %w", dir, err)
	}
	return nil
}
