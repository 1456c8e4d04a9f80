package datapath_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"causeway/datapath"
	"causeway/lb"
)

// dualStack is an IPv6 socket that names IPv4 peers as ::ffff:a.b.c.d, as the sockets of Java programs do.
type dualStack struct {
	t  *testing.T
	fd int
}

// dualStack makes a socket in the namespace, which has patience to connect and to receive.
func (n namespace) dualStack(t *testing.T, kind int) dualStack {
	t.Helper()
	s := dualStack{t: t, fd: -1}
	n.do(t, func() {
		var err error
		s.fd, err = unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0)
		must(t, err)
	})
	if s.fd < 0 {
		t.FailNow()
	}
	t.Cleanup(func() { unix.Close(s.fd) })
	must(t, unix.SetsockoptInt(s.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0))
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	must(t, unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout))
	must(t, unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
	return s
}

func (s dualStack) connect(to netip.AddrPort) error { return unix.Connect(s.fd, sockaddr6(to)) }

func (s dualStack) sendTo(to netip.AddrPort) error {
	return unix.Sendto(s.fd, []byte("?"), 0, sockaddr6(to))
}

// receive returns what came and, of a datagram, from where.
func (s dualStack) receive() (string, netip.AddrPort) {
	s.t.Helper()
	buf := make([]byte, 64)
	n, from, err := unix.Recvfrom(s.fd, buf, 0)
	if err != nil {
		s.t.Fatalf("receiving: %v", err)
	}
	return string(buf[:n]), addrPort(from)
}

func (s dualStack) expectPeer(want netip.AddrPort) {
	s.t.Helper()
	sa, err := unix.Getpeername(s.fd)
	if got := addrPort(sa); err != nil || got != want {
		s.t.Errorf("getpeername says %s, %v; want %s", got, err, want)
	}
}

func sockaddr6(a netip.AddrPort) *unix.SockaddrInet6 {
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// addrPort returns the zero AddrPort for anything but IPv4 and IPv6.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// mapped is the address in IPv6's notation: ::ffff:a.b.c.d.
func mapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
}

// TestDualStackSocketsUseServices: an IPv6 socket reaches a service by its mapped address, and
// neither getpeername nor recvmsg shows which backend it is.
func TestDualStackSocketsUseServices(t *testing.T) {
	n, client, local, remote := newShop(t)
	n.openShop(lb.AffinityNone, local, remote)
	service := mapped(shop)
	backends := map[string]bool{local.addr().String(): true, remote.addr().String(): true}

	t.Run("TCP", func(t *testing.T) {
		s := client.ns.dualStack(t, unix.SOCK_STREAM)
		if err := s.connect(service); err != nil {
			t.Fatal(err)
		}
		s.expectPeer(service)
		if who, _ := s.receive(); !backends[who] {
			t.Errorf("answered by %q, want one of %v", who, backends)
		}
	})
	t.Run("connected UDP", func(t *testing.T) {
		s := client.ns.dualStack(t, unix.SOCK_DGRAM)
		if err := s.connect(service); err != nil {
			t.Fatal(err)
		}
		must(t, unix.Send(s.fd, []byte("?"), 0))
		if who, from := s.receive(); !backends[who] || from != service {
			t.Errorf("answered by %q as %s, want one of %v as %s", who, from, backends, service)
		}
		s.expectPeer(service)
	})
	t.Run("unconnected UDP", func(t *testing.T) {
		s := client.ns.dualStack(t, unix.SOCK_DGRAM)
		by := make(map[string]int)
		for range 40 {
			must(t, s.sendTo(service))
			who, from := s.receive()
			if from != service {
				t.Fatalf("the answer is from %s, want %s", from, service)
			}
			by[who]++
		}
		if len(by) != 2 {
			t.Errorf("answered by %v, want both of %v", by, backends)
		}
	})
	t.Run("directly to a backend", func(t *testing.T) {
		at := mapped(netip.AddrPortFrom(remote.addr(), 7080))
		s := client.ns.dualStack(t, unix.SOCK_STREAM)
		if err := s.connect(at); err != nil {
			t.Fatal(err)
		}
		s.expectPeer(at)
	})
}

func TestServiceWithoutBackendRefusesDualStackSockets(t *testing.T) {
	n, client, _, _ := newShop(t)
	n.openShop(lb.AffinityNone)
	uses := map[string]func() error{
		"TCP":             func() error { return client.ns.dualStack(t, unix.SOCK_STREAM).connect(mapped(shop)) },
		"connected UDP":   func() error { return client.ns.dualStack(t, unix.SOCK_DGRAM).connect(mapped(shop)) },
		"unconnected UDP": func() error { return client.ns.dualStack(t, unix.SOCK_DGRAM).sendTo(mapped(shop)) },
	}
	for name, use := range uses {
		if err := use(); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s gives %v, want %v", name, err, unix.ECONNREFUSED)
		}
	}
	if got := n.drops(datapath.DropNoBackend); got != uint64(len(uses)) {
		t.Errorf("%d drops are counted for want of a backend, want %d", got, len(uses))
	}
}

// TestIPv6PeersAreLeftAlone: a socket that talks to an IPv6 address gets there and hears of it, even if
// a service has its last four bytes.
func TestIPv6PeersAreLeftAlone(t *testing.T) {
	n, _, local, _ := newShop(t)
	at := netip.MustParseAddrPort("[::1]:80")
	n.openShop(lb.AffinityNone, local)
	for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
		f := shopFrontend(protocol, lb.AffinityNone)
		f.Address = netip.MustParseAddr("0.0.0.1")
		must(t, n.dp.Frontends().Update(t.Context(), f))
	}
	n.ns.do(t, func() {
		tcp, err := net.ListenTCP("tcp6", net.TCPAddrFromAddrPort(at))
		must(t, err)
		t.Cleanup(func() { tcp.Close() })
		udp, err := net.ListenUDP("udp6", net.UDPAddrFromAddrPort(at))
		must(t, err)
		t.Cleanup(func() { udp.Close() })
		if t.Failed() {
			return
		}
		go func() {
			if _, from, err := udp.ReadFromUDPAddrPort(make([]byte, 64)); err == nil {
				udp.WriteToUDPAddrPort([]byte("!"), from)
			}
		}()
	})
	stream := n.ns.dualStack(t, unix.SOCK_STREAM)
	if err := stream.connect(at); err != nil {
		t.Fatal(err)
	}
	stream.expectPeer(at)

	datagrams := n.ns.dualStack(t, unix.SOCK_DGRAM)
	must(t, datagrams.sendTo(at))
	if _, from := datagrams.receive(); from != at {
		t.Errorf("the answer is from %s, want %s", from, at)
	}
}

// TestBackendOfTheOtherFamilyIsNone: what it would make of a socket's address is nobody's.
func TestBackendOfTheOtherFamilyIsNone(t *testing.T) {
	for name, opts := range map[string]options{"IPv4 service": allIPv6, "IPv6 service": {}} {
		t.Run(name, func(t *testing.T) {
			n, client, local, _ := newShopOf(t, opts)
			at := shop
			if !local.addr().Is6() {
				at = shop6
			}
			for _, protocol := range []lb.Protocol{lb.TCP, lb.UDP} {
				f := shopFrontend(protocol, lb.AffinityNone)
				f.Address = at.Addr()
				must(t, n.dp.Frontends().Update(t.Context(), f))
				must(t, n.dp.Targets().Update(t.Context(), n.shopTarget(local, protocol)))
			}
			for _, network := range []string{"tcp", "udp"} {
				if _, err := client.ns.dial(t, network, at); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("connecting by %s gives %v, want %v", network, err, unix.ECONNREFUSED)
				}
			}
			if got := n.drops(datapath.DropNoBackend); got != 2 {
				t.Errorf("%d drops are counted for want of a backend, want 2", got)
			}
		})
	}
}

// TestUpgradeAttachesWhatIsMissing: the pins may be of a version that attached fewer hooks.
func TestUpgradeAttachesWhatIsMissing(t *testing.T) {
	n, client, local, _ := newShop(t)
	links, err := filepath.Glob(filepath.Join(n.config.PinDir, "links", "*6"))
	if err != nil || len(links) != 4 {
		t.Fatalf("the links of IPv6 sockets are %v, %v; want 4", links, err)
	}
	for _, l := range links {
		must(t, os.Remove(l))
	}
	n.openShop(lb.AffinityNone, local)
	// Twice: what is missing is attached, then what is there is replaced.
	for range 2 {
		n.restart()
		n.openShop(lb.AffinityNone, local)
		s := client.ns.dualStack(t, unix.SOCK_STREAM)
		if err := s.connect(mapped(shop)); err != nil {
			t.Fatal(err)
		}
		s.expectPeer(mapped(shop))
	}
}
