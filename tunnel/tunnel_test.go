package tunnel

import (
	"fmt"
	"iter"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/identity"
)

func TestMain(m *testing.M) {
	endIfAsked()
	serveIfAsked()
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT: every test of tunnel devices and routes, because they need root.")
		if os.Getenv("CI") == "true" {
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

var self = netip.MustParseAddr("172.29.1.10")

// inNode runs f in a network namespace of its own, with eth0 at self and an MTU of 1500.
func inNode(t *testing.T, f func()) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // Never unlocked: the thread ends, and the namespace with it.
		must(t, unix.Unshare(unix.CLONE_NEWNET))
		link := &netlink.Veth{LinkAttrs: attrs("eth0"), PeerName: "peer"}
		must(t, netlink.LinkAdd(link))
		addr, err := netlink.ParseAddr(self.String() + "/16")
		must(t, err)
		must(t, netlink.AddrAdd(link, addr))
		must(t, netlink.LinkSetUp(link))
		f()
	}()
	<-done
}

func TestEnsureVXLAN(t *testing.T) {
	inNode(t, func() {
		first, err := EnsureVXLAN(Config{Address: self})
		must(t, err)
		if first.MTU != 1450 {
			t.Errorf("the MTU is %d, want 1450", first.MTU)
		}
		link, err := netlink.LinkByName(DefaultName)
		must(t, err)
		if vxlan := link.(*netlink.Vxlan); !vxlan.FlowBased || vxlan.Learning || vxlan.Port != DefaultPort || vxlan.Flags&unix.IFF_UP == 0 {
			t.Errorf("the device is %+v", vxlan)
		}

		again, err := EnsureVXLAN(Config{Address: self})
		if err != nil || again != first {
			t.Errorf("again it is %+v, %v; want %+v", again, err, first)
		}
		smaller, err := EnsureVXLAN(Config{Address: self, MTU: 1400})
		if err != nil || smaller.Index != first.Index || smaller.MTU != 1400 {
			t.Errorf("with another MTU it is %+v, %v; want the same device", smaller, err)
		}
		moved, err := EnsureVXLAN(Config{Address: self, Port: 8472})
		if err != nil || moved.Index == first.Index {
			t.Errorf("with another port it is %+v, %v; want another device", moved, err)
		}
	})
}

func TestEnsureVXLANLeavesOthersAlone(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func() error
		want    string
	}{
		"a device of the name": {func() error { return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs(DefaultName)}) }, "not Causeway's"},
		"a VXLAN device at the port": {func() error {
			other := &netlink.Vxlan{LinkAttrs: attrs("other"), FlowBased: true, Port: DefaultPort}
			if err := netlink.LinkAdd(other); err != nil {
				return err
			}
			return netlink.LinkSetUp(other)
		}, "port 4789"},
		"a socket at the port": {func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			t.Cleanup(func() { unix.Close(fd) })
			return unix.Bind(fd, &unix.SockaddrInet4{Port: DefaultPort})
		}, "port 4789"},
	} {
		t.Run(name, func(t *testing.T) {
			inNode(t, func() {
				must(t, c.prepare())
				if _, err := EnsureVXLAN(Config{Address: self}); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error is %v, want one about %q", err, c.want)
				}
				if link, err := netlink.LinkByName(DefaultName); err == nil && link.Type() == "vxlan" {
					t.Error("the device was left behind")
				}
			})
		})
	}
}

func TestFindUnderlay(t *testing.T) {
	inNode(t, func() {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		if index, mtu, err := FindUnderlay(self); err != nil || mtu != 1500 || index != link.Attrs().Index {
			t.Errorf("got link %d, MTU %d, %v", index, mtu, err)
		}
		if _, _, err := FindUnderlay(netip.MustParseAddr("192.0.2.1")); err == nil || !strings.Contains(err.Error(), "192.0.2.1") {
			t.Errorf("an address that no link has: %v", err)
		}
	})
}

func testNode(cluster, n int, cidrs ...string) identity.Tunnel {
	node := identity.Tunnel{
		Cluster: fmt.Sprint("cluster", cluster), ClusterID: identity.ClusterID(cluster), Node: fmt.Sprint("node", n),
		Address: netip.AddrFrom4([4]byte{172, 29, byte(cluster), byte(10 + n)}),
	}
	for _, c := range cidrs {
		node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(c))
	}
	return node
}

func TestRoutes(t *testing.T) {
	inNode(t, func() {
		ctx := t.Context()
		device, err := EnsureVXLAN(Config{Address: self})
		must(t, err)
		link, err := netlink.LinkByIndex(device.Index)
		must(t, err)
		foreign := netlink.Route{LinkIndex: device.Index, Dst: mustCIDR("10.9.0.0/16"), Scope: netlink.SCOPE_LINK}
		must(t, netlink.RouteAdd(&foreign))
		expect := func(when string, want ...string) {
			t.Helper()
			list, err := netlink.RouteList(link, netlink.FAMILY_V4)
			must(t, err)
			var got []string
			for _, r := range list {
				if r.Protocol != routeProtocol {
					continue
				}
				if r.MTU != 1450 || !r.Src.Equal(self.AsSlice()) {
					t.Errorf("%s: route %s has MTU %d and source %s", when, r.Dst, r.MTU, r.Src)
				}
				got = append(got, r.Dst.String())
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%s: routes are %v, want %v", when, got, want)
			}
		}
		open := func() *Routes {
			routes, err := NewRoutes(device, self)
			must(t, err)
			return routes
		}
		sister, west := testNode(1, 1, "10.1.1.0/24"), testNode(2, 0, "10.2.0.0/24", "10.2.8.0/24")

		routes := open()
		for range 2 {
			must(t, routes.Update(ctx, testNode(1, 0, "10.1.0.0/24"))) // This node.
			must(t, routes.Update(ctx, sister))
			must(t, routes.Update(ctx, west))
		}
		expect("told of all", "10.1.1.0/24", "10.2.0.0/24", "10.2.8.0/24")
		west.PodCIDRs = west.PodCIDRs[:1]
		must(t, routes.Update(ctx, west))
		expect("a CIDR less", "10.1.1.0/24", "10.2.0.0/24")
		must(t, routes.Close())

		routes = open() // As an agent that starts.
		defer routes.Close()
		none := func(func(identity.Tunnel) bool) {}
		prune := func(desired iter.Seq[identity.Tunnel], synced ...identity.ClusterID) {
			must(t, routes.Prune(ctx, desired, func(id identity.ClusterID) bool { return slices.Contains(synced, id) }))
		}
		prune(none)
		expect("nobody has synced", "10.1.1.0/24", "10.2.0.0/24")
		prune(none, 1)
		expect("cluster 1 has", "10.2.0.0/24")
		prune(slices.Values([]identity.Tunnel{west}), 1, 2)
		expect("all have, one is wanted", "10.2.0.0/24")
		must(t, routes.Delete(ctx, west))
		must(t, routes.Delete(ctx, west))
		expect("deleted")
		if list, err := netlink.RouteList(link, netlink.FAMILY_V4); err != nil || len(list) != 1 {
			t.Errorf("somebody else's route did not stay alone: %v, %v", list, err)
		}
	})
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// must reports an error without ending the goroutine, which is not the test's.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func mustCIDR(s string) *net.IPNet {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	return n
}
