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
	for _, bad := range []string{"100.64.64.0/31", "fd00::/127", "fd00::/128", "::ffff:100.64.64.0/120"} {
		if _, err := AllocateClusterIP(netip.MustParsePrefix(bad), Name{"web", "shop"}, taken); err == nil {
			t.Errorf("allocates from %s", bad)
		}
	}
	if _, err := AllocateClusterIP(netip.Prefix{}, Name{"web", "shop"}, taken); err == nil {
		t.Error("allocates from no range")
	}
}

// TestAllocateClusterIPOfAnySize holds for ranges from four addresses to all that there are: what is given lies in the range, is
// neither its first nor its last address, and nobody else's; and a range that is full to the last says so without being searched for ever.
func TestAllocateClusterIPOfAnySize(t *testing.T) {
	for _, text := range []string{"0.0.0.0/0", "100.64.0.0/10", "100.64.64.0/30", "fd00::/8", "fd00:1::/63", "fd00:1::/64", "fd00:1::/65", "fd00:1::/112", "fd00:1::fff8/125", "fd00:1::fffc/126"} {
		cidr := netip.MustParsePrefix(text)
		used := map[netip.Addr]bool{}
		count := 200
		if hostBits(cidr) < 8 {
			count = 1<<hostBits(cidr) - 2
		}
		for i := range count {
			a, err := AllocateClusterIP(cidr, Name{"web", fmt.Sprintf("shop-%d", i)}, func(a netip.Addr) bool { return used[a] })
			if err != nil {
				t.Fatalf("the %dth of %s: %v", i+1, text, err)
			}
			if used[a] || !cidr.Contains(a) || !cidr.Contains(a.Next()) || a == cidr.Addr() {
				t.Fatalf("the %dth of %s is %s", i+1, text, a)
			}
			used[a] = true
		}
		if _, err := AllocateClusterIP(cidr, Name{"web", "shop"}, func(netip.Addr) bool { return true }); !errors.Is(err, ErrNoClusterIP) {
			t.Errorf("%s, where all is in use: %v", text, err)
		}
	}
}
