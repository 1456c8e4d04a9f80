package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"causeway/kvstore"
)

func reconciled(t *testing.T, a *Allocator, want ...Renumbered) {
	t.Helper()
	got, err := a.Reconcile(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.EqualFunc(got, want, func(a, b Renumbered) bool {
		return a.Old == b.Old && a.New == b.New && a.Labels.String() == b.Labels.String()
	}) {
		t.Errorf("renumbered %+v, want %+v", got, want)
	}
}

func stored(t *testing.T, store kvstore.Store, key string, want bool) {
	t.Helper()
	_, err := store.Get(t.Context(), key)
	if err != nil && !errors.Is(err, kvstore.ErrNotFound) {
		t.Fatal(err)
	}
	if (err == nil) != want {
		t.Errorf("%s is there: %v, want %v", key, err == nil, want)
	}
}

func TestAdoptWorksWithoutTheStore(t *testing.T) {
	onEach := func(name string, prepare func(*testing.T, kvstore.Store, Number)) {
		t.Run(name, func(t *testing.T) {
			m, open := memory(t)
			client := m.Client()
			defer client.Close()
			a := allocator(client, "node1")
			n := Compose(1, 4711)
			prepare(t, open(), n)
			client.Disconnect()
			for range 2 {
				if got := must[Number](t)(a.Adopt(t.Context(), app("shop"), n)); got != n {
					t.Errorf("adopted as %d", got)
				}
			}
			if got := must[Number](t)(a.Allocate(t.Context(), app("shop"))); got != n {
				t.Errorf("a new endpoint with the same labels gets %d", got)
			}
			if _, err := a.Allocate(t.Context(), app("unheard-of")); !errors.Is(err, kvstore.ErrUnavailable) {
				t.Errorf("new labels: %v", err)
			}
			if _, err := a.Reconcile(t.Context()); !errors.Is(err, kvstore.ErrUnavailable) {
				t.Errorf("reconciling without the store: %v", err)
			}
			client.Reconnect()
			reconciled(t, a)
			stored(t, m, IdentityKey("east", n), true)
			stored(t, m, RefKey("east", n, "node1"), true)
			for range 3 {
				if err := a.Release(t.Context(), app("shop")); err != nil {
					t.Error(err)
				}
			}
			stored(t, m, RefKey("east", n, "node1"), false)
		})
	}
	onEach("the store has it", func(t *testing.T, s kvstore.Store, n Number) { put(t, s, n, app("shop")) })
	onEach("the store has lost it", func(*testing.T, kvstore.Store, Number) {})
	onEach("the store has lost all but another node's reference", func(t *testing.T, s kvstore.Store, n Number) {
		if err := s.Put(t.Context(), RefKey("east", n, "node2"), nil); err != nil {
			t.Fatal(err)
		}
	})
}

func TestReconcileTakesTheStoresNumber(t *testing.T) {
	t.Run("the labels have another", func(t *testing.T) {
		_, open := memory(t)
		store := open()
		a := allocator(store, "node1")
		put(t, store, Compose(1, 300), app("shop"))
		must[Number](t)(a.Adopt(t.Context(), app("shop"), Compose(1, 400)))
		reconciled(t, a, Renumbered{app("shop"), Compose(1, 400), Compose(1, 300)})
		reconciled(t, a)
		stored(t, store, RefKey("east", Compose(1, 300), "node1"), true)
		if n := must[Number](t)(a.Allocate(t.Context(), app("shop"))); n != Compose(1, 300) {
			t.Errorf("new endpoints get %d", n)
		}
	})
	t.Run("the number has other labels", func(t *testing.T) {
		_, open := memory(t)
		store := open()
		a := allocator(store, "node1")
		put(t, store, Compose(1, 400), app("cart"))
		must[Number](t)(a.Adopt(t.Context(), app("shop"), Compose(1, 400)))
		reconciled(t, a, Renumbered{app("shop"), Compose(1, 400), a.registry.first(app("shop"))})
		stored(t, store, RefKey("east", Compose(1, 400), "node1"), false)
	})
}

func TestReconcileDropsTheFormerReference(t *testing.T) {
	_, open := memory(t)
	store := open()
	a := allocator(store, "node1")
	n := must[Number](t)(a.Allocate(t.Context(), app("shop")))
	for _, key := range []string{LabelsKey("east", app("shop")), IdentityKey("east", n)} { // somebody's hand
		if err := store.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	put(t, store, Compose(1, 300), app("shop"))
	reconciled(t, a, Renumbered{app("shop"), n, Compose(1, 300)})
	stored(t, store, RefKey("east", n, "node1"), false)
}

// TestStoreLosesEverything: nodes go on with their numbers, and the store has them again.
func TestStoreLosesEverything(t *testing.T) {
	m, open := memory(t)
	var nodes []*Allocator
	var before []Number
	for i := range 3 {
		nodes = append(nodes, allocator(open(), fmt.Sprintf("node%d", i)))
		before = append(before, must[Number](t)(nodes[i].Allocate(t.Context(), app("shop"))))
	}
	put(t, m, nodes[0].registry.first(app("cart")), app("mail")) // so that cart has not its first number
	cart := must[Number](t)(nodes[1].Allocate(t.Context(), app("cart")))
	m.Wipe()
	for _, a := range nodes {
		reconciled(t, a)
	}
	for i, a := range nodes {
		if n := must[Number](t)(a.Allocate(t.Context(), app("shop"))); n != before[i] {
			t.Errorf("node%d has %d, had %d", i, n, before[i])
		}
	}
	stored(t, m, IdentityKey("east", before[0]), true)
	stored(t, m, IdentityKey("east", cart), true)
	stored(t, m, LabelsKey("east", app("cart")), true)
}

func TestReferencesComeBackWithTheLease(t *testing.T) {
	m, open := memory(t)
	a := allocator(open(), "node1")
	n := must[Number](t)(a.Allocate(t.Context(), app("shop")))
	if err := m.Delete(t.Context(), RefKey("east", n, "node1")); err != nil {
		t.Fatal(err)
	}
	reconciled(t, a)
	stored(t, m, RefKey("east", n, "node1"), true)
}

func TestReleaseWithoutTheStoreIsMadeUpFor(t *testing.T) {
	m, open := memory(t)
	client := m.Client()
	defer client.Close()
	a := allocator(client, "node1")
	must[Number](t)(a.Allocate(t.Context(), app("shop")))
	client.Disconnect()
	if err := a.Release(t.Context(), app("shop")); !errors.Is(err, kvstore.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	client.Reconnect()
	reconciled(t, a)
	if left := keys(t, open()); len(left) != 0 {
		t.Errorf("left are %v", left)
	}
	if len(a.uses) != 0 {
		t.Errorf("remembers %v", a.uses)
	}
}

func TestReleasedAndTakenUpAgainWithoutTheStore(t *testing.T) {
	m, _ := memory(t)
	client := m.Client()
	defer client.Close()
	a := allocator(client, "node1")
	n := must[Number](t)(a.Allocate(t.Context(), app("shop")))
	client.Disconnect()
	if err := a.Release(t.Context(), app("shop")); err == nil {
		t.Error("released without the store")
	}
	if again := must[Number](t)(a.Adopt(t.Context(), app("shop"), n)); again != n {
		t.Errorf("adopted as %d", again)
	}
	client.Reconnect()
	reconciled(t, a)
	stored(t, m, RefKey("east", n, "node1"), true)
}

// forgetful does a transaction and then says that it could not reach the store.
type forgetful struct{ kvstore.Store }

func (f forgetful) Txn(ctx context.Context, conds []kvstore.Condition, ops []kvstore.Op) error {
	return errors.Join(f.Store.Txn(ctx, conds, ops), kvstore.ErrUnavailable)
}

func TestAnAllocationWithoutAnswerIsGivenBack(t *testing.T) {
	for _, existing := range []bool{false, true} {
		_, open := memory(t)
		store := open()
		if existing {
			put(t, store, Compose(1, 300), app("shop"))
		}
		a := allocator(forgetful{store}, "node1")
		if _, err := a.Allocate(t.Context(), app("shop")); !errors.Is(err, kvstore.ErrUnavailable) {
			t.Fatal(err)
		}
		a.registry.store = store
		reconciled(t, a)
		for _, key := range keys(t, store) {
			if !existing || key == "refs/65836/node1" {
				t.Errorf("left is %s", key)
			}
		}
	}
}

func TestSweep(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		store, ctx := open(), t.Context()
		a, dead := allocator(store, "node1"), allocator(open(), "dead")
		used := must[Number](t)(a.Allocate(ctx, app("used")))
		left := must[Number](t)(dead.Allocate(ctx, app("left")))
		back := must[Number](t)(dead.Allocate(ctx, app("back")))
		for _, n := range []Number{left, back} {
			if err := store.Delete(ctx, RefKey("east", n, "dead")); err != nil { // as its lease's end does
				t.Fatal(err)
			}
		}
		if got := must[int](t)(a.Sweep(ctx)); got != 0 {
			t.Errorf("the first pass collects %d", got)
		}
		if n := must[Number](t)(a.Allocate(ctx, app("back"))); n != back {
			t.Errorf("used again as %d", n)
		}
		if got := must[int](t)(a.Sweep(ctx)); got != 1 {
			t.Errorf("the second pass collects %d", got)
		}
		stored(t, store, IdentityKey("east", left), false)
		stored(t, store, LabelsKey("east", app("left")), false)
		for _, n := range []Number{used, back} {
			stored(t, store, IdentityKey("east", n), true)
		}
		if got := must[int](t)(a.Sweep(ctx)); got != 0 {
			t.Errorf("the third pass collects %d", got)
		}
	})
}

// TestSweepLeavesWhatIsUsedMeanwhile: a node may take up an orphan after the sweep has listed it.
func TestSweepLeavesWhatIsUsedMeanwhile(t *testing.T) {
	onEachStore(t, func(t *testing.T, open opener) {
		store, ctx := open(), t.Context()
		a := allocator(store, "node1")
		n := must[Number](t)(a.Allocate(ctx, app("shop")))
		if found := must[[]orphan](t)(a.registry.orphans(ctx)); len(found) != 0 {
			t.Errorf("orphans with a reference: %+v", found)
		}
		if err := a.registry.unref(ctx, n); err != nil {
			t.Fatal(err)
		}
		found := must[[]orphan](t)(a.registry.orphans(ctx))
		if len(found) != 1 || found[0].Number != n {
			t.Fatalf("orphans %+v, want %d", found, n)
		}
		must[Number](t)(allocator(open(), "node2").Allocate(ctx, app("shop")))
		if removed := must[bool](t)(a.registry.remove(ctx, found[0])); removed {
			t.Error("removed what node2 uses")
		}
		stored(t, store, IdentityKey("east", n), true)
	})
}

// TestSweepLeavesTheLabelsOfAnother: an ids/ key that no labels/ key leads to goes alone.
func TestSweepLeavesTheLabelsOfAnother(t *testing.T) {
	_, open := memory(t)
	store := open()
	a := allocator(store, "node1")
	n := must[Number](t)(a.Allocate(t.Context(), app("shop")))
	stray := Identity{Cluster: "east", Number: Compose(1, 300), Labels: app("shop")}
	if err := store.Put(t.Context(), IdentityKey("east", stray.Number), EncodeIdentity(stray)); err != nil {
		t.Fatal(err)
	}
	must[int](t)(a.Sweep(t.Context()))
	if got := must[int](t)(a.Sweep(t.Context())); got != 1 {
		t.Errorf("collected %d", got)
	}
	stored(t, store, IdentityKey("east", stray.Number), false)
	stored(t, store, IdentityKey("east", n), true)
	stored(t, store, LabelsKey("east", app("shop")), true)
}
