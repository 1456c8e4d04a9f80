package tunnel

import (
	"net/netip"
	"testing"
)

func TestPodMTU(t *testing.T) {
	for _, c := range []struct {
		underlay int
		node     string
		want     int
	}{
		{1500, "172.29.1.10", 1450},
		{9000, "172.29.1.10", 8950},
		{1500, "::ffff:172.29.1.10", 1450},
		{1500, "2001:db8::1", 1430},
		{1280, "2001:db8::1", 1210},
	} {
		if got := PodMTU(c.underlay, netip.MustParseAddr(c.node)); got != c.want {
			t.Errorf("PodMTU(%d, %s) = %d, want %d", c.underlay, c.node, got, c.want)
		}
	}
}
