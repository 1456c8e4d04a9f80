package l7

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/state"
)

// dial connects to a backend in the name of a pod: from the node's address for that, marked with the pod's identity.
func (p *proxy) dial(ctx context.Context, e *balance.Endpoint, pod state.Client) (net.Conn, error) {
	self := p.table.Self()
	dialer := net.Dialer{Timeout: p.cfg.Limits.ConnectTimeout}
	source, found := sourceFor(self.Sources, e.Address().Addr())
	if found {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	if found || self.Mark != 0 {
		dialer.Control = func(_, _ string, raw syscall.RawConn) error {
			var err error
			controlErr := raw.Control(func(fd uintptr) { err = prepare(int(fd), source, self.Mark, pod.Identity) })
			if controlErr != nil {
				return controlErr
			}
			return err
		}
	}
	return dialer.DialContext(ctx, "tcp", e.Address().String())
}

// sourceFor returns the source of the same family as a backend's address.
func sourceFor(sources []netip.Addr, backend netip.Addr) (netip.Addr, bool) {
	for _, s := range sources {
		if s.Is4() == backend.Is4() {
			return s, true
		}
	}
	return netip.Addr{}, false
}

// prepare sets a socket's options before it is bound and connected.
func prepare(fd int, source netip.Addr, mark, identity uint32) error {
	if source.IsValid() {
		// The source's port is chosen when it is known where to, so that each backend has all ports.
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return optionError("IP_BIND_ADDRESS_NO_PORT", err)
		}
		// The address is the node's by a route alone.
		level, option, name := unix.SOL_IP, unix.IP_FREEBIND, "IP_FREEBIND"
		if !source.Is4() {
			level, option, name = unix.SOL_IPV6, unix.IPV6_FREEBIND, "IPV6_FREEBIND"
		}
		if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
			return optionError(name, err)
		}
	}
	if mark == 0 {
		return nil
	}
	// SO_MARK takes an unsigned number; its bits are what counts.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(int32(mark|identity))); err != nil {
		return optionError("SO_MARK (it needs CAP_NET_ADMIN)", err)
	}
	return nil
}

func optionError(name string, err error) error {
	return fmt.Errorf("a socket to a backend can't have %s: %w", name, err)
}
