package gossip

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func east(t *testing.T) *mesh {
	m := newMesh(t)
	for _, name := range []string{"east/n1", "east/n2", "east/n3"} {
		m.add(name)
	}
	m.start()
	return m
}

// haveRing waits until all nodes that run have these keys and none else, here and in their files.
func (m *mesh) haveRing(keys [][]byte) {
	m.Helper()
	m.eventually("the ring", func() string {
		for name, n := range m.nodes {
			file, err := keyFile(n.KeyFile).read()
			if r := n.Ring(); n.stop != nil && (!equalKeys(r.Keys, keys) || err != nil || !equalKeys(file.Keys, keys) || file.At != r.At) {
				return fmt.Sprintf("%s has %v of %d, in the file %v of %d (%v), want %v", name, fingerprints(r.Keys), r.At, fingerprints(file.Keys), file.At, err, fingerprints(keys))
			}
		}
		return ""
	})
}

// TestFirstKey: a node without a key file makes one, and keeps it.
func TestFirstKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gossip.keys")
	ring, err := keyFile(path).readOrMake()
	if err != nil || ring.At != 0 || len(ring.Keys) != 1 {
		t.Fatalf("%d keys of %d, %v", len(ring.Keys), ring.At, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	again, err := keyFile(path).readOrMake()
	if err != nil || !equalKeys(again.Keys, ring.Keys) {
		t.Errorf("another one: %v", err)
	}
	if _, err := keyFile(filepath.Join(t.TempDir(), "no", "keys")).readOrMake(); err == nil || !strings.Contains(err.Error(), "gossip.keyFile") {
		t.Errorf("%v", err)
	}
}

// TestRing: everybody has the time of the last change, also after a restart, and only who made it tells of it.
func TestRing(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := east(t)
		n := m.nodes["east/n1"]
		if r := n.Ring(); r.At != 0 || !equalKeys(r.Keys, [][]byte{m.key}) {
			t.Errorf("at first: %d keys of %d", len(r.Keys), r.At)
		}
		next := NewKey()
		if err := n.AddKey(next); err != nil {
			t.Fatal(err)
		}
		m.haveRing([][]byte{m.key, next})
		at := n.Ring().At
		for name, other := range m.nodes {
			if other.Ring().At != at || at == 0 || (len(other.rings) == 1) != (name == "east/n1") {
				t.Errorf("%s: of %d, not %d; told of %d", name, other.Ring().At, at, len(other.rings))
			}
		}
		n.Ring().Keys[0][0]++ // is a copy
		m.killAgent("east/n2")
		m.restart("east/n2")
		if r := m.nodes["east/n2"].Ring(); r.At != at {
			t.Errorf("after a restart: of %d, not %d", r.At, at)
		}
		if err := n.LearnRing(Ring{At: at, Keys: [][]byte{NewKey()}}); err != nil || len(n.Ring().Keys) != 2 {
			t.Errorf("an old ring was taken over: %v", err)
		}
		if err := n.LearnRing(Ring{At: at + 1}); err == nil || len(n.Ring().Keys) != 2 {
			t.Errorf("a ring without keys was taken over: %v", err)
		}
		if err := n.LearnRing(Ring{At: 1 << 63, Keys: [][]byte{next}}); err == nil {
			t.Error("a ring that could never be changed again was taken over")
		}
	})
}

// TestLearnRing: a node that was away while keys were changed is in the pool again once it has the ring.
func TestLearnRing(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := east(t)
		away := m.nodes["east/n3"]
		away.end()
		m.all("east/n3", "agent-down", "east/n3")
		fresh := NewKey()
		n := m.nodes["east/n1"]
		if err := n.AdoptRing(t.Context(), [][]byte{fresh}); err != nil {
			t.Fatal(err)
		}
		m.restart("east/n3")
		time.Sleep(5 * time.Second)
		if len(m.nodes["east/n3"].Overview().Pools[0].Members) != 1 {
			t.Fatal("it is in the pool with an old key")
		}
		if err := away.LearnRing(n.Ring()); err != nil {
			t.Fatal(err)
		}
		m.haveRing([][]byte{fresh})
		m.all("east/n3", "alive")
		if len(away.rings) != 0 {
			t.Error("it said that it changed the ring itself")
		}
	})
}

// TestOldRingByGossip: what another node has kept of an earlier change undoes nothing.
func TestOldRingByGossip(t *testing.T) {
	m := newMesh(t)
	g, other := m.add("east/n1").Gossip, m.add("east/n2").Gossip
	g.SetNodes(m.rows())
	now, old, next := NewKey(), NewKey(), NewKey()
	if err := g.LearnRing(Ring{At: 100, Keys: [][]byte{now}}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		at   uint64
		key  []byte
		want []byte
	}{{50, old, now}, {100, old, now}, {101, next, next}} {
		d := Delta{Cluster: "east", Node: "n2", Key: kindKeyring, Incarnation: c.at, Value: encode([][]byte{c.key})}
		d.sign(other.SigningKey)
		g.mu.Lock()
		g.receive(d, clusterPool, time.Now())
		g.mu.Unlock()
		if !equalKeys(g.Ring().Keys, [][]byte{c.want}) {
			t.Errorf("a ring of %d: %v", c.at, fingerprints(g.Ring().Keys))
		}
	}
}

// TestAdoptRing: a cluster changes to another mesh's keys soon, and nobody misses anybody meanwhile.
func TestAdoptRing(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := east(t)
		n := m.nodes["east/n2"]
		theirs := [][]byte{NewKey(), NewKey()}
		began := time.Now()
		if err := n.AdoptRing(t.Context(), theirs); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		t.Logf("took %v", took)
		if took > 300*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		m.haveRing(theirs)
		time.Sleep(5 * time.Second)
		m.quiet()
		if len(n.rings) != 3 || len(m.nodes["east/n1"].rings) != 0 || n.rings[2].At != n.Ring().At {
			t.Errorf("told of %d changes, the others of %d", len(n.rings), len(m.nodes["east/n1"].rings))
		}
		if err := n.AdoptRing(t.Context(), theirs); err != nil || len(n.rings) != 3 {
			t.Errorf("again: %v, told of %d changes", err, len(n.rings))
		}
		if err := n.AdoptRing(t.Context(), nil); err == nil {
			t.Error("no keys were taken over")
		}
	})
}

// TestAdoptRingWithoutANode: one that is down does not stop it; one that has just died only until it is missed.
func TestAdoptRingWithoutANode(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := east(t)
		m.killNode("east/n3")
		theirs := [][]byte{NewKey()}
		began := time.Now()
		if err := m.nodes["east/n1"].AdoptRing(t.Context(), theirs); err != nil {
			t.Fatal(err)
		}
		t.Logf("took %v", time.Since(began))
		m.haveRing(theirs)
	})
}

// TestAdoptRingFails: the own keys stay in use, whenever it is that time runs out.
func TestAdoptRingFails(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := east(t)
		n := m.nodes["east/n1"]
		theirs := NewKey()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		err := n.AdoptRing(ctx, [][]byte{theirs})
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "node east/n") || !strings.Contains(err.Error(), "have the new keys") {
			t.Errorf("%v", err)
		}
		m.haveRing([][]byte{m.key})

		second, stop := context.WithCancel(t.Context())
		defer stop()
		n.onRing = func(r Ring) {
			if equalKeys(r.Keys, [][]byte{theirs, m.key}) {
				stop()
			}
		}
		err = n.AdoptRing(second, [][]byte{theirs})
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "encrypt with the new key") {
			t.Errorf("%v", err)
		}
		m.haveRing([][]byte{m.key, theirs})
		n.onRing = nil
		if err := n.AdoptRing(t.Context(), [][]byte{theirs}); err != nil {
			t.Fatal(err)
		}
		m.haveRing([][]byte{theirs})
		m.quiet()
		if slices.ContainsFunc(n.rings, func(r Ring) bool { return len(r.Keys) == 0 }) {
			t.Error("an empty ring was told of")
		}
	})
}
