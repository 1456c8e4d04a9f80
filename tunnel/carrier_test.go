package tunnel

import (
	"context"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// TestWatchCarrier: what was asked for in vain while the link was down is forgotten when it is up, so that it is asked for at once.
func TestWatchCarrier(t *testing.T) {
	inNode(t, func() {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		peer, err := netlink.LinkByName("peer")
		must(t, err)
		stuck := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: net.IPv4(172, 29, 1, 99), State: netlink.NUD_FAILED, Family: netlink.FAMILY_V4}
		must(t, netlink.NeighSet(stuck))
		known := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: net.IPv4(172, 29, 1, 98), State: netlink.NUD_PERMANENT, Family: netlink.FAMILY_V4,
			HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}
		must(t, netlink.NeighSet(known))

		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		here, err := netns.Get()
		must(t, err)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
			if err := netns.Set(here); err != nil {
				done <- err
				return
			}
			done <- WatchCarrier(ctx, self)
		}()
		// The subscription may be a moment away: the carrier comes again until it has been seen.
		deadline := time.Now().Add(10 * time.Second)
		for has(t, link, "172.29.1.99") {
			if time.Now().After(deadline) {
				t.Fatal("the question without an answer is still there")
			}
			must(t, netlink.LinkSetUp(peer))
			time.Sleep(10 * time.Millisecond)
			must(t, netlink.LinkSetDown(peer))
		}
		if !has(t, link, "172.29.1.98") {
			t.Error("a neighbour that is known was forgotten")
		}
		cancel()
		must(t, <-done)
	})
}

func has(t *testing.T, link netlink.Link, ip string) bool {
	t.Helper()
	list, err := dump(func() ([]netlink.Neigh, error) { return netlink.NeighList(link.Attrs().Index, netlink.FAMILY_V4) })
	must(t, err)
	for _, n := range list {
		if n.IP.Equal(net.ParseIP(ip)) {
			return true
		}
	}
	return false
}
