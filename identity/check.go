package identity

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"

	"causeway/lb"
)

// Bounds of stored entries.
const (
	MaxPodCIDRs     = 16 // of a node, and of a cluster
	MaxLabels       = 64 // of an endpoint
	MaxCapabilities = 64 // of a cluster
)

var (
	labelKey    = regexp.MustCompile(`^([A-Za-z0-9][-A-Za-z0-9.]{0,252}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelValue  = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
	plainString = regexp.MustCompile(`^[-A-Za-z0-9_.+]{1,64}$`)
)

// CheckLabels tells why labels cannot be an endpoint's: Kubernetes' syntax for keys and values,
// 1 to MaxLabels of them. It is what makes Labels.String unambiguous.
func CheckLabels(labels Labels) error {
	if len(labels) == 0 || len(labels) > MaxLabels {
		return fmt.Errorf("%d labels, 1 to %d are allowed", len(labels), MaxLabels)
	}
	for key, value := range labels {
		if !labelKey.MatchString(key) {
			return fmt.Errorf("label key %s is not of Kubernetes' form [PREFIX/]NAME", quote(key))
		}
		if !labelValue.MatchString(value) {
			return fmt.Errorf("label %s has the value %s, which is not of Kubernetes' form (at most 63 of letters, digits, \"-\", \"_\" and \".\")", key, quote(value))
		}
	}
	return nil
}

// Bounds of prefixes: an IPv4 range may be as wide as 10.0.0.0/8, an IPv6 range as what a provider gets. The narrowest IPv6 range has 8
// addresses, of which half are the node's own.
const (
	widestIPv4, widestIPv6 = 8, 32
	narrowestIPv6          = 125
)

// checkPrefix refuses a prefix that endpoints or services cannot have addresses from.
func checkPrefix(p netip.Prefix) error {
	widest := widestIPv6
	if p.Addr().Is4() {
		widest = widestIPv4
	}
	switch {
	case !p.IsValid():
		return errors.New("prefix is missing")
	case p != p.Masked():
		return fmt.Errorf("prefix %s has host bits, write %s", p, p.Masked())
	case p.Bits() < widest:
		return fmt.Errorf("prefix %s is wider than /%d", p, widest)
	case p.Addr().Is6() && p.Bits() > narrowestIPv6:
		return fmt.Errorf("prefix %s is narrower than /%d", p, narrowestIPv6)
	}
	if err := lb.CheckAddress(p.Addr()); err != nil {
		return fmt.Errorf("prefix %s: %w", p, err)
	}
	return nil
}

// checkPodCIDRs wants 1 to MaxPodCIDRs prefixes that don't overlap.
func checkPodCIDRs(prefixes []netip.Prefix) error {
	if len(prefixes) == 0 || len(prefixes) > MaxPodCIDRs {
		return fmt.Errorf("%d pod CIDRs, 1 to %d are allowed", len(prefixes), MaxPodCIDRs)
	}
	for i, p := range prefixes {
		if err := checkPrefix(p); err != nil {
			return fmt.Errorf("pod CIDR: %w", err)
		}
		for _, other := range prefixes[:i] {
			if p.Overlaps(other) {
				return fmt.Errorf("pod CIDRs %s and %s overlap", other, p)
			}
		}
	}
	return nil
}

func checkPlain(what, s string) error {
	if !plainString.MatchString(s) {
		return fmt.Errorf("%s %s is not 1 to 64 of letters, digits, \"-\", \"_\", \".\" and \"+\"", what, quote(s))
	}
	return nil
}

// containsAddr tells whether one of the prefixes has the address.
func containsAddr(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// containsPrefix tells whether all of p lies in one of the prefixes.
func containsPrefix(prefixes []netip.Prefix, p netip.Prefix) bool {
	for _, outer := range prefixes {
		if outer.Bits() <= p.Bits() && outer.Contains(p.Addr()) {
			return true
		}
	}
	return false
}

// quote shows s in an error, shortened if someone stored a novel.
func quote(s string) string {
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return fmt.Sprintf("%q", s)
}
