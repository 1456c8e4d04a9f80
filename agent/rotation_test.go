package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/identity"
)

// keyLife is one life of an agent, as far as keys are concerned: the tunnels table with its reconciler, and what changes the key. WireGuard
// outlives it.
type keyLife struct {
	t         *testing.T
	tables    *clustermesh.Tables
	enc       *encryption
	published [][]uint8 // the slots of the keys, each time
	noStore   atomic.Bool
	stop      func()
}

// startLife starts one with nodes as neighbours, and waits until nothing moves any more.
func startLife(t *testing.T, wg *fakeWireGuard, every time.Duration, nodes ...identity.Node) *keyLife {
	l := &keyLife{t: t, tables: newTables(t)}
	l.enc = newTestEncryption(l.tables, wg)
	l.enc.every = every
	l.enc.publish = func(_ context.Context, keys []identity.TunnelKey) { l.published = append(l.published, slotsOf(keys)) }
	l.enc.published = func() bool { return !l.noStore.Load() }
	l.enc.Open(t.Context())
	r := newReconciler("tunnels", l.tables, l.tables.Tunnels, l.enc, func(identity.ClusterID) bool { return true }, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 3)
	for _, task := range []func(context.Context) error{newTunnels(l.tables, l.enc).Run, r.Run, l.enc.Run} {
		go func() { done <- task(ctx) }()
	}
	l.stop = func() {
		cancel()
		for range cap(done) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	put(t, l.tables, l.tables.Nodes, nodes...)
	synctest.Wait()
	return l
}

func (l *keyLife) rotate() (identity.TunnelKey, bool) {
	l.t.Helper()
	key, joined, err := l.enc.rotate(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	synctest.Wait()
	return key, joined
}

func (l *keyLife) status() (*api.Rotation, []string) {
	_, rotator, _ := l.enc.current()
	rotation, _, problems := rotator.status()
	return rotation, problems
}

// uses returns the slot that this node sends to a node from.
func (l *keyLife) uses(node identity.NodeName) uint8 {
	row := tunnelRow(l.tables.DB.ReadTxn(), l.tables, node.String())
	return uint8(slices.Index([]string{"10.1.1.2", "10.1.1.3"}, row.Local.String()))
}

// after lets time pass.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

var (
	west1, west2 = identity.NodeName{Cluster: "west", Node: "node1"}, identity.NodeName{Cluster: "west", Node: "node2"}
	oldPair      = pair{0, 0}
	newPair      = pair{1, 0}
)

func TestAKeyChangesWithoutLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wg := newFakeWireGuard(0)
		wg.shake(west1, true, oldPair)
		wg.shake(west2, true, oldPair)
		l := startLife(t, wg, 0, tunnelNode("west", 1, 0), tunnelNode("west", 2, 0))
		defer l.stop()
		key, joined := l.rotate()
		if key.Slot != 1 || joined || !slices.Equal(l.published[len(l.published)-1], []uint8{0, 1}) {
			t.Fatalf("the new key is %+v (joined %v), published were %v", key, joined, l.published)
		}
		if again, joined := l.rotate(); again != key || !joined || len(wg.done()) != 1 {
			t.Errorf("a second change did not join the first: %v %v %v", again, joined, wg.done())
		}
		wg.shake(west1, true, newPair)
		after(10 * time.Second)
		if l.uses(west1) != 1 || l.uses(west2) != 0 {
			t.Errorf("of the two only the one with a session may have moved: %d %d", l.uses(west1), l.uses(west2))
		}
		rotation, _ := l.status()
		if rotation == nil || rotation.Step != stepMoving || len(rotation.Waiting) != 1 || rotation.Waiting[0].Node != "node2" ||
			time.Since(rotation.Waiting[0].Since) < 10*time.Second || !slices.Equal(wg.done(), []string{"begin"}) {
			t.Fatalf("it does not wait for west/node2 alone: %+v, done %v", rotation, wg.done())
		}
		wg.shake(west2, true, newPair)
		after(time.Second)
		if l.uses(west2) != 1 || !slices.Equal(l.published[len(l.published)-1], []uint8{1, 0}) {
			t.Fatalf("all have a session by the new key, and published were %v", l.published)
		}
		for range 10 { // some still send by the old key
			wg.receive(0, 100)
			after(time.Second)
		}
		if !slices.Equal(wg.done(), []string{"begin", "prefer"}) {
			t.Fatalf("the old key ended while packets came in by it: %v", wg.done())
		}
		after(rotationQuiet + 2*rotationLook)
		if !slices.Equal(wg.done(), []string{"begin", "prefer", "end"}) || !slices.Equal(l.published[len(l.published)-1], []uint8{1}) {
			t.Fatalf("done %v, published were %v", wg.done(), l.published)
		}
		if rotation, problems := l.status(); rotation != nil || len(problems) != 0 {
			t.Errorf("after it: %+v %v", rotation, problems)
		}
	})
}

// TestAKeyChangesOverRestarts begins the agent anew at every step.
func TestAKeyChangesOverRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wg := newFakeWireGuard(0)
		wg.shake(west1, true, oldPair)
		nodes := []identity.Node{tunnelNode("west", 1, 0)}
		l := startLife(t, wg, 0, nodes...)
		restart := func(step string, slot uint8, done ...string) {
			t.Helper()
			after(time.Second)
			l.stop()
			l = startLife(t, wg, 0, nodes...)
			after(time.Second)
			if l.uses(west1) != slot || !slices.Equal(wg.done(), done) {
				t.Errorf("%s: sent from slot %d, done %v", step, l.uses(west1), wg.done())
			}
		}
		after(time.Hour) // so that the keys' ages differ
		key, _ := l.rotate()
		restart("begun", 0, "begin")
		if again, joined := l.rotate(); !joined || again != key {
			t.Errorf("after a restart the change was not joined: %v", again)
		}
		wg.shake(west1, true, newPair)
		restart("moved", 1, "begin", "prefer")
		wg.receive(0, 1)
		restart("preferred", 1, "begin", "prefer")
		after(rotationQuiet + 2*rotationLook)
		restart("ended", 1, "begin", "prefer", "end")
		if keys := wg.Keys(); len(keys) != 1 || keys[0] != key {
			t.Errorf("the keys are %v, want %v", keys, key)
		}
		// The next one goes back to the other slot.
		wg.shake(west1, true, oldPair)
		if key, joined := l.rotate(); key.Slot != 0 || joined {
			t.Errorf("the next key is %v", key)
		}
		after(rotationQuiet + 3*time.Second)
		if l.uses(west1) != 0 || len(wg.Keys()) != 1 {
			t.Errorf("the next change did not end: slot %d, keys %v", l.uses(west1), wg.Keys())
		}
		l.stop()
	})
}

// TestAKeyChangesThoughNobodyWasTold has the agent die after each call that changes keys, before it has said so.
func TestAKeyChangesThoughNobodyWasTold(t *testing.T) {
	for _, calls := range [][]string{{"begin"}, {"begin", "prefer"}, {"begin", "prefer", "end"}} {
		synctest.Test(t, func(t *testing.T) {
			wg := newFakeWireGuard(0)
			wg.shake(west1, true, oldPair, newPair)
			time.Sleep(time.Hour)
			for _, call := range calls {
				var err error
				switch call {
				case "begin":
					_, err = wg.Begin(t.Context())
				case "prefer":
					err = wg.Prefer(1)
				case "end":
					err = wg.End(t.Context(), 0)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			l := startLife(t, wg, 0, tunnelNode("west", 1, 0))
			defer l.stop()
			after(rotationQuiet + 3*time.Second)
			if keys := wg.Keys(); len(keys) != 1 || keys[0].Slot != 1 || l.uses(west1) != 1 {
				t.Errorf("after %v: keys %v, sent from slot %d", calls, keys, l.uses(west1))
			}
		})
	}
}

func TestWhoHoldsUpAChangeOfTheKey(t *testing.T) {
	live := func(state identity.LivenessState) identity.Liveness {
		return identity.Liveness{Cluster: "west", Node: "node1", State: state}
	}
	for _, tc := range []struct {
		name    string
		prepare func(*keyLife, *fakeWireGuard)
		done    string // calls after a minute
		waits   string
	}{
		{"a dead node, without any session", func(_ *keyLife, wg *fakeWireGuard) { wg.shake(west1, false, oldPair) }, "begin prefer end", ""},
		{"a dead node, as gossip says", func(l *keyLife, _ *fakeWireGuard) { put(t, l.tables, l.tables.Liveness, live(identity.NodeDead)) }, "begin prefer end", ""},
		{"a live one that gets no session", func(*keyLife, *fakeWireGuard) {}, "begin", "no session by the new key"},
		{"a node whose agent is down", func(l *keyLife, wg *fakeWireGuard) {
			wg.shake(west1, true, newPair)
			put(t, l.tables, l.tables.Liveness, live(identity.NodeAgentDown))
		}, "begin prefer", "its agent is down"},
		{"the store", func(l *keyLife, wg *fakeWireGuard) { wg.shake(west1, true, newPair); l.noStore.Store(true) }, "begin", "store"},
		{"a target that fails", func(_ *keyLife, wg *fakeWireGuard) {
			wg.shake(west1, true, newPair)
			wg.mu.Lock()
			wg.failUpdate = errors.New("no memory")
			wg.mu.Unlock()
		}, "begin", "no memory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				wg := newFakeWireGuard(0)
				wg.shake(west1, true, oldPair)
				l := startLife(t, wg, 0, tunnelNode("west", 1, 0))
				defer l.stop()
				l.rotate()
				tc.prepare(l, wg)
				after(time.Minute)
				if got := strings.Join(wg.done(), " "); got != tc.done {
					t.Errorf("done is %q, want %q", got, tc.done)
				}
				rotation, problems := l.status()
				switch {
				case tc.waits == "" && rotation == nil:
				case tc.waits == "store" && rotation != nil && rotation.Store:
				case rotation != nil && len(rotation.Waiting) == 1 && strings.Contains(rotation.Waiting[0].Why, tc.waits):
				default:
					t.Errorf("it says %+v", rotation)
				}
				if len(problems) != 0 {
					t.Errorf("after a minute that is a problem already: %v", problems)
				}
				after(rotationPatience)
				if _, problems := l.status(); (len(problems) != 0) != (tc.waits != "" && tc.waits != "store") {
					t.Errorf("after %s the problems are %v", rotationPatience, problems)
				}
			})
		})
	}
}

func TestTheKeyChangesWhenItIsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const every = 100 * time.Hour
		wg := newFakeWireGuard(0)
		wg.shake(west1, true, oldPair, newPair)
		l := startLife(t, wg, every, tunnelNode("west", 1, 0))
		after(every * 89 / 100)
		if done := wg.done(); len(done) != 0 {
			t.Errorf("changed after 0.89 of the time: %v", done)
		}
		l.stop() // that the agent begins anew does not put it off
		l = startLife(t, wg, every, tunnelNode("west", 1, 0))
		after(every*22/100 + time.Minute)
		if done := wg.done(); len(done) != 3 {
			t.Errorf("after 1.11 of the time: %v", done)
		}
		l.stop()
	})
}

func TestAFailedChangeIsToldAndTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wg := newFakeWireGuard(0)
		wg.shake(west1, true, oldPair, newPair)
		l := startLife(t, wg, 0, tunnelNode("west", 1, 0))
		defer l.stop()
		wg.failWith(errors.New("the disk is full"))
		if _, _, err := l.enc.rotate(t.Context()); err == nil || !strings.Contains(err.Error(), "the disk is full") {
			t.Errorf("the error is %v", err)
		}
		wg.failWith(nil)
		l.rotate()
		wg.failWith(errors.New("the disk is full"))
		after(time.Minute)
		if _, problems := l.status(); len(problems) != 1 || !strings.Contains(problems[0], "the disk is full") {
			t.Errorf("the problems are %v", problems)
		}
		wg.failWith(nil)
		after(rotationRetry + rotationQuiet + 2*time.Second)
		if keys := wg.Keys(); len(keys) != 1 || keys[0].Slot != 1 {
			t.Errorf("the keys are %v", keys)
		}
	})
}

func TestANodeThatDoesNotEncryptHasNoKeyToChange(t *testing.T) {
	e := newTestEncryption(newTables(t), newFakeWireGuard(0))
	e.mode = identity.EncryptOff
	e.Open(t.Context())
	if _, _, err := e.rotate(t.Context()); !errors.Is(err, errOff) {
		t.Errorf("the error is %v", err)
	}
}
