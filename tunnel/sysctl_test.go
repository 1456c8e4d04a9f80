package tunnel

import (
	"os"
	"strings"
	"testing"
)

func sysctl(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/sys/net/" + path)
	must(t, err)
	return strings.TrimSpace(string(data))
}

// TestForwardIPv6: a node that becomes a router goes on listening to router advertisements where it did, and nowhere else.
func TestForwardIPv6(t *testing.T) {
	inNode(t, func() {
		if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
			t.Log("the kernel has no IPv6")
			return
		}
		must(t, setSysctl("ipv6/conf/eth0/accept_ra", "1"))
		must(t, setSysctl("ipv6/conf/peer/accept_ra", "0"))
		if _, err := EnsureVXLAN(Config{Address: self}); err != nil {
			t.Error(err)
		}
		if got := sysctl(t, "ipv6/conf/all/forwarding"); got != "0" {
			t.Errorf("without IPv6 pods forwarding is %s", got)
		}
		for range 2 {
			must(t, setSysctls(DefaultName, true))
			for path, want := range map[string]string{"all/forwarding": "1", "eth0/forwarding": "1", "eth0/accept_ra": "2", "peer/accept_ra": "0", DefaultName + "/accept_ra": "0"} {
				if got := sysctl(t, "ipv6/conf/"+path); got != want {
					t.Errorf("%s is %s, want %s", path, got, want)
				}
			}
		}
	})
}
