package lb

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestFamiliesOfAService(t *testing.T) {
	both, sixFirst := []string{"100.64.64.0/18", "fd00:1::/112"}, []string{"fd00:1::/112", "100.64.64.0/18"}
	four, six := []string{"100.64.64.0/18"}, []string{"fd00:1::/112"}
	for _, test := range []struct {
		name    string
		ranges  []string
		request FamilyRequest
		want    []Family
		err     string
	}{
		{"nothing asked", both, FamilyRequest{}, []Family{IPv4}, ""},
		{"nothing asked, IPv6 first", sixFirst, FamilyRequest{}, []Family{IPv6}, ""},
		{"single stack", both, FamilyRequest{Policy: SingleStack}, []Family{IPv4}, ""},
		{"the second family", both, FamilyRequest{Policy: SingleStack, Families: []Family{IPv6}}, []Family{IPv6}, ""},
		{"both preferred", both, FamilyRequest{Policy: PreferDualStack}, []Family{IPv4, IPv6}, ""},
		{"both preferred, IPv6 first", sixFirst, FamilyRequest{Policy: PreferDualStack}, []Family{IPv6, IPv4}, ""},
		{"both preferred where there is one", six, FamilyRequest{Policy: PreferDualStack}, []Family{IPv6}, ""},
		{"both preferred, in an order", both, FamilyRequest{Policy: PreferDualStack, Families: []Family{IPv6, IPv4}}, []Family{IPv6, IPv4}, ""},
		{"both preferred, beginning with", both, FamilyRequest{Policy: PreferDualStack, Families: []Family{IPv6}}, []Family{IPv6, IPv4}, ""},
		{"both required", both, FamilyRequest{Policy: RequireDualStack}, []Family{IPv4, IPv6}, ""},
		{"both required where there is one", four, FamilyRequest{Policy: RequireDualStack}, nil, "the cluster has only IPv4 service addresses (100.64.64.0/18)"},
		{"a family that is not there", four, FamilyRequest{Families: []Family{IPv6}}, nil, "IPv6 is asked for"},
		{"both named, though only preferred", four, FamilyRequest{Policy: PreferDualStack, Families: []Family{IPv4, IPv6}}, nil, "IPv6 is asked for"},
		{"no range", nil, FamilyRequest{}, nil, "no service range"},
	} {
		var ranges []netip.Prefix
		for _, r := range test.ranges {
			ranges = append(ranges, netip.MustParsePrefix(r))
		}
		got, err := test.request.Resolve(ranges)
		if !slices.Equal(got, test.want) || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v, %v; want %v, %q", test.name, got, err, test.want, test.err)
		}
	}
}

func TestCheckAddressOfEitherFamily(t *testing.T) {
	for text, want := range map[string]string{
		"10.1.1.5": "", "fd00:10:1::5": "", "2001:db8::1": "",
		"::": "unspecified", "0.1.2.3": "unspecified", "::1": "loopback", "127.0.0.1": "loopback",
		"fe80::1": "link-local", "169.254.1.1": "link-local", "fd00::1%eth0": "zone",
		"ff02::1": "multicast", "ff0e::1": "multicast", "224.0.0.1": "multicast",
		"::ffff:10.1.1.5": "write 10.1.1.5", "240.0.0.1": "reserved",
	} {
		err := CheckAddress(netip.MustParseAddr(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
