package gossip

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"causeway/identity"
)

// TestJudge: an agent's death is not its node's, and nobody is given up by one witness, too early, or against an answer.
func TestJudge(t *testing.T) {
	timing := DefaultTiming()
	silent := findings{
		Missing: time.Second, Silence: 1200 * time.Millisecond, Echoes: 8, Available: 2,
		Others: []otherFinding{{Echoes: 5}}, Now: identity.NodeAlive,
	}
	with := func(change func(*findings)) findings {
		f := silent
		f.Others = slices.Clone(f.Others)
		change(&f)
		return f
	}
	for _, c := range []struct {
		name string
		in   findings
		want identity.LivenessState
	}{
		{"silent in every way, as another one says too", silent, identity.NodeSuspect},
		{"silent for less than a second", with(func(f *findings) { f.Silence = time.Second }), identity.NodeAlive},
		{"silent, but hardly asked", with(func(f *findings) { f.Echoes = 3 }), identity.NodeAlive},
		{"nobody else has said anything yet", with(func(f *findings) { f.Others = nil }), identity.NodeAlive},
		{"the other one has hardly asked", with(func(f *findings) { f.Others[0].Echoes = 2 }), identity.NodeAlive},
		{"another one gets answers", with(func(f *findings) { f.Others = []otherFinding{{Echoes: 9}, {Answers: true}} }), identity.NodeAlive},
		{"nobody is there to ask", with(func(f *findings) { f.Others, f.Available = nil, 0 }), identity.NodeSuspect},
		{"its agent was down, and now the node is", with(func(f *findings) { f.Now = identity.NodeAgentDown }), identity.NodeSuspect},
		{"its agent was stopped as announced, and then the node went", with(func(f *findings) { f.Now, f.Announced = identity.NodeAgentDown, true }), identity.NodeSuspect},
		{"suspect for a while", with(func(f *findings) { f.Now, f.For = identity.NodeSuspect, timing.Dead }), identity.NodeDead},
		{"suspect for a moment", with(func(f *findings) { f.Now, f.For = identity.NodeSuspect, time.Second }), identity.NodeSuspect},
		{"dead stays dead", with(func(f *findings) { f.Now, f.For = identity.NodeDead, time.Hour }), identity.NodeDead},
		{"echoes come back at once", findings{Missing: time.Second, Answers: true, Now: identity.NodeAlive, Available: 2}, identity.NodeAlive},
		{"echoes come back for long", findings{Missing: 2 * time.Second, Answers: true, Now: identity.NodeAlive, Available: 2}, identity.NodeAgentDown},
		{"stopped as announced", findings{Announced: true, Answers: true, Now: identity.NodeAlive}, identity.NodeAgentDown},
		{"a dead one answers again", findings{Missing: time.Hour, Answers: true, Now: identity.NodeDead}, identity.NodeAgentDown},
		{"drained and stopped", findings{Announced: true, Draining: true, Silence: time.Hour, Now: identity.NodeAlive}, identity.NodeLeft},
		{"left, and started again", findings{Answers: true, Now: identity.NodeLeft}, identity.NodeAgentDown},
		{"back in the pool", findings{Member: true, Now: identity.NodeDead, Silence: time.Hour}, identity.NodeAlive},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, why := judge(c.in, timing); got != c.want {
				t.Errorf("%s (%s), want %s", got, why, c.want)
			}
		})
	}
}

func TestJudgeCluster(t *testing.T) {
	timing := DefaultTiming()
	for _, c := range []struct {
		name string
		in   reachability
		want identity.ReachState
	}{
		{"its members answer", reachability{Members: 3, Heard: true}, identity.Reachable},
		{"a partition of a second", reachability{Silence: 1100 * time.Millisecond, Missing: 300 * time.Millisecond, Echoes: 40, Heard: true, Now: identity.Reachable}, identity.Reachable},
		{"silent", reachability{Silence: 1500 * time.Millisecond, Missing: time.Second, Echoes: 40, Heard: true, Now: identity.Reachable}, identity.Unreachable},
		{"silent, and hardly asked", reachability{Silence: time.Hour, Missing: time.Second, Echoes: 2, Heard: true, Now: identity.Reachable}, identity.Reachable},
		{"its data path answers, its agents have just gone", reachability{Missing: time.Second, Heard: true, Now: identity.Reachable}, identity.Reachable},
		{"its data path answers, its agents are gone", reachability{Missing: 4 * time.Second, Heard: true, Now: identity.Reachable}, identity.ReachControlPlaneDown},
		{"it answers again", reachability{Missing: time.Hour, Heard: true, Now: identity.Unreachable}, identity.ReachControlPlaneDown},
		{"never heard of, yet", reachability{Silence: 3 * time.Second, Missing: 3 * time.Second, Echoes: 40}, ""},
		{"never heard of", reachability{Silence: 6 * time.Second, Missing: 6 * time.Second, Echoes: 40}, identity.Unreachable},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := judgeCluster(c.in, timing); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestQuarantine(t *testing.T) {
	self := identity.NodeName{Cluster: "east", Node: "n1"}
	node := func(s string) identity.NodeName { n, _ := parseName(s); return n }
	const up, down, off = identity.Reachable, identity.ReachControlPlaneDown, identity.Unreachable
	for _, c := range []struct {
		name     string
		nodes    map[string]NodeView
		votes    map[string][]identity.ReachState
		silent   map[string]int
		want     string
		clusters string
	}{
		{name: "all is well", nodes: map[string]NodeView{"east/n2": {State: identity.NodeAlive, Known: true}}},
		{name: "suspect and dead nodes, of any cluster", want: "east/n2 west/n1", nodes: map[string]NodeView{
			"east/n2": {State: identity.NodeSuspect, Known: true}, "west/n1": {State: identity.NodeDead, Known: true}}},
		{name: "an agent's death changes nothing", nodes: map[string]NodeView{"west/n1": {State: identity.NodeAgentDown, Known: true}}},
		{name: "one that left changes nothing unless it drains", nodes: map[string]NodeView{"west/n1": {State: identity.NodeLeft, Known: true}}},
		{name: "drained", want: "west/n1", nodes: map[string]NodeView{"west/n1": {State: identity.NodeAlive, Draining: true, Known: true}}},
		{name: "drained and left", want: "west/n1", nodes: map[string]NodeView{"west/n1": {State: identity.NodeLeft, Draining: true, Known: true}}},
		{name: "this node itself, whatever others say", nodes: map[string]NodeView{"east/n1": {State: identity.NodeDead, Known: true}}},
		{name: "this node itself, if it drains", want: "east/n1", nodes: map[string]NodeView{"east/n1": {State: identity.NodeAlive, Draining: true, Known: true}}},
		{name: "no store names it", nodes: map[string]NodeView{"west/n9": {State: identity.NodeDead}}},
		{name: "most speakers say so", clusters: "west", votes: map[string][]identity.ReachState{"west": {off, off, up}}},
		{name: "one of three says so", votes: map[string][]identity.ReachState{"west": {off, up, down}}},
		{name: "one of two says so", votes: map[string][]identity.ReachState{"west": {off, up}}},
		{name: "the only one says so", clusters: "west", votes: map[string][]identity.ReachState{"west": {off}}},
		{name: "only its control plane is gone", votes: map[string][]identity.ReachState{"west": {down, down, down}}},
		{name: "a node dies in a cluster without agents", want: "west/n1", votes: map[string][]identity.ReachState{"west": {down, down, down}},
			silent: map[string]int{"west/n1": 2, "west/n2": 1}, nodes: map[string]NodeView{"west/n1": {State: identity.NodeAlive, Known: true}, "west/n2": {State: identity.NodeAlive, Known: true}}},
		{name: "its cluster's agents are back and know better", votes: map[string][]identity.ReachState{"west": {up, down, down}},
			silent: map[string]int{"west/n1": 2}, nodes: map[string]NodeView{"west/n1": {State: identity.NodeAlive, Known: true}}},
		{name: "the own cluster cannot be out of reach", votes: map[string][]identity.ReachState{"east": {off, off, off}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := View{Self: self, Nodes: map[identity.NodeName]NodeView{}, Votes: c.votes, Silent: map[identity.NodeName]int{}}
			for name, n := range c.silent {
				v.Silent[node(name)] = n
			}
			for name, n := range c.nodes {
				v.Nodes[node(name)] = n
			}
			nodes, clusters := Quarantine(v)
			var got []string
			for name, why := range nodes {
				if why == "" {
					t.Errorf("%s: no reason", name)
				}
				got = append(got, name.String())
			}
			slices.Sort(got)
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("nodes %q, want %q", s, c.want)
			}
			if s := strings.Join(slices.Sorted(maps.Keys(clusters)), " "); s != c.clusters {
				t.Errorf("clusters %q, want %q", s, c.clusters)
			}
		})
	}
}

// TestChoose: whoever has the same candidates chooses the same, and one that goes is replaced by one other.
func TestChoose(t *testing.T) {
	var all []identity.NodeName
	for _, n := range "abcdefghij" {
		all = append(all, identity.NodeName{Cluster: "east", Node: string(n)})
	}
	first := speakersOf(all)
	reversed := slices.Clone(all)
	slices.Reverse(reversed)
	if !slices.Equal(first, speakersOf(reversed)) || len(first) != Speakers {
		t.Errorf("%v and %v", first, speakersOf(reversed))
	}
	for _, gone := range all {
		now := speakersOf(slices.DeleteFunc(slices.Clone(all), func(n identity.NodeName) bool { return n == gone }))
		kept := 0
		for _, n := range now {
			if slices.Contains(first, n) {
				kept++
			}
		}
		if want := map[bool]int{true: Speakers - 1, false: Speakers}[slices.Contains(first, gone)]; kept != want {
			t.Errorf("without %s: %v of %v", gone, now, first)
		}
	}
	if got := speakersOf(all[:2]); len(got) != 2 {
		t.Errorf("of two: %v", got)
	}
}
