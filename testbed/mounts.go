package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mount is a line of /proc/self/mountinfo, see proc(5).
type mount struct {
	point  string
	fstype string
}

func readMounts() ([]mount, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(b)), nil
}

func parseMounts(info string) []mount {
	var mounts []mount
	for line := range strings.Lines(info) {
		head, tail, ok := strings.Cut(line, " - ")
		fields, rest := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 5 || len(rest) == 0 {
			continue
		}
		mounts = append(mounts, mount{point: unescapeMount(fields[4]), fstype: rest[0]})
	}
	return mounts
}

// unescapeMount decodes the octal escapes of blanks and backslashes in mountinfo.
func unescapeMount(s string) string {
	for i := 0; i+3 < len(s); i++ {
		if s[i] != '\\' {
			continue
		}
		if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
			s = s[:i] + string([]byte{byte(n)}) + s[i+4:]
		}
	}
	return s
}

func isMountPoint(path string) (bool, error) {
	mounts, err := readMounts()
	return slices.ContainsFunc(mounts, func(m mount) bool { return m.point == path }), err
}

// mountBPF mounts a bpf file system of its own at dir, unless there is one.
func mountBPF(dir string) error {
	if mounted, err := isMountPoint(dir); err != nil || mounted {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("causeway", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mounting a bpf file system at %s: %w; the kernel needs CONFIG_BPF_SYSCALL", dir, err)
	}
	if err := unix.Mount("", dir, "none", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mount %s private: %w", dir, err)
	}
	return nil
}

// mountsBelow returns the mount points in dir, the innermost and newest first.
func mountsBelow(dir string) ([]string, error) {
	mounts, err := readMounts()
	if err != nil {
		return nil, err
	}
	var points []string
	for _, m := range slices.Backward(mounts) {
		if strings.HasPrefix(m.point, dir+"/") {
			points = append(points, m.point)
		}
	}
	slices.SortStableFunc(points, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	return points, nil
}

// unmount takes a mount away; one that stays busy is detached, and goes with its last user.
func unmount(ctx context.Context, point string) error {
	err := retryBusy(ctx, func() error { return unix.Unmount(point, 0) })
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(point, unix.MNT_DETACH)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmounting %s: %w", point, err)
	}
	return nil
}

// busyPatience is how long something that was just freed may stay busy while the kernel winds it up.
const busyPatience = time.Second

// retryBusy repeats fn as long as it fails with EBUSY, up to busyPatience.
func retryBusy(ctx context.Context, fn func() error) error {
	deadline := time.Now().Add(busyPatience)
	for {
		err := fn()
		if !errors.Is(err, unix.EBUSY) || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}
