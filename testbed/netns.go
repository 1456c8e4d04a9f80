package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 looks for named network namespaces.
const netnsDir = "/run/netns"

// netnsPath is the file that keeps a named namespace alive.
func netnsPath(name string) string { return filepath.Join(netnsDir, name) }

// madeAttr on /run/netns says what of it we made: "mount", or "dir" for both. It outlives any one bed.
const madeAttr = "trusted.causeway.made"

// withNetnsDir runs fn while /run/netns is there and no bed that goes down can remove it.
func withNetnsDir(ctx context.Context, fn func() error) error {
	for {
		if err := makeNetnsDir(); err != nil {
			return err
		}
		lock, err := lockDir(ctx, netnsDir, unix.LOCK_EX)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed just now
		}
		if err != nil {
			return err
		}
		defer lock.unlock()
		if err := shareNetnsDir(); err != nil {
			return err
		}
		return fn()
	}
}

func makeNetnsDir() error {
	err := os.Mkdir(netnsDir, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		// A file system without such attributes only means that an empty directory stays.
		_ = unix.Setxattr(netnsDir, madeAttr, []byte("dir"), 0)
	}
	return err
}

// shareNetnsDir makes /run/netns a shared mount of its own, as "ip netns add" does. Without it a later "ip netns
// add" would cover our namespaces with copies of themselves, which could then not be removed any more.
func shareNetnsDir() error {
	share := func() error { return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	err := share()
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		// If we made the directory too, it says so already.
		_ = unix.Setxattr(netnsDir, madeAttr, []byte("mount"), unix.XATTR_CREATE)
		if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mounting %s on itself: %w", netnsDir, err)
		}
		err = share()
	}
	if err != nil {
		return fmt.Errorf("making %s a shared mount: %w", netnsDir, err)
	}
	return nil
}

// releaseNetnsDir undoes withNetnsDir once nobody has a namespace in /run/netns. A bed that comes up just now keeps it.
func releaseNetnsDir() {
	buf := make([]byte, 16)
	n, err := unix.Getxattr(netnsDir, madeAttr, buf)
	if err != nil {
		return
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	lock, err := lockDir(now, netnsDir, unix.LOCK_EX)
	if err != nil {
		return
	}
	defer lock.unlock()
	if entries, err := os.ReadDir(netnsDir); err != nil || len(entries) > 0 {
		return
	}
	// The lock is a file open on the directory, which holds the mount.
	if err := unix.Unmount(netnsDir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return
	}
	if string(buf[:n]) == "dir" {
		os.Remove(netnsDir)
	} else {
		_ = unix.Removexattr(netnsDir, madeAttr)
	}
}

// onThread runs fn on an operating system thread that stays in the network namespace it came from, or is thrown away.
func onThread(fn func() error) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("opening this thread's network namespace: %w", err)
	}
	defer home.Close()
	defer func() {
		// A thread that cannot return stays locked, and dies with its goroutine.
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return fn()
}

// createNS makes a named network namespace with its loopback up.
func createNS(name string) error {
	path := netnsPath(name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("creating the network namespace %s: %w", name, err)
	}
	f.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, "")
	})
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("creating the network namespace %s: %w", name, err)
	}
	return withHandle(name, loopbackUp)
}

// inNS runs fn in a named network namespace. What fn forks or opens belongs to it; fn must not start goroutines that do.
func inNS(name string, fn func() error) error {
	ns, err := netns.GetFromPath(netnsPath(name))
	if err != nil {
		return fmt.Errorf("opening the network namespace %s: %w", name, err)
	}
	defer ns.Close()
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("entering the network namespace %s: %w", name, err)
		}
		return fn()
	})
}

// deleteNS removes a name; the namespace goes as soon as no process is in it. A name that isn't there is no error.
func deleteNS(name string) error {
	path := netnsPath(name)
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // nothing is mounted on it any more
		}
		if err != nil {
			return fmt.Errorf("unmounting the network namespace %s: %w", name, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the network namespace %s: %w", name, err)
	}
	return nil
}

// listNS returns the names of the bed's namespaces that exist.
func (l layout) listNS() ([]string, error) {
	entries, err := os.ReadDir(netnsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing network namespaces: %w", err)
	}
	var names []string
	for _, e := range entries {
		if l.ownsNS(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
