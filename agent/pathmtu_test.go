package agent

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"causeway/identity"
)

// TestNarrowPathIsMeasuredAtOnce: within 1.2 s of a smaller MTU on the way packets are kept to it, to the byte, at any moment and at any
// distance; and up to full size again soon after it is well.
func TestNarrowPathIsMeasuredAtOnce(t *testing.T) {
	tables := newTables(t)
	put(t, tables, tables.Nodes, westNode(1), westNode(2))
	for _, rtt := range []time.Duration{50 * time.Microsecond, 3 * time.Millisecond, 40 * time.Millisecond, 80 * time.Millisecond} {
		for _, mtu := range []int{576, 577, 1000, 1290, 1388, 1389} {
			synctest.Test(t, func(t *testing.T) {
				path := &fakePath{rtt: rtt}
				ls, l, told := watched(tables, path)
				defer ls.close(l)
				time.Sleep(5*time.Second + rand.N(echoInterval))
				if got, _ := told.take(); len(got) != 0 {
					t.Errorf("nothing has changed, and told was %v", got)
				}
				cut := time.Now()
				path.carry(mtu)
				time.Sleep(2 * time.Second)
				got, at := told.take()
				if !slices.Equal(got, []int{mtu}) || at.Sub(cut) > 1200*time.Millisecond {
					t.Errorf("rtt %s: told was %v, %s after the way was cut to %d bytes", rtt, got, at.Sub(cut), mtu)
				}
				if s := l.snapshot(); s.limit != mtu || s.mtu != mtu || s.before != 1390 || s.silent(time.Now()) {
					t.Errorf("the link is %+v", s)
				}
				healed := time.Now()
				path.carry(1390)
				time.Sleep(8 * time.Second)
				if got, at = told.take(); !slices.Equal(got, []int{0}) || at.Sub(healed) > widenInterval+echoTimeout {
					t.Errorf("told was %v, %s after the way was well again", got, at.Sub(healed))
				}
				if s := l.snapshot(); s.limit != 0 || s.mtu != 1390 || s.before != mtu {
					t.Errorf("the link is %+v", s)
				}
			})
		}
	}
}

// TestPathsChangeAgain: narrower, then a little wider, and gone with the peer.
func TestPathsChangeAgain(t *testing.T) {
	tables := newTables(t)
	put(t, tables, tables.Nodes, westNode(1))
	synctest.Test(t, func(t *testing.T) {
		path := &fakePath{}
		ls, l, told := watched(tables, path)
		for _, step := range []struct{ carries, within int }{{1300, 2}, {1200, 2}, {1350, 45}, {700, 2}} {
			path.carry(step.carries)
			time.Sleep(time.Duration(step.within) * time.Second)
			if got, _ := told.take(); !slices.Equal(got, []int{step.carries}) {
				t.Errorf("the way carries %d, and told was %v", step.carries, got)
			}
		}
		ls.close(l)
		if got, _ := told.take(); !slices.Equal(got, []int{0}) {
			t.Errorf("the peer is gone, and told was %v", got)
		}
	})
}

// TestNarrowFromTheBeginning: the MTU of a peer that is joined by a narrow way is known at once.
func TestNarrowFromTheBeginning(t *testing.T) {
	tables := newTables(t)
	put(t, tables, tables.Nodes, westNode(1))
	synctest.Test(t, func(t *testing.T) {
		path := &fakePath{lose: func(_ netip.Addr, size int) bool { return size > 1100 }}
		ls, l, told := watched(tables, path)
		defer ls.close(l)
		time.Sleep(500 * time.Millisecond)
		if got, _ := told.take(); !slices.Equal(got, []int{1100}) || l.snapshot().mtu != 1100 {
			t.Errorf("told was %v, and the link is %+v", got, l.snapshot())
		}
	})
}

// TestNodesLinksAreTheirOwn: a node of the peer whose own link is smaller says so, and is asked no more than it can take; it narrows nothing for the others.
func TestNodesLinksAreTheirOwn(t *testing.T) {
	tables := newTables(t)
	small := westNode(2)
	small.MTU = 1200
	put(t, tables, tables.Nodes, westNode(1), small)
	synctest.Test(t, func(t *testing.T) {
		path := &fakePath{lose: func(to netip.Addr, size int) bool { return to == small.PodSide() && size > 1200 }}
		ls, l, told := watched(tables, path)
		defer ls.close(l)
		time.Sleep(5 * time.Second)
		if got, _ := told.take(); len(got) != 0 || l.snapshot().mtu != 1390 {
			t.Errorf("told was %v, and the link is %+v", got, l.snapshot())
		}
	})
}

// TestLossIsNoNarrowPath: what is lost by chance, in bursts or while the other side is silent for a moment, is not taken for a smaller MTU.
func TestLossIsNoNarrowPath(t *testing.T) {
	tables := newTables(t)
	put(t, tables, tables.Nodes, westNode(1), westNode(2))
	synctest.Test(t, func(t *testing.T) {
		chance := rand.New(rand.NewPCG(1, 2))
		path := &fakePath{lose: func(netip.Addr, int) bool { return chance.IntN(100) < 5 }}
		ls, l, told := watched(tables, path)
		defer ls.close(l)
		for range 60 { // seconds
			path.carry(0)
			time.Sleep(200 * time.Millisecond)
			path.carry(1390)
			time.Sleep(800 * time.Millisecond)
		}
		if got, _ := told.take(); len(got) != 0 || l.snapshot().mtu != 1390 {
			t.Errorf("told was %v, and the link is %+v", got, l.snapshot())
		}
	})
}

// TestEchoesDoNotGrowWithTheMesh: with many peers each is asked less often.
func TestEchoesDoNotGrowWithTheMesh(t *testing.T) {
	ls := &links{links: map[*link]struct{}{}}
	sent := func() float64 { return float64(len(ls.links)) / ls.interval().Seconds() }
	for range echoPeers {
		ls.links[&link{}] = struct{}{}
	}
	few := sent()
	for range 200 {
		ls.links[&link{}] = struct{}{}
	}
	if many := sent(); many > few*1.01 {
		t.Errorf("%d peers are asked %.0f times a second, %d %.0f times", echoPeers, few, len(ls.links), many)
	}
}

func TestLadder(t *testing.T) {
	for above := 575; above < 1400; above += 7 {
		for most := above + 1; most < 1500; most++ {
			sizes := ladder(above, most)
			descends := slices.IsSortedFunc(sizes, func(a, b int) int { return b - a }) && len(slices.Compact(slices.Clone(sizes))) == len(sizes)
			if sizes[0] != most || sizes[len(sizes)-1] != above+1 || !descends || len(sizes) > ladderSteps+1 {
				t.Fatalf("between %d and %d: %v", above, most, sizes)
			}
		}
	}
}

// TestNarrowedPathIsNews: a peer with a narrow path is connected; the change is news for a while, and a note as long as it stands.
func TestNarrowedPathIsNews(t *testing.T) {
	now := time.Now()
	v := &peerView{life: &life{self: identity.NodeName{Cluster: "east", Node: "node1"}}}
	well := linkState{opened: now.Add(-time.Hour), tried: now, last: now, mtu: 1390}
	narrow := well
	narrow.mtu, narrow.limit, narrow.before = 1250, 1250, 1390
	for _, test := range []struct {
		name  string
		state linkState
		ago   time.Duration
		note  string
		isNew bool
	}{
		{"just now", narrow, time.Second, "kept to 1250 bytes, as larger ones, of up to 1390, do not get through", true},
		{"and IPv6 has to know", narrow, time.Second, "IPv6 needs 1280", true},
		{"long ago", narrow, time.Hour, "kept to 1250 bytes", false},
		{"well again", linkState{opened: well.opened, tried: now, last: now, mtu: 1390, before: 1250}, time.Minute, "packets of full size, 1390 bytes, get through again", true},
		{"well again long ago", linkState{opened: well.opened, tried: now, last: now, mtu: 1390, before: 1250}, time.Hour, "", false},
	} {
		test.state.changed = now.Add(-test.ago)
		path := v.out(&channel{cluster: "west", link: &link{links: &links{mtu: 1390}, state: test.state}}, true)
		if !path.OK || path.Problem != "" || path.NoteIsNew != test.isNew || path.Narrowed != (test.state.limit > 0) || path.MTU != test.state.mtu {
			t.Errorf("%s: %+v", test.name, path)
		}
		if !strings.Contains(path.Note, test.note) || test.note == "" && path.Note != "" {
			t.Errorf("%s: %q, want %q", test.name, path.Note, test.note)
		}
	}
}
