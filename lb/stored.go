package lb

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"sigs.k8s.io/json"
)

// What every stored value of Causeway must pass. It stands in this package, the lowest one
// that has stored values, so that identity's decoders can use it too.

// MaxValue bounds a stored value, in bytes, as JSON. The largest that Causeway writes, a slice of
// MaxSliceBackends, is about a fifth of it.
const MaxValue = 64 << 10

var (
	dnsLabel     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	dnsSubdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
)

// Unmarshal reads one JSON document of at most MaxValue bytes into v. It refuses trailing data,
// fields given twice and values of the wrong type. It skips fields that v does not
// have, so that a newer Causeway may write more; names are case-sensitive.
func Unmarshal(value []byte, v any) error {
	if len(value) > MaxValue {
		return fmt.Errorf("value has %d bytes, at most %d are allowed", len(value), MaxValue)
	}
	strict, err := json.UnmarshalStrict(value, v, json.DisallowDuplicateFields)
	if err != nil {
		return fmt.Errorf("value is not the JSON expected: %w", err)
	}
	if len(strict) > 0 {
		return fmt.Errorf("value is not the JSON expected: %w", errors.Join(strict...))
	}
	return nil
}

// CheckName refuses what is not a DNS label (RFC 1123: at most 63 of a-z, 0-9 and "-"); what says
// in the error whose name it is.
func CheckName(what, name string) error {
	if !dnsLabel.MatchString(name) {
		return fmt.Errorf("%s %s is not a DNS label (1 to 63 of a-z, 0-9 and \"-\")", what, quote(name))
	}
	return nil
}

// CheckEndpoint refuses what is not "namespace/name" of a pod: a DNS label, and a DNS subdomain of at most 253 characters.
func CheckEndpoint(endpoint string) error {
	namespace, name, found := strings.Cut(endpoint, "/")
	if !found {
		return fmt.Errorf("endpoint %s is not NAMESPACE/NAME", quote(endpoint))
	}
	if err := CheckName("endpoint's namespace", namespace); err != nil {
		return err
	}
	if !isSubdomain(name) {
		return fmt.Errorf("endpoint's name %s is not a DNS subdomain (1 to 253 of a-z, 0-9, \"-\" and \".\")", quote(name))
	}
	return nil
}

func isSubdomain(name string) bool { return len(name) <= 253 && dnsSubdomain.MatchString(name) }

// CheckAddress refuses an address that cannot be one machine's or pod's in the mesh.
func CheckAddress(a netip.Addr) error {
	reason := ""
	switch {
	case !a.IsValid():
		return errors.New("address is missing")
	case a.Zone() != "":
		reason = "has a zone"
	case a.Is4In6():
		reason = "is IPv4 written as IPv6, write " + a.Unmap().String()
	case a.IsUnspecified(), a.Is4() && a.As4()[0] == 0:
		reason = "is unspecified"
	case a.IsLoopback():
		reason = "is a loopback address"
	case a.IsMulticast():
		reason = "is a multicast address"
	case a.IsLinkLocalUnicast():
		reason = "is link-local"
	case a.Is4() && a.As4()[0] >= 240:
		reason = "is reserved (240.0.0.0/4)"
	default:
		return nil
	}
	return fmt.Errorf("address %s %s", a, reason)
}

// quote shows s in an error, shortened if someone stored a novel.
func quote(s string) string {
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return fmt.Sprintf("%q", s)
}
