package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/lb"
	"causeway/lb/l7/state"
)

var (
	feedPort  = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "80", Protocol: lb.TCP, Family: lb.IPv4}
	otherPort = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "81", Protocol: lb.TCP, Family: lb.IPv4}
)

func feedTarget(port lb.PortKey, address string) lb.Target {
	return lb.Target{TargetKey: lb.TargetKey{Port: port, Address: netip.MustParseAddr(address), Number: 8080}, Cluster: "east", Node: "node1"}
}

func feedFrontend(port lb.PortKey, address string, l7 bool) lb.Frontend {
	return lb.Frontend{FrontendKey: lb.FrontendKey{Address: netip.MustParseAddr(address), Port: 80, Protocol: lb.TCP}, Target: port, Cluster: "east", L7: l7}
}

// fed is a feed, and one reader of it.
type fed struct {
	*clustermesh.Tables
	feed  *l7Feed
	ready atomic.Bool
	rtt   atomic.Int64
	lines *bufio.Scanner
}

// feed serves tables' updates to a reader.
func feed(t *testing.T, tables *clustermesh.Tables, ready bool) *fed {
	t.Helper()
	return feedTo(t, tables, ready, "?"+state.Knows)
}

// feedTo serves a reader that asks with a query.
func feedTo(t *testing.T, tables *clustermesh.Tables, ready bool, query string) *fed {
	t.Helper()
	f := &fed{Tables: tables}
	f.ready.Store(ready)
	f.rtt.Store(int64(10 * time.Millisecond))
	f.feed = &l7Feed{
		tables: tables, ready: func(knows bool) bool { return !knows || f.ready.Load() }, rtts: func() map[string]time.Duration { return map[string]time.Duration{"west": time.Duration(f.rtt.Load())} },
		self: l7Self(identity.Node{Cluster: "east", Name: "node1", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24"), netip.MustParsePrefix("fd00:10:1:1::/64")}}),
	}
	server := httptest.NewServer(f.feed)
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); server.CloseClientConnections(); server.Close() })
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+query, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	f.lines = bufio.NewScanner(resp.Body)
	f.lines.Buffer(nil, 16<<20)
	return f
}

// line returns the next one, its updates as JSON each.
func (f *fed) line(t *testing.T) []string {
	t.Helper()
	if !f.lines.Scan() {
		t.Fatalf("the stream ended: %v", f.lines.Err())
	}
	var raw []json.RawMessage
	if err := json.Unmarshal(f.lines.Bytes(), &raw); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, r := range raw {
		all = append(all, string(r))
	}
	return all
}

func updateText(t *testing.T, u state.Update) string {
	t.Helper()
	text, err := json.Marshal(u)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// expect wants the next line to be of just these updates, in any order.
func (f *fed) expect(t *testing.T, what string, updates ...state.Update) {
	t.Helper()
	got := f.line(t)
	var want []string
	for _, u := range updates {
		want = append(want, updateText(t, u))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestFeed(t *testing.T) {
	tables := newTables(t)
	route := lb.Route{Port: feedPort, Number: 80, Options: lb.DefaultL7Options()}
	target, hidden := feedTarget(feedPort, "10.1.1.5"), feedTarget(otherPort, "10.1.1.5")
	frontend := feedFrontend(feedPort, "100.64.0.1", true)
	put(t, tables, tables.Routes, route)
	put(t, tables, tables.Targets, target, hidden)
	put(t, tables, tables.Frontends, frontend, feedFrontend(otherPort, "100.64.0.2", false))
	pod := identity.Endpoint{Namespace: "shop", Name: "a", Identity: 65792, Address: netip.MustParseAddr("10.1.1.9"), Address6: netip.MustParseAddr("fd00:10:1:1::9")}
	put(t, tables, tables.Endpoints, pod)
	client4 := state.Client{Address: pod.Address, Identity: 65792, Endpoint: "shop/a"}
	client6 := state.Client{Address: pod.Address6, Identity: 65792, Endpoint: "shop/a"}
	f := feed(t, tables, true)
	self := &state.Self{
		Cluster: "east", Node: "node1", Sources: []netip.Addr{netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("fd00:10:1:1::1")}, Mark: 0xcb000000, HostIdentity: 1,
	}

	first := f.line(t)
	if first[0] != updateText(t, state.Update{Reset: true}) || first[1] != updateText(t, state.Update{Self: self}) || first[len(first)-1] != updateText(t, state.Update{Synced: true}) {
		t.Errorf("the state begins and ends with\n%s", strings.Join(first, "\n"))
	}
	got := first[2 : len(first)-1]
	var want []string
	for _, u := range []state.Update{
		{Route: &route}, {Target: &target}, {Frontend: &frontend}, {Client: &client4}, {Client: &client6},
		{Cluster: &state.Cluster{Name: "east", RTT: 100 * time.Microsecond}}, {Cluster: &state.Cluster{Name: "west", RTT: 10 * time.Millisecond}},
	} {
		want = append(want, updateText(t, u))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the whole state is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// The kernel's answers change rows, and tell nothing.
	put(t, tables, tables.Targets, target)
	more := feedTarget(feedPort, "10.1.1.6")
	put(t, tables, tables.Targets, more)
	f.expect(t, "a backend comes", state.Update{Target: &more})
	more.Quarantined = true
	put(t, tables, tables.Targets, more)
	f.expect(t, "a backend changes", state.Update{Target: &more})
	remove(t, tables, tables.Targets, clustermesh.TargetKey(more))
	f.expect(t, "a backend goes", state.Update{TargetGone: &more.TargetKey})

	other := lb.Route{Port: otherPort, Number: 81, Options: lb.DefaultL7Options()}
	put(t, tables, tables.Routes, other)
	f.expect(t, "a route comes, with the backends that were there", state.Update{Route: &other}, state.Update{Target: &hidden})
	remove(t, tables, tables.Routes, otherPort.String())
	f.expect(t, "a route goes", state.Update{RouteGone: &otherPort}, state.Update{TargetGone: &hidden.TargetKey})
	put(t, tables, tables.Routes, other)
	f.expect(t, "the route comes again", state.Update{Route: &other}, state.Update{Target: &hidden})

	put(t, tables, tables.Frontends, feedFrontend(feedPort, "100.64.0.1", false))
	f.expect(t, "a frontend is L4's", state.Update{FrontendGone: &frontend.FrontendKey})

	pod.Identity = 65800
	put(t, tables, tables.Endpoints, pod)
	client4.Identity, client6.Identity = 65800, 65800
	f.expect(t, "a pod has other labels", state.Update{Client: &client4}, state.Update{Client: &client6})
	remove(t, tables, tables.Endpoints, "shop/a")
	f.expect(t, "a pod goes", state.Update{ClientGone: &client4.Address}, state.Update{ClientGone: &client6.Address})

	f.rtt.Store(int64(11 * time.Millisecond)) // too little to be told
	put(t, tables, tables.Targets, more)
	f.expect(t, "a backend comes", state.Update{Target: &more})
	f.rtt.Store(int64(13 * time.Millisecond))
	f.expect(t, "west is farther", state.Update{Cluster: &state.Cluster{Name: "west", RTT: 13 * time.Millisecond}})
}

// TestFeedWaitsForWholeTables, because a proxy takes what comes before Synced for all that there is.
func TestFeedWaitsForWholeTables(t *testing.T) {
	tables := newTables(t)
	f := feed(t, tables, false)
	if got := f.line(t); len(got) != 2 || got[0] != `{"reset":true}` {
		t.Fatalf("the stream begins with %s", got)
	}
	route := lb.Route{Port: feedPort, Number: 80, Options: lb.DefaultL7Options()}
	put(t, tables, tables.Routes, route)
	f.ready.Store(true)
	got := f.line(t)
	if got[0] != updateText(t, state.Update{Route: &route}) || got[len(got)-1] != `{"synced":true}` {
		t.Errorf("when all is known it goes on with %s", got)
	}
}

// stuckWriter is a reader that does not read: writes fail at their deadline.
type stuckWriter struct {
	http.ResponseWriter
	deadline time.Time
}

func (s *stuckWriter) SetWriteDeadline(d time.Time) error { s.deadline = d; return nil }
func (s *stuckWriter) Header() http.Header                { return http.Header{} }
func (s *stuckWriter) Write([]byte) (int, error) {
	if s.deadline.IsZero() {
		return 0, errors.New("a write without a deadline would wait for ever")
	}
	return 0, &net.OpError{Op: "write", Err: errors.New("i/o timeout")}
}

func TestFeedCutsSlowReaders(t *testing.T) {
	tables := newTables(t)
	f := &l7Feed{tables: tables, ready: func(bool) bool { return true }, rtts: func() map[string]time.Duration { return nil }}
	w := &stuckWriter{}
	defer func() {
		if r := recover(); r != http.ErrAbortHandler {
			t.Errorf("the handler ended with %v, want that it cuts the connection", r)
		}
		if left := time.Until(w.deadline); left <= 0 || left > feedPatience {
			t.Errorf("the write's deadline is in %s", left)
		}
	}()
	f.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
}

// TestFeedToAProxyThatKnowsNothing: it does not wait until the tables are surely whole, which takes half a minute when a cluster is new.
func TestFeedToAProxyThatKnowsNothing(t *testing.T) {
	tables := newTables(t)
	route := lb.Route{Port: feedPort, Number: 80, Options: lb.DefaultL7Options()}
	put(t, tables, tables.Routes, route)
	f := feedTo(t, tables, false, "")
	if got := f.line(t); !slices.Contains(got, updateText(t, state.Update{Route: &route})) || !slices.Contains(got, updateText(t, state.Update{Synced: true})) {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
}
