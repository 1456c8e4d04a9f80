package tunnel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// setSysctls sets what forwarding through the device needs. /proc/sys/net shows the calling
// thread's network namespace.
func setSysctls(device string) error {
	for _, s := range []struct{ path, value string }{
		// Pods reach the world outside of the mesh through the node's stack.
		{"ipv4/ip_forward", "1"},
		// Loose (RFC 3704, 2.4): what a remote node's own processes send comes through the tunnel, though the route to
		// the node's address is the underlay's. Strict filtering would drop it.
		// The larger of this and conf/all counts, and loose is the larger.
		{"ipv4/conf/" + device + "/rp_filter", "2"},
		// Nothing speaks IPv6 in the tunnel yet; without this the kernel's own
		// neighbour discovery would, and be counted as drops.
		{"ipv6/conf/" + device + "/disable_ipv6", "1"},
	} {
		if err := setSysctl(s.path, s.value); err != nil {
			return err
		}
	}
	return nil
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
