package agent

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"causeway/kvstore"
	"causeway/lb"
)

func named(name, extra string) []byte {
	return bytes.Replace(manifest(extra), []byte("name: shop"), []byte("name: "+name), 1)
}

func file(manifests ...[]byte) []byte { return bytes.Join(manifests, []byte("---\n")) }

func stored(t *testing.T, store kvstore.Store) int {
	t.Helper()
	entries, err := store.List(context.Background(), kvstore.Prefix)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestAFileIsAppliedInFullOrNotAtAll(t *testing.T) {
	store := kvstore.NewMemory()
	s := newServices(t, store)
	const ip = ", clusterIP: 192.0.2.7"
	if _, err := s.Apply(brief(t), file(named("a", ip), named("b", ip))); err == nil || !strings.Contains(err.Error(), "is service default/a's") {
		t.Errorf("two services of a file have one address: %v", err)
	}
	if n := stored(t, store); n != 0 {
		t.Errorf("%d entries are there after a refusal, want none", n)
	}
	// More services than addresses.
	var many [][]byte
	for i := range 9 {
		many = append(many, named(fmt.Sprintf("s%d", i), ""))
	}
	if _, err := s.Apply(brief(t), file(many...)); err == nil {
		t.Error("nine services have found an address in a /29")
	}
	if n := stored(t, store); n != 0 {
		t.Errorf("%d entries are there after the addresses ran out, want none", n)
	}
	results, err := s.Apply(brief(t), file(named("a", ""), named("b", "")))
	if err != nil || len(results) != 2 || stored(t, store) != 4 {
		t.Errorf("two services: %+v, %v, %d entries", results, err, stored(t, store))
	}
}

func TestAServiceThatCannotBeReadIsWrittenOver(t *testing.T) {
	store := kvstore.NewMemory()
	s := newServices(t, store)
	const ip = ", clusterIP: 192.0.2.7"
	if _, err := s.Apply(brief(t), manifest(ip)); err != nil {
		t.Fatal(err)
	}
	key := lb.ServiceKey("east", lb.Name{Namespace: "default", Name: "shop"})
	spoil := func() {
		if err := store.Put(context.Background(), key, []byte("garbage")); err != nil {
			t.Fatal(err)
		}
	}
	spoil()
	if _, err := s.Apply(brief(t), manifest(ip)); err != nil {
		t.Errorf("a service does not get the address that is reserved for it: %v", err)
	}
	spoil()
	if err := s.Delete(context.Background(), lb.Name{Namespace: "default", Name: "shop"}); err != nil || stored(t, store) != 0 {
		t.Errorf("%d entries remain of a deleted service (%v)", stored(t, store), err)
	}
}

func TestAnAddressThatAServiceIsKnownByIsNotGivenAway(t *testing.T) {
	s := newServices(t, kvstore.NewMemory())
	results, err := s.Apply(brief(t), manifest(""))
	if err != nil {
		t.Fatal(err)
	}
	s.store = kvstore.NewMemory() // it lost everything, but the service is held
	put(t, s.tables, s.tables.Services, shop("east", 1, results[0].ClusterIPs[0], func(s *lb.Service) { s.Name.Name = "held" }))
	results2, err := s.Apply(brief(t), manifest(""))
	if err != nil || results2[0].ClusterIPs[0] == results[0].ClusterIPs[0] {
		t.Errorf("the address of a service that is held from memory was given away: %+v %v", results2, err)
	}
}

// rushed is a store in which somebody else is always faster.
type rushed struct {
	*kvstore.Memory
	left int
}

func (r *rushed) Txn(ctx context.Context, conds []kvstore.Condition, ops []kvstore.Op) error {
	if r.left > 0 {
		r.left--
		entry, err := r.Get(ctx, conds[0].Key)
		if err != nil {
			return err
		}
		if err := r.Put(ctx, entry.Key, entry.Value); err != nil {
			return err
		}
	}
	return r.Memory.Txn(ctx, conds, ops)
}

func TestADeletionThatLostARaceIsTriedAgain(t *testing.T) {
	store := kvstore.NewMemory()
	s := newServices(t, store)
	name := lb.Name{Namespace: "default", Name: "shop"}
	if _, err := s.Apply(brief(t), manifest("")); err != nil {
		t.Fatal(err)
	}
	s.store = &rushed{store, 1000}
	if err := s.Delete(context.Background(), name); err == nil || httpStatus(err) != http.StatusConflict {
		t.Errorf("a deletion that always loses says %v, want a conflict", err)
	}
	s.store = &rushed{store, 2}
	if err := s.Delete(context.Background(), name); err != nil {
		t.Error(err)
	}
}

// newDualStackServices are those of a cluster that has service addresses of both families.
func newDualStackServices(t *testing.T, store kvstore.Store) *services {
	s := newServices(t, store)
	s.cluster.ServiceCIDRs = append(s.cluster.ServiceCIDRs, netip.MustParsePrefix("fd00:1::/112"))
	return s
}

// reserved lists the addresses that are reserved in the store.
func reserved(t *testing.T, store kvstore.Store) []string {
	t.Helper()
	entries, err := store.List(t.Context(), reservationPrefix("east"))
	if err != nil {
		t.Fatal(err)
	}
	var ips []string
	for _, e := range entries {
		ips = append(ips, strings.TrimPrefix(e.Key, reservationPrefix("east")))
	}
	return ips
}

func TestAServiceHasAnAddressOfEachFamilyThatItAsksFor(t *testing.T) {
	store := kvstore.NewMemory()
	s := newDualStackServices(t, store)
	var had []string
	// Each is applied after the one before. "4" and "6" are an address that was chosen, "=4" and "=6" the one that it has had.
	for _, test := range []struct{ extra, action, want string }{
		{"", "created", "4"},
		{", ipFamilyPolicy: PreferDualStack", "configured", "=4 6"},
		{", ipFamilyPolicy: PreferDualStack", "unchanged", "=4 =6"},
		{", ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6, IPv4]", "configured", "=6 =4"},
		{"", "configured", "=6"},
		{"", "unchanged", "=6"},
		{", ipFamilyPolicy: PreferDualStack", "configured", "=6 4"},
		{", ipFamilies: [IPv4]", "configured", "=4"},
		{", clusterIPs: [192.0.2.7, 'fd00:1::7']", "configured", "192.0.2.7 fd00:1::7"},
		{", clusterIPs: ['fd00:1::7', 192.0.2.7]", "configured", "=6 =4"},
		{", clusterIP: 'fd00:1::8', ipFamilyPolicy: PreferDualStack", "configured", "fd00:1::8 =4"},
		{", clusterIP: 192.0.2.9", "configured", "192.0.2.9"},
	} {
		results, err := s.Apply(brief(t), manifest(test.extra))
		if err != nil {
			t.Fatalf("%q: %v", test.extra, err)
		}
		got := results[0].ClusterIPs
		want := strings.Fields(test.want)
		if results[0].Action != test.action || len(got) != len(want) {
			t.Fatalf("%q: %+v, want %s at %s", test.extra, results[0], test.action, test.want)
		}
		for i, w := range want {
			ip := netip.MustParseAddr(got[i])
			switch w {
			case "4", "6", "=4", "=6":
				family := lb.FamilyOf(ip).String() == "IPv"+strings.TrimPrefix(w, "=")
				if kept := slices.Contains(had, got[i]); !family || kept != strings.HasPrefix(w, "=") {
					t.Errorf("%q: %s, want %s; before it had %s", test.extra, got, test.want, had)
				}
			default:
				if got[i] != w {
					t.Errorf("%q: %s, want %s", test.extra, got, test.want)
				}
			}
		}
		if r := reserved(t, store); !slices.Equal(r, slices.Sorted(slices.Values(got))) {
			t.Errorf("%q: reserved are %s, want those of the service, %s", test.extra, r, got)
		}
		had = got
	}
	if err := s.Delete(t.Context(), lb.Name{Namespace: "default", Name: "shop"}); err != nil || stored(t, store) != 0 {
		t.Errorf("%d entries remain of a deleted service (%v)", stored(t, store), err)
	}
}

func TestAServiceThatAsksForAFamilyInVain(t *testing.T) {
	store := kvstore.NewMemory()
	single, both := newServices(t, store), newDualStackServices(t, store)
	if _, err := both.Apply(brief(t), named("other", ", clusterIPs: [192.0.2.7, 'fd00:1::7']")); err != nil {
		t.Fatal(err)
	}
	before := stored(t, store)
	for _, test := range []struct {
		s           *services
		extra, want string
	}{
		{single, ", ipFamilyPolicy: RequireDualStack", "service default/shop: ipFamilyPolicy RequireDualStack: the cluster has only IPv4"},
		{single, ", ipFamilies: [IPv6]", "IPv6 is asked for"},
		{single, ", clusterIP: 'fd00:1::9'", "IPv6 is asked for"},
		{single, ", clusterIPs: [192.0.2.8, 'fd00:1::9']", "IPv6 is asked for"},
		{both, ", clusterIPs: [192.0.2.8, 'fd00:1::7']", "clusterIP fd00:1::7 is service default/other's"},
	} {
		_, err := test.s.Apply(brief(t), manifest(test.extra))
		if err == nil || !strings.Contains(err.Error(), test.want) || httpStatus(err) >= http.StatusInternalServerError {
			t.Errorf("%s: %v, want %q", test.extra, err, test.want)
		}
		if now := stored(t, store); now != before {
			t.Errorf("%s: refused, and yet %d entries became %d", test.extra, before, now)
		}
	}
	if results, err := single.Apply(brief(t), manifest(", ipFamilyPolicy: PreferDualStack")); err != nil || len(results[0].ClusterIPs) != 1 {
		t.Errorf("both families are preferred in a cluster of one: %+v, %v", results, err)
	}
}
