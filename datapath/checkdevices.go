package datapath

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// checkDevices makes the kinds of device that Causeway uses in a network namespace of their
// own, which goes with its thread.
func checkDevices() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // Never unlocked: the runtime ends the thread, and the kernel the namespace.
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("making a network namespace: use a kernel with CONFIG_NET_NS=y, outside of a container without CAP_SYS_ADMIN: %w", err)
			return
		}
		var errs []error
		for _, link := range []netlink.Link{
			&netlink.Vxlan{LinkAttrs: checkAttrs("chk-vxlan"), FlowBased: true, Port: 4789},
			&netlink.Veth{LinkAttrs: checkAttrs("chk-veth"), PeerName: "chk-peer"},
		} {
			if err := netlink.LinkAdd(link); err != nil {
				errs = append(errs, fmt.Errorf("the kernel can't make %s devices: load the module %s: %w", link.Type(), link.Type(), err))
			}
		}
		done <- errors.Join(errs...)
	}()
	return <-done
}

func checkAttrs(name string) netlink.LinkAttrs {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return attrs
}
