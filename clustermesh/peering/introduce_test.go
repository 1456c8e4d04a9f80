package peering

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestThirdClusterIsIntroduced(t *testing.T) {
	west, east, north := newEtcdCluster(t, "west", 2), newEtcdCluster(t, "east", 1), newEtcdCluster(t, "north", 3)
	east.mustConnect(west)
	e, err := north.connect(west.token(TokenOptions{}), ConnectOptions{})
	if err != nil {
		t.Fatalf("%v\n%s", err, e)
	}
	for _, line := range []string{"plan west: west is connected with east: joined after it", "done west: connected with west", "done east: connected with east (ID 1)"} {
		if !strings.Contains(e.String(), line) {
			t.Errorf("no %q in\n%s", line, e)
		}
	}
	all := []*cluster{west, east, north}
	for _, a := range all {
		for _, b := range all {
			if a != b && a.state(b.Self.Cluster) != Connected {
				t.Errorf("%s says that %s is %q", a.Self.Cluster, b.Self.Cluster, a.state(b.Self.Cluster))
			}
		}
		if len(a.readers()) != 2 || string(a.Ring().Keys[0]) != string(west.Ring().Keys[0]) {
			t.Errorf("%s has users %q, and the mesh's keys or not", a.Self.Cluster, a.readers())
		}
	}
	tokens, err := east.Tokens(t.Context())
	if err != nil || len(tokens) != 1 || tokens[0].For != "north" || tokens[0].UsedBy != "north" {
		t.Errorf("east's tokens: %+v, %v", tokens, err)
	}
}

func TestIsolated(t *testing.T) {
	for name, tc := range map[string]struct {
		token  TokenOptions
		option ConnectOptions
	}{
		"by the token":  {token: TokenOptions{Isolated: true}},
		"by the joiner": {option: ConnectOptions{Isolated: true}},
	} {
		t.Run(name, func(t *testing.T) {
			west, east, north := newCluster(t, "west", 2), newCluster(t, "east", 1), newCluster(t, "north", 3)
			east.mustConnect(west)
			e, err := north.connect(west.token(tc.token), tc.option)
			if err != nil {
				t.Fatal(err)
			}
			if north.state("east") != "" || east.state("north") != "" {
				t.Error("joined with west's peer")
			}
			if !strings.Contains(e.String(), "west is connected with east: not joined, since it is isolated") {
				t.Errorf("not told:\n%s", e)
			}
			// Nor is it introduced if it asks, or to who comes later.
			err = north.call(t.Context(), north.peer("west"), func(l *link) error { return second(l.Introduce(t.Context(), &IntroduceRequest{To: "east"})) })
			wantError(t, err, "cluster east is not one that it can introduce")
			south := newCluster(t, "south", 4)
			south.mustConnect(west)
			if south.state("north") != "" || south.state("east") != Connected {
				t.Errorf("south says that north is %q and east %q", south.state("north"), south.state("east"))
			}
		})
	}
}

func TestFailedIntroductionUndoesNothingElse(t *testing.T) {
	west, east, north := newCluster(t, "west", 2), newCluster(t, "east", 1), newCluster(t, "north", 3)
	east.mustConnect(west)
	north.setVerify(func(_ context.Context, p Peer) error {
		if p.Name() == "east" {
			return errSilent
		}
		return nil
	})
	_, err := north.connect(west.token(TokenOptions{}), ConnectOptions{})
	wantError(t, err, "connected with west, but not with east: ", "no echo came back", "try again with a token of east")
	if north.state("west") != Connected || north.state("east") != "" || east.state("north") != "" {
		t.Errorf("north says west is %q and east %q, east says north is %q", north.state("west"), north.state("east"), east.state("north"))
	}
	north.setVerify(nil)
	north.mustConnect(east) // as the error says
}

// TestIntroductionsAreForPeers: what a peer may not have others do for it.
func TestIntroductionsAreForPeers(t *testing.T) {
	west, east, north := newCluster(t, "west", 2), newCluster(t, "east", 1), newCluster(t, "north", 3)
	east.mustConnect(west)
	for _, to := range []string{"north", "east", "west", "../x", ""} {
		err := east.call(t.Context(), east.peer("west"), func(l *link) error { return second(l.Introduce(t.Context(), &IntroduceRequest{To: to})) })
		if err == nil {
			t.Errorf("introduced to %q", to)
		}
	}
	for _, cluster := range []string{"east", "west", "../x", ""} {
		err := east.call(t.Context(), east.peer("west"), func(l *link) error { return second(l.Invite(t.Context(), &InviteRequest{Cluster: cluster})) })
		if err == nil {
			t.Errorf("invited %q", cluster)
		}
	}
	// A token that is for one cluster is for no other.
	var text string
	must(t, east.call(t.Context(), east.peer("west"), func(l *link) error {
		answer, err := l.Invite(t.Context(), &InviteRequest{Cluster: "south"})
		text = answer.GetToken()
		return err
	}))
	_, err := north.connect(text, ConnectOptions{})
	wantError(t, err, "the token is for cluster south alone")
	if errors.Is(err, ErrLeft) || north.state("west") != "" {
		t.Error("north is connected")
	}
}
