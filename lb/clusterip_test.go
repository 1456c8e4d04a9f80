package lb

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
)

func TestAllocateClusterIP(t *testing.T) {
	cidr := netip.MustParsePrefix("100.64.64.0/24")
	used := map[netip.Addr]bool{}
	taken := func(a netip.Addr) bool { return used[a] }
	first, err := AllocateClusterIP(cidr, Name{"web", "shop"}, taken)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := AllocateClusterIP(cidr, Name{"web", "shop"}, taken); again != first {
		t.Errorf("%s, then %s", first, again)
	}
	for i := range 254 {
		a, err := AllocateClusterIP(cidr, Name{"web", fmt.Sprintf("shop-%d", i)}, taken)
		if err != nil {
			t.Fatal(err)
		}
		if used[a] || !cidr.Contains(a) || a.As4()[3] == 0 || a.As4()[3] == 255 {
			t.Fatalf("the %dth is %s", i+1, a)
		}
		used[a] = true
	}
	if a, err := AllocateClusterIP(cidr, Name{"web", "shop"}, taken); !errors.Is(err, ErrNoClusterIP) {
		t.Errorf("after all are used: %s, %v", a, err)
	}
	delete(used, first)
	if a, err := AllocateClusterIP(cidr, Name{"web", "other"}, taken); err != nil || a != first {
		t.Errorf("the only free one is %s, got %s, %v", first, a, err)
	}
	for _, bad := range []netip.Prefix{{}, netip.MustParsePrefix("fd00::/64"), netip.MustParsePrefix("100.64.64.0/31")} {
		if _, err := AllocateClusterIP(bad, Name{"web", "shop"}, taken); err == nil {
			t.Errorf("allocates from %s", bad)
		}
	}
	widest := netip.MustParsePrefix("0.0.0.0/0")
	if _, err := AllocateClusterIP(widest, Name{"web", "shop"}, taken); err != nil {
		t.Error(err)
	}
}
