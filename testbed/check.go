package testbed

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Check tells what this machine lacks for a test-bed, and what to do about it; nil if nothing.
func Check() error {
	if os.Geteuid() != 0 {
		return errors.New("the test-bed makes network namespaces and loads BPF programs, which takes root: run it with sudo")
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		return errors.New("this kernel gives no BTF (/sys/kernel/btf/vmlinux is missing): use a kernel with CONFIG_DEBUG_INFO_BTF, as the ones of Debian, Ubuntu and Fedora are")
	}
	if err := checkFileSystems(); err != nil {
		return err
	}
	return checkLinks()
}

func checkFileSystems() error {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	known := strings.Fields(string(b))
	for _, fs := range []struct{ name, option string }{{"bpf", "CONFIG_BPF_SYSCALL"}, {"cgroup2", "CONFIG_CGROUPS and CONFIG_CGROUP_BPF"}} {
		if !slices.Contains(known, fs.name) {
			return fmt.Errorf("this kernel has no %s file system: use a kernel with %s", fs.name, fs.option)
		}
	}
	return nil
}

// checkLinks makes every kind of link that is needed, in a namespace that is gone at the end.
func checkLinks() error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a network namespace: %w; the kernel needs CONFIG_NET_NS, and a container needs CAP_SYS_ADMIN", err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("opening netlink: %w", err)
		}
		defer h.Close()
		attrs := func(name string) netlink.LinkAttrs {
			a := netlink.NewLinkAttrs()
			a.Name = name
			return a
		}
		for _, k := range []struct {
			link   netlink.Link
			option string
		}{
			{&netlink.Bridge{LinkAttrs: attrs("br0")}, "CONFIG_BRIDGE"},
			{&netlink.Veth{LinkAttrs: attrs("veth0"), PeerName: "veth1"}, "CONFIG_VETH"},
			{&netlink.Vxlan{LinkAttrs: attrs("vxlan0"), FlowBased: true, Port: 4789}, "CONFIG_VXLAN"},
		} {
			if err := h.LinkAdd(k.link); err != nil {
				return fmt.Errorf("making a link of kind %s: %w", k.link.Type(), missingKind(err, k.link.Type(), k.option))
			}
		}
		return nil
	})
}
