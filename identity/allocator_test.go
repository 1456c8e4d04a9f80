package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"causeway/kvstore"
)

// opener opens clients of one store, as of several agents.
type opener func() kvstore.Store

func memory(t *testing.T) (*kvstore.Memory, opener) {
	m := kvstore.NewMemory()
	t.Cleanup(func() { m.Close() })
	return m, func() kvstore.Store {
		c := m.Client()
		t.Cleanup(func() { c.Close() })
		return c
	}
}

// onEachStore runs a test on the store in memory and on a real etcd.
func onEachStore(t *testing.T, test func(t *testing.T, open opener)) {
	t.Run("memory", func(t *testing.T) {
		_, open := memory(t)
		test(t, open)
	})
	t.Run("etcd", func(t *testing.T) {
		if testing.Short() {
			t.Skip("starts an etcd")
		}
		test(t, etcd(t))
	})
}

func allocator(store kvstore.Store, node string) *Allocator {
	return NewAllocator(store, "east", 1, node, slog.New(slog.DiscardHandler))
}

func app(name string) Labels { return Labels{"app": name, NamespaceLabel: "web"} }

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// keys returns what the store has of east's identities, shortened.
func keys(t *testing.T, store kvstore.Store) []string {
	t.Helper()
	var found []string
	for _, e := range must[[]kvstore.Entry](t)(store.List(t.Context(), IdentitiesPrefix("east"))) {
		found = append(found, strings.TrimPrefix(e.Key, IdentitiesPrefix("east")))
	}
	return found
}

func TestAllocateStoresAnIdentity(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		store := open()
		a := allocator(store, "node1")
		n := must[Number](t)(a.Allocate(t.Context(), app("shop")))
		if !n.Valid() || n.Cluster() != 1 {
			t.Fatalf("identity %s", n.Detail())
		}
		labels := strings.TrimPrefix(LabelsKey("east", app("shop")), IdentitiesPrefix("east"))
		if got, want := keys(t, store), []string{"ids/" + decimal(n), labels, "refs/" + decimal(n) + "/node1"}; !slices.Equal(got, want) {
			t.Errorf("stored %v, want %v", got, want)
		}
		entry := must[kvstore.Entry](t)(store.Get(t.Context(), IdentityKey("east", n)))
		if i := must[Identity](t)(DecodeIdentity(entry.Key, entry.Value)); i.Number != n || i.Labels.String() != app("shop").String() {
			t.Errorf("stored %+v", i)
		}
	})
}

// TestRacingAllocators lets eight nodes ask for the same thirty sets of labels at once.
func TestRacingAllocators(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		const nodes, sets = 8, 30
		var numbers [nodes][sets]Number
		var wg sync.WaitGroup
		for node := range nodes {
			a := allocator(open(), fmt.Sprintf("node%d", node))
			wg.Go(func() {
				for set := range sets {
					n, err := a.Allocate(t.Context(), app(fmt.Sprintf("app-%d", set)))
					if err != nil {
						t.Error(err)
					}
					numbers[node][set] = n
				}
			})
		}
		wg.Wait()
		seen := map[Number]int{}
		for set, n := range numbers[0] {
			if other, ok := seen[n]; ok {
				t.Errorf("sets %d and %d both have identity %d", other, set, n)
			}
			seen[n] = set
			for node := range nodes {
				if numbers[node][set] != n {
					t.Errorf("set %d is %d on node 0 and %d on node %d", set, n, numbers[node][set], node)
				}
			}
		}
		if got := len(keys(t, open())); got != sets*(2+nodes) {
			t.Errorf("%d keys, want %d", got, sets*(2+nodes))
		}
	})
}

// TestRacingUsersComeAndGo lets nodes allocate and release the same labels over and over. Whoever
// uses a number must find it in the store, and in the end nothing is left.
func TestRacingUsersComeAndGo(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		var wg sync.WaitGroup
		for node := range 6 {
			store := open()
			a := allocator(store, fmt.Sprintf("node%d", node))
			wg.Go(func() {
				for range 40 {
					n, err := a.Allocate(t.Context(), app("shop"))
					if err != nil {
						t.Error(err)
						return
					}
					if e, err := store.Get(t.Context(), IdentityKey("east", n)); err != nil {
						t.Errorf("identity %d in use: %v", n, err)
					} else if i, err := DecodeIdentity(e.Key, e.Value); err != nil || i.Labels["app"] != "shop" {
						t.Errorf("identity %d in use is %+v, %v", n, i, err)
					}
					if err := a.Release(t.Context(), app("shop")); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if left := keys(t, open()); len(left) != 0 {
			t.Errorf("left are %v", left)
		}
	})
}

func TestReleaseKeepsWhatOthersUse(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		store, ctx := open(), t.Context()
		one, two := allocator(store, "node1"), allocator(open(), "node2")
		n := must[Number](t)(one.Allocate(ctx, app("shop")))
		again := must[Number](t)(one.Allocate(ctx, app("shop")))
		there := must[Number](t)(two.Allocate(ctx, app("shop")))
		if again != n || there != n {
			t.Fatalf("%d, then %d, on another node %d", n, again, there)
		}
		for _, step := range []struct {
			a    *Allocator
			left int
		}{{one, 4}, {one, 3}, {two, 0}} {
			if err := step.a.Release(ctx, app("shop")); err != nil {
				t.Fatal(err)
			}
			if left := keys(t, store); len(left) != step.left {
				t.Errorf("left are %v, want %d keys", left, step.left)
			}
		}
		if err := one.Release(ctx, app("shop")); err == nil {
			t.Error("released what is not used")
		}
		if len(one.uses) != 0 {
			t.Errorf("remembers %v", one.uses)
		}
	})
}

func TestLabelsGetTheirNumberBack(t *testing.T) {
	_, open := memory(t)
	a := allocator(open(), "node1")
	n := must[Number](t)(a.Allocate(t.Context(), app("shop")))
	if err := a.Release(t.Context(), app("shop")); err != nil {
		t.Fatal(err)
	}
	if again := must[Number](t)(a.Allocate(t.Context(), app("shop"))); again != n {
		t.Errorf("%d, then %d", n, again)
	}
}

// put stores an identity as another node would have.
func put(t *testing.T, store kvstore.Store, n Number, labels Labels) {
	t.Helper()
	if err := allocator(store, "other").registry.create(t.Context(), labels, n, false); err != nil {
		t.Fatal(err)
	}
}

func TestAllocateSkipsTakenNumbers(t *testing.T) {
	_, open := memory(t)
	store := open()
	a := allocator(store, "node1")
	first := a.registry.first(app("shop"))
	start := uint32(first&0xffff - MinLocal)
	put(t, store, first, app("cart"))
	// The next has no identity, but a node refers to it, which is about to store it again.
	if err := store.Put(t.Context(), RefKey("east", a.registry.nth(start+1), "node3"), nil); err != nil {
		t.Fatal(err)
	}
	if n := must[Number](t)(a.Allocate(t.Context(), app("shop"))); n != a.registry.nth(start+2) {
		t.Errorf("got %d, %d is taken and the next referred to", n, first)
	}
}

// TestReferredNumbersAreLeftToThoseWhoReferToThem: their owners are about to store them again.
func TestReferredNumbersAreLeftToThoseWhoReferToThem(t *testing.T) {
	_, open := memory(t)
	store := open()
	a := allocator(store, "node1")
	first := a.registry.first(app("shop"))
	if err := store.Put(t.Context(), RefKey("east", first, "node3"), nil); err != nil {
		t.Fatal(err)
	}
	if n := must[Number](t)(a.Allocate(t.Context(), app("shop"))); n == first {
		t.Errorf("got %d, which node3 refers to", n)
	}
}

// TestLabelsHaveOneNumber: who looked before another node stored them must not store them twice.
func TestLabelsHaveOneNumber(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		store := open()
		put(t, store, Compose(1, 300), app("shop"))
		err := allocator(store, "node1").registry.create(t.Context(), app("shop"), Compose(1, 400), false)
		if !errors.Is(err, kvstore.ErrConflict) {
			t.Errorf("got %v", err)
		}
	})
}

func TestExhausted(t *testing.T) {
	_, open := memory(t)
	store := open()
	a := allocator(store, "node1")
	spare := a.registry.nth(77)
	for i := range locals {
		if n := a.registry.nth(i); n != spare {
			if err := store.Put(t.Context(), IdentityKey("east", n), []byte("{}")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := must[Number](t)(a.Allocate(t.Context(), app("shop"))); n != spare {
		t.Errorf("got %d, the only free number is %d", n, spare)
	}
	if n, err := a.Allocate(t.Context(), app("cart")); !errors.Is(err, ErrExhausted) {
		t.Errorf("got %d, %v", n, err)
	}
}

func TestAllocateRefuses(t *testing.T) {
	_, open := memory(t)
	store, ctx := open(), t.Context()
	a := allocator(store, "node1")
	for labels, value := range map[*Labels]string{
		{"app": "broken"}:  `{"id":`,
		{"app": "another"}: `{"id":65792,"labels":{"app":"else"}}`,
		{"app": "foreign"}: `{"id":131328,"labels":{"app":"foreign"}}`,
	} {
		if err := store.Put(ctx, LabelsKey("east", *labels), []byte(value)); err != nil {
			t.Fatal(err)
		}
		if n, err := a.Allocate(ctx, *labels); err == nil || !strings.Contains(err.Error(), "labels/") {
			t.Errorf("labels stored as %s: %d, %v", value, n, err)
		}
	}
	for _, labels := range []Labels{nil, {"a,b": "c"}, {"app": "a=b"}} {
		if _, err := a.Allocate(ctx, labels); err == nil {
			t.Errorf("labels %v are accepted", labels)
		}
	}
	if n, err := a.Adopt(ctx, app("shop"), Compose(2, 256)); err == nil {
		t.Errorf("adopted another cluster's identity as %d", n)
	}
	if _, err := a.Allocate(ctx, app("shop")); err != nil {
		t.Errorf("after the others: %v", err)
	}
	if len(a.uses) != 1 {
		t.Errorf("remembers %d", len(a.uses))
	}
}

func TestWaitingForTheTurnEndsWithTheContext(t *testing.T) {
	_, open := memory(t)
	a := allocator(open(), "node1")
	u := must[*use](t)(a.take(t.Context(), app("shop")))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Allocate(ctx, app("shop")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	a.leave(u)
	if len(a.uses) != 0 {
		t.Errorf("remembers %v", a.uses)
	}
}

// interrupted lets something happen right after the first read.
type interrupted struct {
	kvstore.Store
	once sync.Once
	by   func()
}

func (s *interrupted) Get(ctx context.Context, key string) (kvstore.Entry, error) {
	defer s.once.Do(s.by)
	return s.Store.Get(ctx, key)
}

// TestLabelsGoWhileTheyAreJoined: the last other node gives the labels up between our reading them and our reference.
func TestLabelsGoWhileTheyAreJoined(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		store, other := open(), allocator(open(), "other")
		must[Number](t)(other.Allocate(t.Context(), app("shop")))
		a := allocator(&interrupted{Store: store, by: func() {
			if err := other.Release(t.Context(), app("shop")); err != nil {
				t.Error(err)
			}
		}}, "node1")
		n := must[Number](t)(a.Allocate(t.Context(), app("shop")))
		stored(t, store, IdentityKey("east", n), true)
		stored(t, store, LabelsKey("east", app("shop")), true)
		stored(t, store, RefKey("east", n, "node1"), true)
	})
}
