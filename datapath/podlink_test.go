package datapath_test

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"causeway/datapath"
)

func TestCreatePodLink(t *testing.T) {
	needRoot(t)
	host, pod := newNamespace(t), newNamespace(t)
	cfg := datapath.PodLinkConfig{NetNS: pod.path(), HostLink: "cw-pod", Address: netip.MustParseAddr("10.1.0.10"), MTU: 1450}
	create := func() (link datapath.PodLink, err error) {
		host.do(t, func() { link, err = datapath.CreatePodLink(cfg) })
		return link, err
	}

	first, err := create()
	if err != nil {
		t.Fatal(err)
	}
	pod.do(t, func() {
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		if got := eth0.Attrs(); got.MTU != 1450 || got.HardwareAddr.String() != first.MAC {
			t.Errorf("the pod's end has MTU %d and MAC %s, want 1450 and %s", got.MTU, got.HardwareAddr, first.MAC)
		}
		addrs, err := netlink.AddrList(eth0, netlink.FAMILY_V4)
		must(t, err)
		if len(addrs) != 1 || addrs[0].IPNet.String() != "10.1.0.10/32" {
			t.Errorf("the pod has addresses %v", addrs)
		}
	})

	t.Run("again keeps it", func(t *testing.T) {
		if again, err := create(); err != nil || again != first {
			t.Errorf("got %+v, %v; want %+v", again, err, first)
		}
	})
	t.Run("exists", func(t *testing.T) {
		host.do(t, func() {
			link, ok, err := datapath.PodLinkExists("cw-pod")
			if err != nil || !ok || link.IfIndex != first.IfIndex || link.HostMAC != first.HostMAC {
				t.Errorf("got %+v, %v, %v", link, ok, err)
			}
			if _, ok, err := datapath.PodLinkExists("nothing"); ok || err != nil {
				t.Errorf("a link that isn't there: %v, %v", ok, err)
			}
		})
	})
	t.Run("repair brings back link and route", func(t *testing.T) {
		host.do(t, func() {
			link, err := netlink.LinkByName("cw-pod")
			must(t, err)
			must(t, netlink.LinkSetDown(link)) // takes the route along
			must(t, datapath.RepairPodLink(cfg, first.MAC))
			routes, err := netlink.RouteGet(cfg.Address.AsSlice())
			must(t, err)
			if len(routes) != 1 || routes[0].LinkIndex != first.IfIndex {
				t.Errorf("the node reaches the pod by %v, want link %d", routes, first.IfIndex)
			}
			if err := datapath.RepairPodLink(datapath.PodLinkConfig{HostLink: "nothing", Address: cfg.Address, MTU: 1450}, first.MAC); err == nil {
				t.Error("a link that isn't there was repaired")
			}
		})
	})
	t.Run("another address replaces it", func(t *testing.T) {
		cfg.Address = netip.MustParseAddr("10.1.0.11")
		second, err := create()
		if err != nil || second.IfIndex == first.IfIndex {
			t.Errorf("got %+v, %v; want another than %+v", second, err, first)
		}
	})
	t.Run("somebody else's is left alone", func(t *testing.T) {
		host.do(t, func() { must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("theirs")})) })
		theirs := cfg
		theirs.HostLink = "theirs"
		host.do(t, func() {
			if _, err := datapath.CreatePodLink(theirs); err == nil {
				t.Error("a bridge was taken for a pod's link")
			}
			if err := datapath.DeletePodLink("theirs"); err == nil {
				t.Error("a bridge was deleted as a pod's link")
			}
		})
	})
	t.Run("delete, twice", func(t *testing.T) {
		host.do(t, func() {
			must(t, datapath.DeletePodLink("cw-pod"))
			must(t, datapath.DeletePodLink("cw-pod"))
		})
	})
	t.Run("the node's own namespace", func(t *testing.T) {
		own := cfg
		own.NetNS = host.path()
		host.do(t, func() {
			if _, err := datapath.CreatePodLink(own); err == nil {
				t.Error("the node was connected as a pod")
			}
		})
	})
	t.Run("no such namespace", func(t *testing.T) {
		cfg.NetNS = "/nowhere"
		if _, err := create(); err == nil {
			t.Error("it was connected")
		}
	})
}

// TestCreateDualStackPodLink: both addresses are usable at once, and go with the link; the node's end has none of its own.
func TestCreateDualStackPodLink(t *testing.T) {
	needRoot(t)
	host, pod := newNamespace(t), newNamespace(t)
	pod.do(t, func() { sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1") })
	cfg := datapath.PodLinkConfig{
		NetNS: pod.path(), HostLink: "cw-pod", Address: netip.MustParseAddr("10.1.0.10"), Address6: netip.MustParseAddr("fd00:10::a"), MTU: 1450,
	}
	create := func(cfg datapath.PodLinkConfig) (link datapath.PodLink, err error) {
		host.do(t, func() { link, err = datapath.CreatePodLink(cfg) })
		return link, err
	}
	first, err := create(cfg)
	if err != nil {
		t.Fatal(err)
	}
	pod.do(t, func() {
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		for family, want := range map[int]string{netlink.FAMILY_V4: "10.1.0.10/32", netlink.FAMILY_V6: "fd00:10::a/128"} {
			addrs, err := netlink.AddrList(eth0, family)
			must(t, err)
			addrs = slices.DeleteFunc(addrs, func(a netlink.Addr) bool { return a.IP.IsLinkLocalUnicast() })
			if len(addrs) != 1 || addrs[0].IPNet.String() != want || addrs[0].Flags&unix.IFA_F_TENTATIVE != 0 {
				t.Errorf("the pod has addresses %v, want %s", addrs, want)
			}
			routes, err := netlink.RouteGet(net.ParseIP(map[int]string{netlink.FAMILY_V4: "192.0.2.1", netlink.FAMILY_V6: "2001:db8::1"}[family]))
			if err != nil || len(routes) != 1 || routes[0].Src.String() != addrs[0].IP.String() {
				t.Errorf("the pod reaches the world by %v, %v; want it from %s", routes, err, addrs[0].IP)
			}
		}
	})
	host.do(t, func() {
		link, err := netlink.LinkByName("cw-pod")
		must(t, err)
		if addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL); err != nil || len(addrs) != 0 {
			t.Errorf("the node's end has addresses %v, %v", addrs, err)
		}
		must(t, netlink.LinkSetDown(link)) // takes the routes along
		must(t, datapath.RepairPodLink(cfg, first.MAC))
		for _, a := range []netip.Addr{cfg.Address, cfg.Address6} {
			routes, err := netlink.RouteGet(a.AsSlice())
			if err != nil || len(routes) != 1 || routes[0].LinkIndex != first.IfIndex {
				t.Errorf("the node reaches %s by %v, %v; want link %d", a, routes, err, first.IfIndex)
			}
		}
	})
	if again, err := create(cfg); err != nil || again != first {
		t.Errorf("again it is %+v, %v; want %+v", again, err, first)
	}
	other := cfg
	other.Address6 = netip.MustParseAddr("fd00:10::b")
	if second, err := create(other); err != nil || second.IfIndex == first.IfIndex {
		t.Errorf("with another address it is %+v, %v; want another than %+v", second, err, first)
	}
	for what, change := range map[string]func(*datapath.PodLinkConfig){
		"without an address":     func(c *datapath.PodLinkConfig) { c.Address = netip.Addr{} },
		"with two of IPv4":       func(c *datapath.PodLinkConfig) { c.Address6 = netip.MustParseAddr("10.1.0.11") },
		"with two of IPv6":       func(c *datapath.PodLinkConfig) { c.Address = netip.MustParseAddr("fd00:10::c") },
		"with an MTU of 1279":    func(c *datapath.PodLinkConfig) { c.MTU = 1279 },
		"with IPv4 in IPv6":      func(c *datapath.PodLinkConfig) { c.Address = netip.MustParseAddr("::ffff:10.1.0.10") },
		"with a name of 16 byte": func(c *datapath.PodLinkConfig) { c.HostLink = "0123456789abcdef" },
	} {
		bad := other
		change(&bad)
		if _, err := create(bad); err == nil {
			t.Errorf("it was connected %s", what)
		}
	}
}

func TestCheck(t *testing.T) {
	needRoot(t)
	if err := datapath.Check(); err != nil {
		t.Error(err)
	}
}
