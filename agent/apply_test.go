package agent

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
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
