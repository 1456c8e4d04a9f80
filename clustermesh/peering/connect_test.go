package peering

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"causeway/identity/pki"
	"causeway/kvstore"
)

func TestConnect(t *testing.T) {
	west, east := newEtcdCluster(t, "west", 2), newEtcdCluster(t, "east", 1)
	must(t, west.Store.Put(t.Context(), kvstore.Prefix+"cluster", []byte("exported")))
	text := west.token(TokenOptions{})
	e, err := east.connect(text, ConnectOptions{})
	if err != nil {
		t.Fatalf("%v\n%s", err, e)
	}
	at := 0
	for _, line := range []string{
		"preflight west: TCP east→west " + west.endpoint + "/tcp ok",
		"preflight west: TLS and chain east→west " + west.endpoint + "/tcp ok TLS 1.3",
		"preflight west: clock east→west",
		"plan west: west is cluster ID 2, with pods in 10.2.0.0/16",
		"join west: exchanged certificates",
		"join west: changed to the gossip keys of west's mesh",
		"done west: connected with west (ID 2) in ",
	} {
		found := strings.Index(e.String()[at:], line)
		if found < 0 {
			t.Fatalf("no %q in its place in\n%s", line, e)
		}
		at += found
	}
	for _, line := range []string{
		"preflight west: TLS and chain east→west " + strings.TrimPrefix(west.StoreEndpoints[0], "https://") + "/tcp ok",
		"preflight west: TLS and chain west→east " + strings.TrimPrefix(east.StoreEndpoints[0], "https://") + "/tcp ok",
		"verify west: pod to pod east→west", "verify west: pod to pod west→east",
	} {
		if !strings.Contains(e.String(), line) {
			t.Errorf("no %q in\n%s", line, e)
		}
	}
	if east.state("west") != Connected || west.state("east") != Connected {
		t.Errorf("states %s and %s", east.state("west"), west.state("east"))
	}
	if string(east.Ring().Keys[0]) != string(west.Ring().Keys[0]) {
		t.Error("the gossip keys differ")
	}
	for c, peer := range map[*cluster]string{east: "west", west: "east"} {
		p := c.peer(peer)
		if got := c.readers(); len(got) != 1 || got[0] != p.User {
			t.Errorf("users of %s: %q, want %s", c.Self.Cluster, got, p.User)
		}
		report, err := c.Ask(t.Context(), p)
		if err != nil || report.State != Connected || report.Node.Cluster != peer || report.MTU != 1450 {
			t.Errorf("%s asks %s: %+v, %v", c.Self.Cluster, peer, report, err)
		}
		if strings.Contains(c.logged(), "PRIVATE KEY") || strings.Contains(c.logged(), text) {
			t.Errorf("%s logs a secret:\n%s", c.Self.Cluster, c.logged())
		}
	}
	store := west.dialAs(east.peer("west"))
	if got, err := store.Get(t.Context(), kvstore.Prefix+"cluster"); err != nil || string(got.Value) != "exported" {
		t.Errorf("east reads %q, %v", got.Value, err)
	}
	for what, err := range map[string]error{
		"writing":                    store.Put(t.Context(), kvstore.Prefix+"cluster", nil),
		"deleting":                   store.Delete(t.Context(), kvstore.Prefix+"cluster"),
		"reading the authority":      second(store.Get(t.Context(), AuthorityKey)),
		"reading what is private":    second(store.List(t.Context(), kvstore.PrivatePrefix)),
		"reading everything":         second(store.List(t.Context(), "")),
		"reading what is not ours":   second(store.Get(t.Context(), "other")),
		"writing outside the prefix": store.Put(t.Context(), "other", nil),
	} {
		if !errors.Is(err, kvstore.ErrDenied) {
			t.Errorf("%s: %v, want denied", what, err)
		}
	}
	_, err = east.connect(text, ConnectOptions{})
	wantError(t, err, "the token was used by cluster east at", "create a new one")
	_, err = east.connect(west.token(TokenOptions{}), ConnectOptions{})
	wantError(t, err, "already connected with west since", "disconnect first")
}

func second[T any](_ T, err error) error { return err }

// dialAs opens a cluster's store as a peer does, by the peer's record.
func (c *cluster) dialAs(record Peer) kvstore.Store {
	authority, err := pki.ParseCert([]byte(record.Authority))
	must(c.t, err)
	store, err := kvstore.Dial(context.Background(), c.storeConfig(authority, pki.Pair{Cert: []byte(record.Cert), Key: []byte(record.Key)}))
	must(c.t, err)
	c.t.Cleanup(func() { store.Close() })
	return store
}

func TestDisconnect(t *testing.T) {
	west, east := newEtcdCluster(t, "west", 2), newEtcdCluster(t, "east", 1)
	must(t, west.Store.Put(t.Context(), kvstore.Prefix+"cluster", []byte("exported")))
	east.mustConnect(west)
	first := east.peer("west")

	// The peer is up: it is told at once.
	began := time.Now()
	done, err := east.Disconnect(t.Context(), "west", false)
	if err != nil || !done.Known || !done.Told || time.Since(began) > 2*time.Second {
		t.Fatalf("%+v in %s, %v", done, time.Since(began), err)
	}
	if east.state("west") != "" || west.state("east") != Left || len(east.readers())+len(west.readers()) != 0 {
		t.Errorf("left: %q and %q, users %q and %q", east.state("west"), west.state("east"), east.readers(), west.readers())
	}
	if len(east.forgot) != 1 {
		t.Error("did not wait until west is forgotten")
	}
	if done, err := east.Disconnect(t.Context(), "west", false); err != nil || done.Known {
		t.Errorf("again: %+v, %v", done, err)
	}

	// Connected anew, it is another user, and the first certificate stays worthless.
	east.mustConnect(west)
	again := east.peer("west")
	if again.User == first.User {
		t.Error("the user is the same")
	}
	if _, err := west.dialAs(first).Get(t.Context(), kvstore.Prefix+"cluster"); err == nil {
		t.Error("the first certificate is good again")
	}
	if _, err := east.Ask(t.Context(), first); !errors.Is(err, ErrLeft) {
		t.Errorf("asking with the first certificate: %v", err)
	}
	if east.state("west") != Connected {
		t.Error("an answer to the first certificate ended the second connection")
	}
	_, err = west.dialAs(again).Get(t.Context(), kvstore.Prefix+"cluster")
	must(t, err)

	// The peer is down: it finds out when it asks, and can do nothing until then.
	west.stop()
	began = time.Now()
	done, err = east.Disconnect(t.Context(), "west", false)
	if err != nil || !done.Known || done.Told || done.Reason == "" || time.Since(began) > 2*time.Second {
		t.Fatalf("%+v in %s, %v", done, time.Since(began), err)
	}
	record := west.peer("east")
	if record.State != Connected {
		t.Fatalf("west's record is %s already", record.State)
	}
	if _, err := east.dialAs(record).Get(t.Context(), kvstore.Prefix+"cluster"); err == nil {
		t.Error("west still reads east's store")
	}
	west.comeBack()
	if _, err := west.Ask(t.Context(), record); !errors.Is(err, ErrLeft) {
		t.Errorf("west asks: %v, want ErrLeft", err)
	}
	if west.state("east") != Left || len(west.readers()) != 0 {
		t.Errorf("west's record is %q, users %q", west.state("east"), west.readers())
	}
	for what, err := range map[string]error{
		"report": second(west.Ask(t.Context(), record)), "renew": west.Renew(t.Context(), "east"),
		"verify":  west.AskChecks(t.Context(), record, func(Check) {}),
		"confirm": west.call(t.Context(), record, func(l *link) error { return second(l.Confirm(t.Context(), &ConfirmRequest{})) }),
		"invite":  west.call(t.Context(), record, func(l *link) error { return second(l.Invite(t.Context(), &InviteRequest{Cluster: "x"})) }),
	} {
		if !errors.Is(err, ErrLeft) {
			t.Errorf("%s: %v, want ErrLeft", what, err)
		}
	}
	// It is connected anew without a disconnect in west.
	east.mustConnect(west)
}

func TestDisconnectSaysWhatIsMissing(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	east.mustConnect(west)
	if _, err := east.Disconnect(t.Context(), "../x", false); err == nil {
		t.Error("a name that is none is accepted")
	}
	east.noAdmin = errors.New("no way")
	_, err := east.Disconnect(t.Context(), "west", true)
	wantError(t, err, "the record stays, try again", "no way")
	if east.state("west") != Connected {
		t.Error("the record is gone though the user is not")
	}
	east.noAdmin = nil
	east.Store.(*kvstore.Memory).Disconnect()
	_, err = east.Disconnect(t.Context(), "west", true)
	wantError(t, err, "the own store must be there for that, nothing has been changed")
	east.Store.(*kvstore.Memory).Reconnect()
	done, err := east.Disconnect(t.Context(), "west", true)
	if err != nil || done.Told || west.state("east") != Connected {
		t.Errorf("forced: %+v, %v; west says %s", done, err, west.state("east"))
	}
}

// empty fails unless nothing is left of a connection.
func (c *cluster) empty() {
	c.t.Helper()
	entries, err := c.Store.List(c.t.Context(), PeersPrefix)
	must(c.t, err)
	if len(entries) != 0 || len(c.readers()) != 0 {
		c.t.Errorf("left in %s: %d records, users %q", c.Self.Cluster, len(entries), c.readers())
	}
	if _, err := c.Store.Get(c.t.Context(), connectingKey); !errors.Is(err, kvstore.ErrNotFound) {
		c.t.Errorf("%s is still connecting: %v", c.Self.Cluster, err)
	}
}

func TestNothingIsLeftOfAFailedConnect(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	silent := func(context.Context, Peer) error { return errSilent }
	hangs := func(ctx context.Context, _ Peer) error { <-ctx.Done(); return ctx.Err() }
	for name, tc := range map[string]struct {
		here, there func(context.Context, Peer) error
		adopt       error
		want        string
	}{
		"silence here":              {here: silent, want: "as seen from cluster east: no echo came back"},
		"silence there":             {there: silent, want: "as seen from cluster west: no echo came back"},
		"here, while there hangs":   {here: silent, there: hangs, want: "as seen from cluster east: no echo came back"},
		"a mesh that is not joined": {adopt: errSilent, want: "change to the gossip keys of west's mesh: no echo came back"},
	} {
		t.Run(name, func(t *testing.T) {
			east.setVerify(tc.here)
			west.setVerify(tc.there)
			adopt := east.Adopt
			defer func() { east.Adopt = adopt }()
			east.Adopt = func(context.Context, [][]byte) error { return tc.adopt }
			text := west.token(TokenOptions{})
			e, err := east.connect(text, ConnectOptions{})
			wantError(t, err, tc.want)
			if !strings.Contains(e.String(), "undo west: it failed") {
				t.Errorf("no word of it in\n%s", e)
			}
			east.empty()
			west.empty()
			_, err = east.connect(text, ConnectOptions{})
			wantError(t, err, "the token was used by cluster east")
		})
	}
}

func TestCanceledConnect(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	east.setVerify(func(ctx context.Context, _ Peer) error { cancel(); <-ctx.Done(); return ctx.Err() })
	err := east.Connect(ctx, west.token(TokenOptions{}), ConnectOptions{}, func(Event) {})
	wantError(t, err, "context canceled")
	east.empty()
	west.empty()
}

func TestOneConnectAtATime(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	east.setVerify(func(context.Context, Peer) error {
		_, err := east.connect(west.token(TokenOptions{}), ConnectOptions{})
		wantError(t, err, "node node1 runs a connect already, since ")
		return nil
	})
	east.mustConnect(west)

	// One that died is not waited for.
	must(t, east.Store.Put(t.Context(), connectingKey, encode(connecting{"node2", time.Now().Add(-3 * time.Minute)})))
	_, err := east.connect(west.token(TokenOptions{}), ConnectOptions{})
	wantError(t, err, "already connected")
}
