package testbed

import (
	"testing"
)

// An underlay of IPv6 alone has the same faults as one of IPv4, and comes back from them.
func TestIPv6Underlay(t *testing.T) {
	b := mustUp(t, Options{Underlay: UnderlayIPv6})
	ctx := t.Context()
	wantReach := func(from, to string, want bool) {
		t.Helper()
		if got := reaches(t, b, from, to, want); got != want {
			t.Errorf("%s reaches %s: %v, want %v", from, to, got, want)
		}
	}
	for _, at := range []string{"east/node1", "west/node2", "east/kvstore"} {
		for _, to := range []string{"fd00:172:29:1::11", "fd00:172:29:2::12", "fd00:172:29:1::2", "fd00:172:29:2::2"} {
			wantReach(at, to, true)
		}
	}
	if st, err := b.Status(ctx); err != nil || !st.OK || st.UnderlayFamily != UnderlayIPv6 {
		t.Errorf("status %+v, %v", st, err)
	}

	t.Run("partition", func(t *testing.T) {
		if err := b.Partition(ctx, Partition{A: "east", B: "west", Loss: 100}); err != nil {
			t.Fatal(err)
		}
		wantReach("east/node1", "fd00:172:29:2::11", false)
		wantReach("west/node1", "fd00:172:29:1::2", false)
		wantReach("east/node1", "fd00:172:29:1::12", true)
		if err := b.HealAll(ctx); err != nil {
			t.Fatal(err)
		}
		if err := b.Partition(ctx, Partition{A: "east/node1", B: "west/node1", OneWay: true, Port: Port{"TCP", 2379}, Loss: 100}); err != nil {
			t.Fatal(err)
		}
		wantReach("east/node1", "fd00:172:29:2::11", false)
		wantReach("east/node2", "fd00:172:29:2::11", true)
		if err := b.HealAll(ctx); err != nil {
			t.Fatal(err)
		}
		wantReach("east/node1", "fd00:172:29:2::11", true)
	})
	t.Run("loss everywhere", func(t *testing.T) {
		if err := b.LoseEverywhere(ctx, 100); err != nil {
			t.Fatal(err)
		}
		wantReach("east/node1", "fd00:172:29:1::12", false)
		if err := b.HealAll(ctx); err != nil {
			t.Fatal(err)
		}
		wantReach("east/node1", "fd00:172:29:1::12", true)
	})
	t.Run("path MTU", func(t *testing.T) {
		if err := b.SetMTU(ctx, "east", "west", 1400); err != nil {
			t.Fatal(err)
		}
		for size, want := range map[int]bool{1400: true, 1401: false} {
			if got := passes(t, b, "east/node1", "fd00:172:29:2::11", size); got != want {
				t.Errorf("%d bytes pass: %v, want %v", size, got, want)
			}
		}
		if err := b.HealAll(ctx); err != nil {
			t.Fatal(err)
		}
		if !passes(t, b, "east/node1", "fd00:172:29:2::11", 1500) {
			t.Error("1500 bytes do not pass after healing")
		}
	})
	t.Run("a node dies and returns", func(t *testing.T) {
		node := Victim{Kind: "node", Cluster: "west", Node: "node2"}
		if err := b.Kill(ctx, node); err != nil {
			t.Fatal(err)
		}
		wantReach("east/node1", "fd00:172:29:2::12", false)
		if err := b.Start(ctx, node); err != nil {
			t.Fatal(err)
		}
		wantReach("east/node1", "fd00:172:29:2::12", true)
	})
}
