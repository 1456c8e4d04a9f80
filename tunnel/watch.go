package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"causeway/identity"
)

// loss is something that the kernel told of and that may be missing in a slot now. What is, is found by looking.
type loss struct {
	link int // index of the link that changed, or that lost an address; 0: none
	slot int // whose table lost a route; -1: any slot's
}

// lossOf reads a message of rtnetlink(7); ok is false if it is about nothing of ours.
func lossOf(m syscall.NetlinkMessage) (l loss, ok bool) {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK, unix.RTM_DELADDR: // In both of their headers the index comes after four bytes.
		if len(m.Data) < 8 {
			return loss{}, false
		}
		return loss{link: int(binary.NativeEndian.Uint32(m.Data[4:])), slot: -1}, true
	case unix.RTM_DELRULE:
		return loss{slot: -1}, true
	case unix.RTM_DELROUTE:
		slot := int(tableOf(m.Data)) - slotTable
		return loss{slot: slot}, slot >= 0 && slot < identity.TunnelSlots
	}
	return loss{}, false
}

// tableOf returns the table of a route's message.
func tableOf(data []byte) uint32 {
	if len(data) < unix.SizeofRtMsg {
		return 0
	}
	attrs, err := nl.ParseRouteAttr(data[unix.SizeofRtMsg:])
	if err != nil {
		return 0
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.RTA_TABLE && len(a.Value) >= 4 {
			return binary.NativeEndian.Uint32(a.Value)
		}
	}
	return uint32(data[4])
}

// watcher tells what is removed in the kernel, until it is stopped.
type watcher struct {
	losses chan loss
	socket *nl.NetlinkSocket
	cancel context.CancelFunc
	ended  chan struct{}
}

func (w *WireGuard) watch() (*watcher, error) {
	v := &watcher{losses: make(chan loss), ended: make(chan struct{})}
	err := w.space.run(func() error {
		var err error
		v.socket, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("watching links, addresses, routes and rules: %w", err)
	}
	var ctx context.Context
	ctx, v.cancel = context.WithCancel(context.Background())
	go v.run(ctx)
	return v, nil
}

// run reads until the socket is closed or fails.
func (v *watcher) run(ctx context.Context) {
	defer close(v.ended)
	for {
		messages, _, err := v.socket.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			// There was more than fits. Everything is looked at.
			if !v.tell(ctx, loss{slot: -1}) {
				return
			}
			continue
		}
		if err != nil {
			return
		}
		for _, m := range messages {
			if l, ok := lossOf(m); ok && !v.tell(ctx, l) {
				return
			}
		}
	}
}

func (v *watcher) tell(ctx context.Context, l loss) bool {
	select {
	case v.losses <- l:
		return true
	case <-ctx.Done():
		return false
	}
}

func (v *watcher) stop() {
	v.cancel()
	v.socket.Close()
	<-v.ended
}
