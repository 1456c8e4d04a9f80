package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// WatchCarrier has the node be heard again as soon as its link to the underlay is back, until ctx ends. While the link
// is down the kernel asks in vain for the addresses of others, and repeats a question only a second later: a link that is down for
// a tenth of a second would silence the node for ten times as long, and others take a node that is silent for that long for dead.
// So the questions without an answer are forgotten when the link comes up, and the next packet asks anew.
//
// It watches the network namespace of the calling thread.
func WatchCarrier(ctx context.Context, node netip.Addr) error {
	link, err := underlayLink(node)
	if err != nil {
		return err
	}
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	failed := make(chan error, 1)
	err = netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{ErrorCallback: func(err error) {
		select {
		case failed <- err:
		default:
		}
	}})
	if err != nil {
		return fmt.Errorf("watching the link %s: %w", link.Attrs().Name, err)
	}
	defer func() {
		close(done)
		for range updates { // until the subscription has ended
		}
	}()
	for {
		select {
		case u, ok := <-updates:
			if !ok {
				return errors.Join(fmt.Errorf("the link %s is watched no more", link.Attrs().Name), first(failed))
			}
			if u.Attrs().Index == link.Attrs().Index && u.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 {
				if err := forgetUnanswered(link.Attrs().Index); err != nil {
					return err
				}
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func first(errs <-chan error) error {
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// forgetUnanswered removes a link's neighbours whose link-layer address nobody has told.
func forgetUnanswered(link int) error {
	neighbours, err := dump(func() ([]netlink.Neigh, error) { return netlink.NeighList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("listing neighbours: %w", err)
	}
	for _, n := range neighbours {
		if n.State&(netlink.NUD_INCOMPLETE|netlink.NUD_FAILED) == 0 {
			continue
		}
		if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("forgetting neighbour %s: %w", n.IP, err)
		}
	}
	return nil
}
