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
		{"a port", []Partition{{A: "east/node1", B: "west/node1", Port: Port{"UDP", 7956}, Loss: 100, OneWay: true}},
			"172.29.1.11>172.29.2.11 UDP/7956:100"},
		{"the same place", []Partition{{A: "east", B: "east", Loss: 100}}, ""},
		{"none", nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			losses, err := s.losses(c.in)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for flow, loss := range losses {
				port := ""
				if flow.Port != 0 {
					port = fmt.Sprintf(" %s/%d", flow.Protocol, flow.Port)
				}
				got = append(got, fmt.Sprintf("%v>%v%s:%g", flow.From, flow.To, port, loss))
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

func TestLossEverywhere(t *testing.T) {
	b := mustUp(t, Options{Clusters: []string{"east"}})
	for _, percent := range []float64{-1, 101} {
		if err := b.LoseEverywhere(t.Context(), percent); err == nil {
			t.Errorf("%v%% was accepted", percent)
		}
	}
	if err := b.LoseEverywhere(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	if reaches(t, b, "east/node1", "172.29.1.12", false) || reaches(t, b, "east/node2", "172.29.1.2", false) {
		t.Error("something passes where everything is lost")
	}
	st, err := b.Status(t.Context())
	if err != nil || st.Loss.Percent != 100 || st.Loss.Lost == 0 || len(st.Partitions) != 0 {
		t.Errorf("status shows %+v, %+v, %v", st.Loss, st.Partitions, err)
	}
	if err := b.LoseEverywhere(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if !reaches(t, b, "east/node1", "172.29.1.12", true) {
		t.Error("packets are still lost")
	}
	if err := b.LoseEverywhere(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	if err := b.HealAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !reaches(t, b, "east/node1", "172.29.1.12", true) {
		t.Error("packets are lost after healing everything")
	}
}

// Only one port is cut off: whoever listens on another one is still there.
func TestPartitionOfAPort(t *testing.T) {
	b := mustUp(t, Options{Clusters: []string{"east"}})
	if err := b.Partition(t.Context(), Partition{A: "east/node1", B: "east/node2", Port: Port{"TCP", 2379}, Loss: 100}); err != nil {
		t.Fatal(err)
	}
	if reaches(t, b, "east/node1", "172.29.1.12", false) {
		t.Error("the port is open")
	}
	if out, _ := run(t, b, "east/node1", "timeout", "5", "bash", "-c", "exec 3<>/dev/tcp/172.29.1.12/2380"); !strings.Contains(out, "refused") {
		t.Errorf("another port: %q", out)
	}
	st, err := b.Status(t.Context())
	if err != nil || len(st.Partitions) != 1 || st.Partitions[0].Lost == 0 || st.Partitions[0].String() != "east/node1 <-> east/node2 loses 100 % of tcp/2379" {
		t.Errorf("status shows %v, %v", st.Partitions, err)
	}
	if err := b.Heal(t.Context(), "east/node1", "east/node2"); err != nil {
		t.Fatal(err)
	}
	if !reaches(t, b, "east/node1", "172.29.1.12", true) {
		t.Error("the port is closed after healing")
	}
}

func TestParsePort(t *testing.T) {
	p, err := ParsePort("udp/7956")
	text, _ := p.MarshalText()
	if err != nil || p != (Port{"UDP", 7956}) || string(text) != "udp/7956" {
		t.Errorf("%+v as %q, %v", p, text, err)
	}
	for _, in := range []string{"", "7956", "udp", "udp/", "udp/0", "udp/65536", "sctp/1", "7956/udp"} {
		if p, err := ParsePort(in); err == nil {
			t.Errorf("%q is accepted as %v", in, p)
		}
	}
}
