package testbed

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestLosses(t *testing.T) {
	l, _ := newLayout("/run/x")
	s, err := newState(l, &Options{Clusters: []string{"east", "west"}, Nodes: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		in   []Partition
		want string
	}{
		{"nodes", []Partition{{A: "east/node1", B: "west/node1", Loss: 100}},
			"172.29.1.11>172.29.2.11:100 172.29.2.11>172.29.1.11:100"},
		{"one way", []Partition{{A: "east/node1", B: "west/node1", Loss: 30, OneWay: true}},
			"172.29.1.11>172.29.2.11:30"},
		{"clusters with their stores", []Partition{{A: "east", B: "west", Loss: 100, OneWay: true}},
			"172.29.1.11>172.29.2.11:100 172.29.1.11>172.29.2.2:100 172.29.1.2>172.29.2.11:100 172.29.1.2>172.29.2.2:100"},
		{"a node and its own cluster", []Partition{{A: "east/node1", B: "east", Loss: 100}},
			"172.29.1.11>172.29.1.2:100 172.29.1.2>172.29.1.11:100"},
		{"the worst counts", []Partition{{A: "east/node1", B: "west/node1", Loss: 30}, {A: "west/node1", B: "east/node1", Loss: 50, OneWay: true}},
			"172.29.1.11>172.29.2.11:30 172.29.2.11>172.29.1.11:50"},
		{"the same place", []Partition{{A: "east", B: "east", Loss: 100}}, ""},
		{"none", nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			losses, err := s.losses(c.in)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for d, loss := range losses {
				got = append(got, fmt.Sprintf("%v>%v:%g", d.from, d.to, loss))
			}
			slices.Sort(got)
			if strings.Join(got, " ") != c.want {
				t.Errorf("got  %s\nwant %s", strings.Join(got, " "), c.want)
			}
		})
	}
	if _, err := s.losses([]Partition{{A: "east", B: "south"}}); err == nil || !strings.Contains(err.Error(), "east, west") {
		t.Errorf("an unknown cluster: %v", err)
	}
}

func TestPartitionAndHeal(t *testing.T) {
	b := mustUp(t, Options{})
	partition := func(p Partition) {
		t.Helper()
		if p.Loss == 0 {
			p.Loss = 100
		}
		if err := b.Partition(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	wantReach := func(from, to string, want bool) {
		t.Helper()
		if got := reaches(t, b, from, to, want); got != want {
			t.Errorf("%s reaches %s: %v, want %v", from, to, got, want)
		}
	}
	partition(Partition{A: "east", B: "west"})
	wantReach("east/node1", "172.29.2.11", false)
	wantReach("west/node1", "172.29.1.2", false)
	wantReach("east/node1", "172.29.1.12", true)
	if st, err := b.Status(t.Context()); err != nil || len(st.Partitions) != 1 || st.Partitions[0].Lost == 0 {
		t.Errorf("status shows %+v, %v", st.Partitions, err)
	}
	if err := b.Heal(t.Context(), "east/node1", "west"); err == nil || !strings.Contains(err.Error(), "east <-> west") {
		t.Errorf("healing something else: %v", err)
	}
	if err := b.Heal(t.Context(), "west", "east"); err != nil {
		t.Error(err)
	}
	wantReach("east/node1", "172.29.2.11", true)

	partition(Partition{A: "east/node2", B: "west/node2"})
	wantReach("east/node2", "172.29.2.12", false)
	wantReach("east/node2", "172.29.2.11", true)
	wantReach("east/node1", "172.29.2.12", true)
	if err := b.HealAll(t.Context()); err != nil {
		t.Error(err)
	}
	wantReach("east/node2", "172.29.2.12", true)
	for _, p := range []Partition{{A: "east", B: "east", Loss: 1}, {A: "east", B: "nowhere", Loss: 1}, {A: "east", B: "west"}, {A: "east", B: "west", Loss: 101}} {
		if err := b.Partition(t.Context(), p); err == nil {
			t.Errorf("%v was accepted", p)
		}
	}
}
