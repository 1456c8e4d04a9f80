package testbed

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"causeway/agent"
)

// offsets returns what the agents that run have in their environment for their clock, by node.
func offsets(t *testing.T, b *Bed) map[string]string {
	t.Helper()
	s, err := b.State()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, c := range s.Clusters {
		for _, n := range c.Nodes {
			if !n.Agent.alive() {
				continue
			}
			env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", n.Agent.PID))
			if err != nil {
				t.Fatal(err)
			}
			for kv := range strings.SplitSeq(string(env), "\x00") {
				if value, ok := strings.CutPrefix(kv, agent.ClockOffsetEnv+"="); ok {
					got[c.Name+"/"+n.Name] = value
				}
			}
		}
	}
	return got
}

func TestSetClock(t *testing.T) {
	// What this process has itself is not passed on.
	t.Setenv(agent.ClockOffsetEnv, "7h")
	b := mustUp(t, Options{})
	want := func(want string) {
		t.Helper()
		if got := fmt.Sprint(offsets(t, b)); got != "map["+want+"]" {
			t.Errorf("the agents' offsets are %s, want %s", got, want)
		}
	}
	set := func(place string, offset time.Duration) {
		t.Helper()
		if err := b.SetClock(t.Context(), place, offset); err != nil {
			t.Fatal(err)
		}
	}
	want("")
	before, _ := b.State()
	set("east", 5*time.Minute)
	set("west/node2", -time.Hour)
	want("east/node1:5m0s east/node2:5m0s west/node2:-1h0m0s")
	after, err := b.State()
	if err != nil || *after.Clusters[1].Nodes[0].Agent != *before.Clusters[1].Nodes[0].Agent {
		t.Errorf("an agent was restarted that keeps its clock: %v", err)
	}
	st, err := b.Status(t.Context())
	if err != nil || !st.OK || st.Clusters[0].Nodes[1].ClockOffset != 5*time.Minute || st.Clusters[1].Nodes[0].ClockOffset != 0 {
		t.Errorf("status shows %+v, %v", st.Clusters, err)
	}

	// It stays when the agent is started again, and comes to one that does not run when that is started.
	victim := Victim{Kind: kindAgent, Cluster: "east", Node: "node1"}
	if err := b.Kill(t.Context(), victim); err != nil {
		t.Fatal(err)
	}
	set("east", time.Minute)
	want("east/node2:1m0s west/node2:-1h0m0s")
	if err := b.Start(t.Context(), victim); err != nil {
		t.Fatal(err)
	}
	want("east/node1:1m0s east/node2:1m0s west/node2:-1h0m0s")
	set("east/node1", 0)
	want("east/node2:1m0s west/node2:-1h0m0s")
	if err := b.HealAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	want("")

	for _, place := range []string{"south", "east/node9", "east/kvstore", "", "east/"} {
		if err := b.SetClock(t.Context(), place, time.Minute); err == nil {
			t.Errorf("the clock of %q was set", place)
		}
	}
	want("")
}

func TestParseClockOffset(t *testing.T) {
	for text, want := range map[string]time.Duration{"+5m": 5 * time.Minute, "5m": 5 * time.Minute, "-1h": -time.Hour, "0": 0} {
		if got, err := ParseClockOffset(text); err != nil || got != want {
			t.Errorf("%q is %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "5", "later", "5m later"} {
		if got, err := ParseClockOffset(text); err == nil {
			t.Errorf("%q is accepted as %v", text, got)
		}
	}
}
