package tunnel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// setSysctls sets what forwarding through the device needs, before it is up. /proc/sys/net shows the calling
// thread's network namespace.
func setSysctls(device string, forward6 bool) error {
	for _, s := range []struct{ path, value string }{
		// Pods reach the world outside of the mesh through the node's stack.
		{"ipv4/ip_forward", "1"},
		// Loose (RFC 3704, 2.4): what a remote node's own processes send comes through the tunnel, though the route to
		// the node's address is the underlay's. Strict filtering would drop it.
		// The larger of this and conf/all counts, and loose is the larger.
		{"ipv4/conf/" + device + "/rp_filter", "2"},
		// The kernel's own neighbour discovery has no business in the tunnel, and would be counted as drops: without an address
		// of its own the device asks for no router and tells of no group.
		{"ipv6/conf/" + device + "/addr_gen_mode", "1"},
		{"ipv6/conf/" + device + "/autoconf", "0"},
		{"ipv6/conf/" + device + "/accept_ra", "0"},
		{"ipv6/conf/" + device + "/disable_ipv6", "0"},
	} {
		if err := setSysctl(s.path, s.value); err != nil {
			return err
		}
	}
	if !forward6 {
		return nil
	}
	return forwardIPv6()
}

// forwardIPv6 makes the node a router of IPv6. Links that listen to router advertisements would stop to, and lose their way out, unless
// they are told to listen all the same (accept_ra, 2).
func forwardIPv6() error {
	const conf = "ipv6/conf/"
	links, err := os.ReadDir("/proc/sys/net/" + conf)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // The kernel has no IPv6.
	}
	if err != nil {
		return fmt.Errorf("listing the sysctls of IPv6: %w", err)
	}
	for _, l := range links {
		path := conf + l.Name() + "/accept_ra"
		if old, err := os.ReadFile("/proc/sys/net/" + path); err == nil && strings.TrimSpace(string(old)) == "1" && l.Name() != "all" {
			if err := setSysctl(path, "2"); err != nil {
				return err
			}
		}
	}
	return setSysctl(conf+"all/forwarding", "1")
}

func setSysctl(path, value string) error {
	file := "/proc/sys/net/" + path
	old, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(path, "ipv6/") {
		return nil // The kernel has no IPv6.
	}
	if err == nil && strings.TrimSpace(string(old)) == value {
		return nil // Also where /proc/sys is read-only.
	}
	if err == nil {
		err = os.WriteFile(file, []byte(value), 0o644)
	}
	if err != nil {
		return fmt.Errorf("setting sysctl net/%s to %s: %w", path, value, err)
	}
	return nil
}
