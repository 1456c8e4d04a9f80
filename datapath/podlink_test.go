package datapath_test

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

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
	t.Run("no such namespace", func(t *testing.T) {
		cfg.NetNS = "/nowhere"
		if _, err := create(); err == nil {
			t.Error("it was connected")
		}
	})
}

func TestCheck(t *testing.T) {
	needRoot(t)
	if err := datapath.Check(); err != nil {
		t.Error(err)
	}
}
