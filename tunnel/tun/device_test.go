package tun

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/tun"
)

// open makes a device in the namespace.
func open(t testing.TB, n namespace, name string, mtu int) *Device {
	t.Helper()
	var d *Device
	n.do(t, func() {
		var err error
		d, err = Open(name, mtu, vxlanPort)
		must(t, err)
	})
	t.Cleanup(func() { must(t, d.Close()) })
	return d
}

const vxlanPort = 4789

func TestEvents(t *testing.T) {
	n := newNamespace(t)
	d := open(t, n, "wg0", 1440)
	expect := func(want tun.Event) {
		t.Helper()
		select {
		case got := <-d.Events():
			if got != want {
				t.Errorf("the event is %d, want %d", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no event %d came", want)
		}
	}
	set := func(f func(link netlink.Link) error) {
		t.Helper()
		n.do(t, func() {
			link, err := netlink.LinkByName("wg0")
			must(t, err)
			must(t, f(link))
		})
	}
	if mtu, err := d.MTU(); mtu != 1440 || err != nil {
		t.Errorf("the MTU is %d, %v; want 1440", mtu, err)
	}
	set(netlink.LinkSetUp)
	expect(tun.EventUp)
	set(func(link netlink.Link) error { return netlink.LinkSetMTU(link, 1360) })
	expect(tun.EventMTUUpdate)
	if mtu, err := d.MTU(); mtu != 1360 || err != nil {
		t.Errorf("the MTU is %d, %v; want 1360", mtu, err)
	}
	set(netlink.LinkSetDown)
	expect(tun.EventDown)
	must(t, d.Close())
	if e, more := <-d.Events(); more {
		t.Errorf("after Close came event %d", e)
	}
}

func TestCloseEndsRead(t *testing.T) {
	d := open(t, newNamespace(t), "wg0", 1440)
	failed := make(chan error)
	go func() {
		_, err := d.Read([][]byte{make([]byte, 2000)}, make([]int, 1), 0)
		failed <- err
	}()
	must(t, d.Close())
	expectClosed(t, failed)
	if _, err := d.Write([][]byte{make([]byte, 20)}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("writing after Close: %v, want os.ErrClosed", err)
	}
}

func TestReadEndsWithTheInterface(t *testing.T) {
	n := newNamespace(t)
	d := open(t, n, "wg0", 1440)
	n.do(t, func() { up(t, "wg0") })
	failed := make(chan error)
	go func() {
		for err := error(nil); ; {
			if _, err = d.Read([][]byte{make([]byte, 2000)}, make([]int, 1), 0); err != nil {
				failed <- err
				return
			}
		}
	}()
	n.do(t, func() { must(t, netlink.LinkDel(&netlink.Tuntap{LinkAttrs: attrs("wg0")})) })
	expectClosed(t, failed)
}

func expectClosed(t *testing.T, failed <-chan error) {
	t.Helper()
	select {
	case err := <-failed:
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("the error is %v, want os.ErrClosed", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Read did not end")
	}
}

func TestOpenRefuses(t *testing.T) {
	n := newNamespace(t)
	open(t, n, "wg0", 1440)
	for _, c := range []struct {
		about, name string
		mtu         int
		want        string
	}{
		{"a name that is taken", "wg0", 1440, "an interface of that name exists"},
		{"a name that is taken by another kind", "lo", 1440, "an interface of that name exists"},
		{"a long name", "wg0123456789abcdef", 1440, "no name for a TUN device"},
		{"no name", "", 1440, "no name for a TUN device"},
		{"a name for the kernel to complete", "wg%d", 1440, "no name for a TUN device"},
		{"a name with a slash", "a/b", 1440, "the name is not one"},
		{"a tiny MTU", "wg1", 1, "MTU of TUN device wg1"},
		{"a huge MTU", "wg1", 1 << 20, "MTU of TUN device wg1"},
	} {
		n.do(t, func() {
			d, err := Open(c.name, c.mtu, vxlanPort)
			if err == nil {
				must(t, d.Close())
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: the error is %v, want one about %q", c.about, err, c.want)
			}
			if _, err := netlink.LinkByName("wg1"); err == nil {
				t.Errorf("%s: the device was left behind", c.about)
			}
		})
	}
}
