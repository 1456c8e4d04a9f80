package agent

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"causeway/agent/api"
	"causeway/identity"
	"causeway/kvstore"
)

// slow is a store that, like etcd's, lets a request wait until its context ends while it is away.
type slow struct{ *kvstore.Memory }

func (s slow) wait(ctx context.Context) {
	if !s.Status().Connected {
		<-ctx.Done()
	}
}

func (s slow) Get(ctx context.Context, key string) (kvstore.Entry, error) {
	s.wait(ctx)
	return s.Memory.Get(ctx, key)
}

func newTestEndpoints(t *testing.T, store kvstore.Store) *endpoints {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	cfg := Config{Cluster: ClusterConfig{Name: "east", ID: 1}, Node: NodeConfig{Name: "node1", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}}, StateDir: t.TempDir()}
	return newEndpoints(newTables(t), identity.NewAllocator(store, "east", 1, "node1", log), cfg, 1400, log)
}

// used lists the references to identities in the store.
func used(t *testing.T, store kvstore.Store) int {
	t.Helper()
	entries, err := store.List(context.Background(), identity.IdentitiesPrefix("east")+"refs/")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestAFailedAddGivesItsIdentityBack(t *testing.T) {
	store := kvstore.NewMemory()
	e := newTestEndpoints(t, store)
	_, err := e.Add(context.Background(), api.EndpointRequest{Name: "a", NetNS: "/run/netns/that-does-not-exist"})
	if err == nil || httpStatus(err) != http.StatusBadRequest {
		t.Errorf("a network namespace that does not exist: %v, want a bad request", err)
	}
	if n := used(t, store); n != 0 {
		t.Errorf("%d identities are in use without an endpoint", n)
	}
}

func TestWhoAskedMayBeGoneWhenAnEndpointIsDeleted(t *testing.T) {
	store := kvstore.NewMemory()
	for range 20 {
		e := newTestEndpoints(t, store)
		ep := identity.Endpoint{Namespace: "default", Name: "a", Labels: identity.Labels{"app": "a"}, Address: netip.MustParseAddr("10.1.1.5"), HostLink: "cwnone"}
		if _, err := e.identity.Allocate(context.Background(), ep.Labels); err != nil {
			t.Fatal(err)
		}
		e.byID[ep.ID()] = ep
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := e.Delete(ctx, ep.ID()); err != nil {
			t.Fatal(err)
		}
		if n := used(t, store); n != 0 {
			t.Fatalf("%d identities are in use without an endpoint", n)
		}
	}
}

func TestKnownLabelsNeedNoStore(t *testing.T) {
	for range 8 { // it was a matter of luck
		store := slow{kvstore.NewMemory()}
		e := newTestEndpoints(t, store)
		labels := identity.Labels{"app": "a"}
		put(t, e.tables, e.tables.Identities, identity.Identity{Cluster: "east", Number: identity.Compose(1, 300), Labels: labels})
		store.Disconnect()
		identityPatience(t, 20*time.Millisecond)
		if n, err := e.allocate(context.Background(), labels); err != nil || n != identity.Compose(1, 300) {
			t.Fatalf("the identity of labels that are known is %d (%v)", n, err)
		}
	}
}

func identityPatience(t *testing.T, d time.Duration) {
	before := identityTimeout
	identityTimeout = d
	t.Cleanup(func() { identityTimeout = before })
}

func TestWhatAnAddInVainMadeIsTakenBack(t *testing.T) {
	store := kvstore.NewMemory()
	e := newTestEndpoints(t, store)
	ep := identity.Endpoint{Namespace: "default", Name: "a", Labels: identity.Labels{"app": "a"}, Address: netip.MustParseAddr("10.1.1.5"), HostLink: "cwnone", Created: time.Now()}
	if _, err := e.identity.Allocate(context.Background(), ep.Labels); err != nil {
		t.Fatal(err)
	}
	later := ep
	later.Address = netip.MustParseAddr("10.1.1.6")
	e.byID[ep.ID()] = later
	if err := e.undo(context.Background(), ep); err != nil || len(e.byID) != 1 {
		t.Fatalf("an endpoint that came later was taken back (%v)", err)
	}
	e.byID[ep.ID()] = ep
	if err := e.undo(context.Background(), ep); err != nil || len(e.byID) != 0 || used(t, store) != 0 {
		t.Errorf("%d endpoints and %d identities remain (%v)", len(e.byID), used(t, store), err)
	}
}

func TestTheIncarnationGrowsWhateverTheClockDoes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "incarnation")
	now := time.Now()
	first, err := nextIncarnation(file, now)
	if err != nil || first != uint64(now.UnixNano()) {
		t.Fatalf("the first one is %d (%v)", first, err)
	}
	second, err := nextIncarnation(file, now.Add(-time.Hour))
	if err != nil || second <= first {
		t.Errorf("after the clock went back it is %d (%v), which is not more than %d", second, err, first)
	}
}

func TestAnEmptyInstanceFileIsNoInstance(t *testing.T) {
	file := filepath.Join(t.TempDir(), "instance")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if instance, err := loadInstance(file); err != nil || instance == "" {
		t.Errorf("instance %q, error %v", instance, err)
	}
}
