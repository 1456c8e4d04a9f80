package tunnel

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace that functions can be run in, whatever thread they are called on.
type namespace struct {
	handle netns.NsHandle
	inode  uint64
	once   sync.Once
}

// currentNamespace returns that of the calling thread.
func currentNamespace() (*namespace, error) {
	handle, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("opening the network namespace: %w", err)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(handle), &stat); err != nil {
		handle.Close()
		return nil, fmt.Errorf("reading the network namespace: %w", err)
	}
	return &namespace{handle: handle, inode: stat.Ino}, nil
}

// run calls f in the namespace.
func (n *namespace) run(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
		if err := netns.Set(n.handle); err != nil {
			done <- fmt.Errorf("entering the network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// hasProcess tells whether a process is in the namespace.
func (n *namespace) hasProcess(pid int) bool {
	stat, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && n.holds(stat)
}

func (n *namespace) holds(stat os.FileInfo) bool {
	sys, ok := inodeOf(stat)
	return ok && sys == n.inode
}

func (n *namespace) close() {
	if n != nil {
		n.once.Do(func() { n.handle.Close() })
	}
}

func inodeOf(stat os.FileInfo) (uint64, bool) {
	sys, ok := stat.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return sys.Ino, true
}
