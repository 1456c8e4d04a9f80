package datapath_test

import (
	"errors"
	"io/fs"
	"net/netip"
	"reflect"
	"testing"

	"github.com/vishvananda/netlink"

	"causeway/datapath"
)

// TestPodEnd: the pod's end has the name that was asked for, is seen as it was made, and takes the node's end with it.
func TestPodEnd(t *testing.T) {
	needRoot(t)
	host, pod := newNamespace(t), newNamespace(t)
	cfg := datapath.PodLinkConfig{
		NetNS: pod.path(), HostLink: "cw-pod", Interface: "net1.5", Address: netip.MustParseAddr("10.1.0.10"), Address6: netip.MustParseAddr("fd00:10::a"), MTU: 1450,
	}
	look := func(path, name string) (end datapath.PodEnd, err error) {
		host.do(t, func() { end, err = datapath.LookAtPodEnd(path, name) })
		return end, err
	}
	if _, err := look(pod.path(), "net1.5"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before it was made: %v, want that it does not exist", err)
	}
	var link datapath.PodLink
	host.do(t, func() {
		var err error
		link, err = datapath.CreatePodLink(cfg)
		must(t, err)
	})
	end, err := look(pod.path(), "net1.5")
	want := datapath.PodEnd{
		MAC: link.MAC, MTU: 1450, Up: true, Addresses: []netip.Addr{cfg.Address, cfg.Address6},
		Gateways: []netip.Addr{datapath.PodGateway(cfg.Address), datapath.PodGateway(cfg.Address6)},
	}
	if err != nil || !reflect.DeepEqual(end, want) {
		t.Errorf("it is %+v, %v; want %+v", end, err, want)
	}
	host.do(t, func() {
		again, err := datapath.CreatePodLink(cfg)
		if err != nil || again != link {
			t.Errorf("made again it is %+v, %v; want %+v", again, err, link)
		}
	})

	pod.do(t, func() { must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs("theirs")})) })
	host.do(t, func() {
		if err := datapath.DeletePodEnd(pod.path(), "theirs"); err == nil {
			t.Error("a bridge was deleted as a pod's interface")
		}
		must(t, datapath.DeletePodEnd(pod.path(), "net1.5"))
		must(t, datapath.DeletePodEnd(pod.path(), "net1.5"))
		must(t, datapath.DeletePodEnd("/nowhere", "net1.5"))
		if _, ok, err := datapath.PodLinkExists("cw-pod"); ok || err != nil {
			t.Errorf("the node's end is still there (%v)", err)
		}
	})
	if _, err := look("/nowhere", "net1.5"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a namespace that isn't there: %v", err)
	}
}

func TestInterfaceNames(t *testing.T) {
	for name, good := range map[string]bool{
		"eth0": true, "net1.5": true, "a@b": true, "123456789012345": true,
		"": false, "1234567890123456": false, "lo": false, "all": false, "default": false, ".": false, "..": false, "a/b": false, "a b": false, "a:1": false, "eth%d": false, "é": false,
	} {
		if err := datapath.CheckInterfaceName(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
}
