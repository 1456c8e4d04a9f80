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

// check tells what this machine lacks for a test-bed, and what to do about it. What the data path needs it
// tells itself, once there is a cgroup file system.
func check() error {
	if os.Geteuid() != 0 {
		return errors.New("the test-bed makes network namespaces and loads BPF programs, which takes root: run it with sudo")
	}
	if err := checkFileSystems(); err != nil {
		return err
	}
	return checkBridge()
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

// checkBridge makes a bridge in a namespace that is gone at the end; other kinds of link are the data path's to check.
func checkBridge() error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a network namespace: %w; the kernel needs CONFIG_NET_NS, and a container needs CAP_SYS_ADMIN", err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("opening netlink: %w", err)
		}
		defer h.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridgeName
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("making a bridge: %w", missingKind(err, "bridge", "CONFIG_BRIDGE"))
		}
		return nil
	})
}
