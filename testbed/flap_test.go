package testbed

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"causeway/identity"
)

func TestFlapOptions(t *testing.T) {
	for _, o := range []FlapOptions{{}, {Down: 1, Times: 1}, {Up: 1, Times: 1}, {Down: 1, Up: 1}, {Down: -1, Up: 1, Times: 1}} {
		if o.validate() == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
	both := FlapOptions{Down: 1, Up: 1, Times: 2, Duration: time.Second}
	for times, want := range map[int]bool{0: true, 1: true, 2: false} {
		if both.again(times, 0) != want || both.again(times, time.Second) {
			t.Errorf("after %d times", times)
		}
	}
}

func linkIsUp(t *testing.T, b *Bed) bool {
	t.Helper()
	out, _ := run(t, b, "underlay", "ip", "-br", "link", "show", "east-node1")
	return strings.Contains(out, "LOWER_UP")
}

func TestFlap(t *testing.T) {
	b := mustUp(t, Options{Clusters: []string{"east"}, Nodes: 1})
	node := identity.NodeName{Cluster: "east", Node: "node1"}
	times, err := b.Flap(t.Context(), node, FlapOptions{Down: time.Millisecond, Up: time.Millisecond, Times: 3})
	if err != nil || times != 3 || !linkIsUp(t, b) {
		t.Errorf("%d times, %v, up: %v", times, err, linkIsUp(t, b))
	}

	t.Run("cut off while the link is down", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := b.Flap(ctx, node, FlapOptions{Down: time.Hour, Up: time.Hour, Times: 1})
			ended <- err
		}()
		waitFor(t, "the link is up", func() bool { return !linkIsUp(t, b) })
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) || !linkIsUp(t, b) {
			t.Errorf("%v, up: %v", err, linkIsUp(t, b))
		}
	})
	t.Run("killed meanwhile", func(t *testing.T) {
		if err := b.Kill(t.Context(), Victim{Kind: "node", Cluster: "east", Node: "node1"}); err != nil {
			t.Fatal(err)
		}
		_, err := b.Flap(t.Context(), node, FlapOptions{Down: time.Millisecond, Up: time.Millisecond, Times: 1})
		if err == nil || !strings.Contains(err.Error(), "start node east/node1") || linkIsUp(t, b) {
			t.Errorf("%v, up: %v", err, linkIsUp(t, b))
		}
	})
}

// waitFor polls until holds does.
func waitFor(t *testing.T, problem string, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for !holds() {
		if pause(ctx, 5*time.Millisecond) != nil {
			t.Fatal(problem)
		}
	}
}
