package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Ways to attach a program to a network device.
const (
	// AttachTCX is a link of its own, which is replaced atomically. Linux 6.6 and later.
	AttachTCX = "tcx"
	// AttachClsact is a filter in the device's clsact qdisc, which is replaced atomically too, but which anybody
	// may remove.
	AttachClsact = "clsact"
)

// hook is the place of a device where a program sees its packets.
type hook uint8

const (
	ingress hook = iota
	egress
)

// attacher attaches programs in a way that outlives the process: as links pinned in dir, or
// as filters. Where a program is attached already it is replaced, and no packet is missed.
type attacher struct {
	dir  string
	mode string
}

// device attaches prog to a network device of the calling thread's namespace. The name tells this attachment
// from all others of the node.
func (a *attacher) device(name string, ifindex int, at hook, prog *ebpf.Program) error {
	if a.mode == AttachTCX {
		err := a.tcx(name, ifindex, at, prog)
		if err == nil {
			return removeFilter(name, ifindex, at)
		}
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return err
		}
		a.mode = AttachClsact
	}
	if err := setFilter(name, ifindex, at, prog); err != nil {
		return err
	}
	return a.remove(name)
}

// move attaches prog as device does, and takes it off the device that it was attached to by this name before.
func (a *attacher) move(name string, ifindex int, at hook, prog *ebpf.Program) error {
	if err := a.device(name, ifindex, at, prog); err != nil {
		return err
	}
	return removeNamedFilters(name, at, ifindex)
}

// detach takes the program of that name off whichever device it is attached to; none is no error.
func (a *attacher) detach(name string, at hook) error {
	return errors.Join(a.remove(name), removeNamedFilters(name, at, 0))
}

func (a *attacher) tcx(name string, ifindex int, at hook, prog *ebpf.Program) error {
	replaced, err := a.replace(name, prog, func(info *link.Info) bool {
		return info.TCX() != nil && int(info.TCX().Ifindex) == ifindex
	})
	if replaced || err != nil {
		return err
	}
	attach := ebpf.AttachTCXIngress
	if at == egress {
		attach = ebpf.AttachTCXEgress
	}
	// Before other people's programs, whose verdict may be the last.
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: attach, Anchor: link.Head()})
	if err != nil {
		return fmt.Errorf("attaching %s to device %d: %w", name, ifindex, err)
	}
	return a.pin(l, name)
}

// cgroup attaches prog to the cgroup of the path.
func (a *attacher) cgroup(name, path string, attach ebpf.AttachType, prog *ebpf.Program) error {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return fmt.Errorf("cgroup %s: %w", path, err)
	}
	// A cgroup's ID is the inode of its directory.
	replaced, err := a.replace(name, prog, func(info *link.Info) bool {
		return info.Cgroup() != nil && info.Cgroup().CgroupId == st.Ino
	})
	if replaced || err != nil {
		return err
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: path, Attach: attach, Program: prog})
	if err != nil {
		return fmt.Errorf("attaching %s to cgroup %s: %w", name, path, err)
	}
	return a.pin(l, name)
}

// namespace attaches prog to the calling thread's network namespace.
func (a *attacher) namespace(name string, prog *ebpf.Program) error {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("opening the network namespace: %w", err)
	}
	defer ns.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(ns.Fd()), &st); err != nil {
		return fmt.Errorf("looking at the network namespace: %w", err)
	}
	replaced, err := a.replace(name, prog, func(info *link.Info) bool {
		return info.NetNs() != nil && uint64(info.NetNs().NetnsInode) == st.Ino
	})
	if replaced || err != nil {
		return err
	}
	l, err := link.AttachNetNs(int(ns.Fd()), prog)
	if err != nil {
		return fmt.Errorf("attaching %s to the network namespace: %w", name, err)
	}
	return a.pin(l, name)
}

// replace puts prog into the pinned link of that name, if there is one and it is at the right place. One
// that is elsewhere, or whose device is gone, is removed.
func (a *attacher) replace(name string, prog *ebpf.Program, inPlace func(*link.Info) bool) (bool, error) {
	l, err := link.LoadPinnedLink(a.path(name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening the pinned link %s: %w", a.path(name), err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil || !inPlace(info) {
		return false, a.remove(name)
	}
	if have, err := prog.Info(); err == nil {
		if id, ok := have.ID(); ok && id == info.Program {
			return true, nil
		}
	}
	if err := l.Update(prog); err != nil {
		return false, fmt.Errorf("replacing the program of link %s: %w", a.path(name), err)
	}
	return true, nil
}

func (a *attacher) pin(l link.Link, name string) error {
	defer l.Close()
	if err := l.Pin(a.path(name)); err != nil {
		return fmt.Errorf("pinning link %s: %w", a.path(name), err)
	}
	return nil
}

// remove takes the pinned link away, and with it the program off its device.
func (a *attacher) remove(name string) error {
	if err := os.Remove(a.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the pinned link: %w", err)
	}
	return nil
}

// names returns the names of the pinned links that start with prefix.
func (a *attacher) names(prefix string) ([]string, error) {
	entries, err := os.ReadDir(a.dir)
	if err != nil {
		return nil, fmt.Errorf("listing pinned links: %w", err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (a *attacher) path(name string) string { return filepath.Join(a.dir, name) }
