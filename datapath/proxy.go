package datapath

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Proxy is how connections to services that are balanced at L7 get to this node's proxy. It is safe for concurrent use.
type Proxy struct{ d *Datapath }

// Proxy returns the way to this node's L7 proxy.
func (d *Datapath) Proxy() *Proxy { return &Proxy{d} }

// Set hands connections to L7 frontends to these listeners from now on, at most one of each family. They may be bound to any address, and must not be of Multipath TCP, as Go's are that net.Listen opens. As soon as a listener is closed
// by all who have it, its connections are balanced at L4. Connections of a family without a listener are balanced at L4 too.
func (p *Proxy) Set(listeners []*net.TCPListener) error {
	var files [bpfL7FamilyL7FAMILIES]*net.TCPListener
	for _, l := range listeners {
		family, err := listenerFamily(l)
		if err != nil {
			return err
		}
		if files[family] != nil {
			return fmt.Errorf("listeners %s and %s of the L7 proxy are of the same address family", files[family].Addr(), l.Addr())
		}
		files[family] = l
	}
	var errs []error
	for family, l := range files {
		if l == nil {
			errs = append(errs, p.remove(bpfL7Family(family)))
		} else {
			errs = append(errs, p.put(bpfL7Family(family), l))
		}
	}
	return errors.Join(errs...)
}

// Clear has all connections balanced at L4.
func (p *Proxy) Clear() error { return p.Set(nil) }

// Fallbacks counts the connections to L7 frontends that were balanced at L4 because there was no proxy. It counts since the maps were made.
func (p *Proxy) Fallbacks() (sum uint64, err error) {
	var perCPU []uint64
	if err := p.d.Maps.l7Fallbacks.Lookup(uint32(0), &perCPU); err != nil {
		return 0, fmt.Errorf("reading the counter of connections without an L7 proxy: %w", err)
	}
	for _, n := range perCPU {
		sum += n
	}
	return sum, nil
}

func (p *Proxy) put(family bpfL7Family, l *net.TCPListener) error {
	err := control(l, func(fd int) error { return p.d.Maps.l7Listeners.Put(uint32(family), uint64(fd)) })
	if err != nil {
		return fmt.Errorf("handing connections to the L7 proxy's listener %s: %w", l.Addr(), err)
	}
	return nil
}

func (p *Proxy) remove(family bpfL7Family) error {
	err := p.d.Maps.l7Listeners.Delete(uint32(family))
	// The kernel has no better word for an empty place in such a map.
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("taking the L7 proxy's listener away: %w", err)
	}
	return nil
}

func listenerFamily(l *net.TCPListener) (family bpfL7Family, err error) {
	err = control(l, func(fd int) error {
		if protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err == nil && protocol == unix.IPPROTO_MPTCP {
			return errors.New("it is of Multipath TCP, which can't be handed connections: open it with net.ListenConfig.SetMultipathTCP(false)")
		}
		domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		if domain == unix.AF_INET6 {
			family = bpfL7FamilyL7IPV6
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("looking at the L7 proxy's listener %s: %w", l.Addr(), err)
	}
	return family, nil
}

// control calls f with the listener's file.
func control(l *net.TCPListener, f func(fd int) error) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}
