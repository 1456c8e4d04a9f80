package testbed

import (
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

// prepareNetnsDir makes /run/netns a shared mount of its own, as "ip netns add" does. Without it a later "ip
// netns add" would cover our namespaces with copies of themselves, which could then not be removed
// any more.
func prepareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	share := func() error { return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	err := share()
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
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

// releaseNetnsDir undoes prepareNetnsDir if no namespace is left.
func releaseNetnsDir() {
	entries, err := os.ReadDir(netnsDir)
	if err != nil || len(entries) > 0 {
		return
	}
	if unix.Unmount(netnsDir, 0) == nil {
		os.Remove(netnsDir)
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
