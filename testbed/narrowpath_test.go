package testbed

import (
	"fmt"
	"testing"
	"time"

	"causeway/agent/api"
)

// TestNarrowPathIsNoProblem: a smaller MTU between two clusters is seen within 1.2 s, and packets between them are kept to it. They stay connected, troubleshoot
// finds nothing wrong, and all is as before soon after the path is.
func TestNarrowPathIsNoProblem(t *testing.T) {
	m := newUnconnected(t, 1, "west", "east", "north")
	ctx := t.Context()
	m.connect("west", "east")
	m.connect("west", "north")
	for _, pair := range [][2]string{{"east", "west"}, {"west", "east"}, {"east", "north"}} {
		m.wantConnected(pair[0], pair[1])
	}
	full := m.peerOf("east", "west").Out.MTU
	if full < 1390 {
		t.Fatalf("on an underlay of 1500 the MTU is %d", full)
	}
	out := func(cluster, peer string) api.Path {
		p := m.peerOf(cluster, peer)
		if p == nil || p.State != "connected" {
			t.Fatalf("%s sees %+v", cluster, p)
		}
		return p.Out
	}
	cut := time.Now()
	if err := m.bed.SetMTU(ctx, "east", "west", 1400); err != nil {
		t.Fatal(err)
	}
	var seen time.Time
	m.eventually("the path is narrow", func() string {
		if a, b := out("east", "west"), out("west", "east"); !a.Narrowed || !b.Narrowed {
			return fmt.Sprintf("%+v and %+v", a, b)
		}
		seen = time.Now()
		return ""
	})
	t.Logf("seen after %s", seen.Sub(cut))
	if took := seen.Sub(cut); took > 1200*time.Millisecond {
		t.Errorf("it was seen after %s, want 1.2 s at most", took)
	}
	for _, path := range []api.Path{out("east", "west"), out("west", "east")} {
		if path.MTU >= full || path.MTU < 1250 || path.Problem != "" || !path.NoteIsNew {
			t.Errorf("the path is %+v", path)
		}
	}
	if path := out("east", "north"); path.Narrowed || path.MTU != full {
		t.Errorf("to a third cluster it is %+v", path)
	}
	if verdict := m.troubleshoot("east", "west"); verdict != "" {
		t.Errorf("troubleshoot says %q", verdict)
	}
	if err := m.bed.HealAll(ctx); err != nil {
		t.Fatal(err)
	}
	m.eventually("all gets through again", func() string {
		if a, b := out("east", "west"), out("west", "east"); a.MTU != full || b.MTU != full || a.Narrowed || b.Narrowed {
			return fmt.Sprintf("%+v and %+v", a, b)
		}
		return ""
	})
}
