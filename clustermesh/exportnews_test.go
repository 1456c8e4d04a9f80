package clustermesh

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// publishing has an agent that publishes one service with two slices.
func publishing(t *testing.T, store kvstore.Store) *kube {
	t.Helper()
	k := newKube(t, "node1", store).start()
	k.apply(shop(true, true), shopPod(1, 5, "shop-a"), shopPod(1, 6, "shop-b"))
	close(k.synced)
	soon()
	return k
}

// heard returns what gossip was told since the last call, as KEY: ADDRESSES.
func (k *kube) heard() (said []string, last identity.Version) {
	for {
		select {
		case n := <-k.told:
			what := "gone"
			if !n.Withdrawn {
				if err := n.check(); err != nil || n.Node != k.exporter.Node {
					k.t.Errorf("news %+v: %v", n, err)
				}
				what = describeEntry(k.t, kvstore.Entry{Key: n.Key, Value: n.Value})
			}
			if !n.Newer(last) {
				k.t.Errorf("%s is told with version %v after %v", n.Key, n.Version, last)
			}
			said, last = append(said, n.Key+": "+what), n.Version
		default:
			slices.Sort(said)
			return said, last
		}
	}
}

func (k *kube) wantHeard(when string, want ...string) (last identity.Version) {
	k.t.Helper()
	said, last := k.heard()
	if !slices.Equal(said, want) {
		k.t.Errorf("%s gossip was told %q, want %q", when, said, want)
	}
	return last
}

// TestGossipIsToldWhileTheStoreIsAway: what changes, once, and the store gets a newer version of it when it is back.
func TestGossipIsToldWhileTheStoreIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		client := store.Client()
		k := publishing(t, client)
		before := sliceIn(t, store, sliceTwo)
		k.wantHeard("while the store is there")
		client.Disconnect()
		k.apply(shopPod(2, 7, "shop-a"))
		soon()
		told := k.wantHeard("of a new backend", sliceOne+": 10.1.1.5@node1 10.1.2.7@node2")
		if told.Incarnation != before.Incarnation || k.exporter.Settled(sliceOne) || !k.exporter.Settled(sliceTwo) {
			t.Errorf("told in the term %d, stored in %d; settled %v, %v", told.Incarnation, before.Incarnation, k.exporter.Settled(sliceOne), k.exporter.Settled(sliceTwo))
		}
		k.apply(without[lb.Backend]{shopPod(1, 6, "")})
		soon()
		k.wantHeard("of a slice's last backend, which is gone", sliceTwo+": gone")
		k.apply(without[lb.Backend]{shopPod(2, 7, "")})
		soon()
		told = k.wantHeard("when it is as it was", sliceOne+": 10.1.1.5@node1")
		soon()
		k.wantHeard("when nothing changes")

		client.Reconnect()
		soon()
		wantPublished(t, store, "when the store is back", map[string]string{shopKey: "service", sliceOne: "10.1.1.5@node1"})
		if s := sliceIn(t, store, sliceOne); !(identity.Version{Incarnation: s.Incarnation, Sequence: s.Sequence}).Newer(told) {
			t.Errorf("the store has version %d.%d, and gossip has %v: the store would be taken to be behind", s.Incarnation, s.Sequence, told)
		}
		if !k.exporter.Settled(sliceOne) || !k.exporter.Settled(sliceTwo) {
			t.Error("the store has it all, and gossip keeps it")
		}
	})
}

// uncertain is a store whose held keys can be lost as when it was away for longer than their leases.
type uncertain struct {
	kvstore.Store
	lost chan struct{}
}

func (u *uncertain) Hold(ctx context.Context, key string, value []byte, ttl time.Duration) (*kvstore.Held, error) {
	held, err := u.Store.Hold(ctx, key, value, ttl)
	if err == nil {
		u.lost = make(chan struct{})
		held.Lost = u.lost
	}
	return held, err
}

// TestGossipIsToldForAsLongAsTheStoreIsAway: also when the leader's lease has ended, since nobody else can be elected. When the store is back somebody is.
func TestGossipIsToldForAsLongAsTheStoreIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		client := store.Client()
		u := &uncertain{Store: client}
		k := publishing(t, u)
		before := sliceIn(t, store, sliceOne)
		client.Disconnect()
		soon()
		close(u.lost)
		soon()
		k.apply(shopPod(2, 7, "shop-a"))
		soon()
		told := k.wantHeard("of a new backend", sliceOne+": 10.1.1.5@node1 10.1.2.7@node2")
		store.ExpireLeases()
		client.Reconnect()
		soon()
		soon()
		after := sliceIn(t, store, sliceOne)
		if len(after.Backends) != 2 || after.Incarnation <= before.Incarnation || !(identity.Version{Incarnation: after.Incarnation, Sequence: after.Sequence}).Newer(told) {
			t.Errorf("the store has %+v, gossip %v", after, told)
		}
		if state := k.exporter.State(); !state.Self || state.LastError != "" {
			t.Errorf("state %+v", state)
		}
	})
}

// TestAnotherAgentsNewsAreOverwritten: one that was cut off from the store while it published has told gossip something, and others would go on believing it.
func TestAnotherAgentsNewsAreOverwritten(t *testing.T) {
	for name, heardFirst := range map[string]bool{"while this agent publishes": false, "before this agent was elected": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := newEast(t)
				// What the other one has published in the store is as it should be, and need not be written again.
				if err := store.Put(t.Context(), sliceOne, inTermOne(5, shopPod(1, 5, "shop-a"))); err != nil {
					t.Fatal(err)
				}
				if heardFirst {
					hung := leadership{Node: "node2", Term: 1}
					held, err := store.Hold(t.Context(), leaderKey, hung.encode(), leaderTTL)
					if err != nil {
						t.Fatal(err)
					}
					time.AfterFunc(time.Minute, func() { _ = held.Release(context.Background()) })
				}
				k := newKube(t, "node1", store.Client()).start()
				k.apply(shop(true, true), shopPod(1, 5, "shop-a"))
				close(k.synced)
				soon()
				n := News{Node: "node2", Key: sliceOne, Version: identity.Version{Incarnation: 1, Sequence: 99}, Value: inTermOne(99, shopPod(1, 5, "shop-a"), shopPod(2, 66, "shop-a"))}
				k.follower.Offer(n)
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				s := sliceIn(t, store, sliceOne)
				if len(s.Backends) != 1 || !(identity.Version{Incarnation: s.Incarnation, Sequence: s.Sequence}).Newer(n.Version) {
					t.Errorf("the store has %+v, and gossip says %v", s, n.Version)
				}
				if !k.exporter.Settled(sliceOne) {
					t.Error("it still counts as news")
				}
			})
		})
	}
}

func inTermOne(sequence uint64, backends ...lb.Backend) []byte {
	s, err := lb.ClusterSlice(backends)
	if err != nil {
		panic(err)
	}
	s.Incarnation, s.Sequence = 1, sequence
	return lb.EncodeSlice(s)
}

// TestServicesAreNotTold: gossip carries slices, and the store has services when it is back.
func TestServicesAreNotTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newEast(t)
		client := store.Client()
		k := publishing(t, client)
		client.Disconnect()
		cart := shop(true, true)
		cart.Name.Name = "cart"
		k.apply(cart)
		soon()
		k.wantHeard("of a new service")
		client.Reconnect()
		soon()
		if _, ok := exportedIn(t, store)[strings.Replace(shopKey, "shop", "cart", 1)]; !ok {
			t.Error("the new service is not in the store")
		}
	})
}
