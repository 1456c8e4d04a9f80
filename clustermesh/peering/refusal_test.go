package peering

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"causeway/identity"
	"causeway/identity/pki"
	"causeway/kvstore"
)

// TestConnectRefused reads what is said about tokens that are no good. None of them changes anything.
func TestConnectRefused(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	prod := newCluster(t, "prod", 3)
	prod.Mesh = "prod"
	namesake := newCluster(t, "east", 4)
	deleted := west.token(TokenOptions{})
	parsed, err := ParseToken(deleted)
	must(t, err)
	must(t, west.DeleteToken(t.Context(), parsed.ID))
	wrong, err := ParseToken(west.token(TokenOptions{}))
	must(t, err)
	wrong.Secret[0]++
	elsewhere, err := ParseToken(west.token(TokenOptions{}))
	must(t, err)
	elsewhere.Cluster = "north"
	for _, tc := range []struct {
		name, token string
		want        []string
	}{
		{"malformed", "hello", []string{"not a token"}},
		{"cut", deleted[:len(deleted)-3], []string{"cut or mistyped"}},
		{"of this cluster", east.token(TokenOptions{}), []string{"the token is of this very cluster, east"}},
		{"of another mesh", prod.token(TokenOptions{}), []string{"mesh prod", "this cluster is of mesh causeway"}},
		{"of a namesake", namesake.token(TokenOptions{}), []string{"both clusters are called east"}},
		{"deleted", deleted, []string{"the token is not known here", "create a new one"}},
		{"with another secret", wrong.String(), []string{"the token is not known here"}},
		{"of a cluster that is not there", elsewhere.String(), []string{"cluster north cannot be reached", "certificate"}},
	} {
		e, err := east.connect(tc.token, ConnectOptions{})
		if err == nil {
			t.Errorf("%s: accepted\n%s", tc.name, e)
		}
		wantError(t, err, tc.want...)
	}
	for _, c := range []*cluster{east, west, prod, namesake} {
		c.empty()
	}
	if log := west.logged(); strings.Count(log, "Refused a token") != 2 || !strings.Contains(log, wrong.ID) {
		t.Errorf("refused tokens are logged as\n%s", log)
	}
}

func TestExpiredToken(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	text := west.token(TokenOptions{TTL: time.Minute})
	both := func(ahead time.Duration) {
		west.clock.set(ahead)
		east.clock.set(ahead)
	}
	both(2 * time.Minute)
	e, err := east.connect(text, ConnectOptions{})
	wantError(t, err, "the token has expired 1m", "create a new one")
	if !strings.Contains(e.String(), "by this node's clock the token has expired 1m") {
		t.Errorf("not told beforehand:\n%s", e)
	}
	// By the issuer's clock it is good, so the joiner's is wrong.
	west.clock.set(0)
	e, err = east.connect(text, ConnectOptions{})
	wantError(t, err, "clock", "behind this node's", "set the clocks, e.g. with NTP")
	if !strings.Contains(e.String(), "by this node's clock the token has expired") {
		t.Errorf("not told beforehand:\n%s", e)
	}
	both(0)
	west.empty()
	if _, err := east.connect(text, ConnectOptions{}); err != nil {
		t.Errorf("once the clocks are right: %v", err)
	}
}

func TestCreateTokenRefuses(t *testing.T) {
	west := newCluster(t, "west", 2)
	for _, ttl := range []time.Duration{time.Second, 25 * time.Hour, -time.Minute} {
		_, err := west.CreateToken(t.Context(), TokenOptions{TTL: ttl})
		wantError(t, err, "choose a time from 10s to 24h")
	}
	wantError(t, west.DeleteToken(t.Context(), "nothing"), "no token's ID")
	wantError(t, west.DeleteToken(t.Context(), newToken().ID), "there is no token")
	west.Endpoints = func() []string { return nil }
	_, err := west.CreateToken(t.Context(), TokenOptions{})
	wantError(t, err, "0 endpoints", "peering.endpoints")
}

// TestTokensAreForgotten: used and expired ones are shown for an hour, and hold nothing that works.
func TestTokensAreForgotten(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	text := west.token(TokenOptions{})
	if _, err := east.connect(text, ConnectOptions{}); err != nil {
		t.Fatal(err)
	}
	records, err := west.Tokens(t.Context())
	if err != nil || len(records) != 1 || records[0].UsedBy != "east" || records[0].Node != "node1" {
		t.Fatalf("%+v, %v", records, err)
	}
	stored, err := west.Store.Get(t.Context(), tokenKey(records[0].ID))
	must(t, err)
	token, err := ParseToken(text)
	must(t, err)
	if strings.Contains(string(stored.Value), string(encode(token.Secret))) {
		t.Error("the record holds the secret")
	}
	west.clock.set(2 * time.Hour)
	if records, err := west.Tokens(t.Context()); err != nil || len(records) != 0 {
		t.Errorf("after two hours: %+v, %v", records, err)
	}
	west.token(TokenOptions{})
	if entries, err := west.Store.List(t.Context(), tokensPrefix); err != nil || len(entries) != 1 {
		t.Errorf("%d records are left, %v", len(entries), err)
	}
}

// TestManInTheMiddle: somebody who answers with an authority of his own learns nothing.
func TestManInTheMiddle(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	mallory := mustGet[*pki.Authority](t)(pki.NewAuthority("west", time.Now()))
	pair := mustGet[pki.Pair](t)(mallory.Issue(pki.Request{User: "x", Server: true, Hosts: []string{serverName("west")}}, time.Now()))
	cert := mustGet[tls.Certificate](t)(pair.TLS())
	cert.Certificate = append(cert.Certificate, mallory.Cert.Raw)
	listener := mustGet[net.Listener](t)(tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}}))
	var mu sync.Mutex
	var read int
	var connections int
	acceptAll(t, listener, func(conn net.Conn) {
		n, _ := conn.Read(make([]byte, 1)) // completes the handshake, and would return what is sent over it
		mu.Lock()
		defer mu.Unlock()
		connections++
		read += n
	})
	token, err := ParseToken(west.token(TokenOptions{}))
	must(t, err)
	token.Endpoints = []string{listener.Addr().String()}
	e, err := east.connect(token.String(), ConnectOptions{})
	wantError(t, err, "the authority at "+listener.Addr().String()+" has fingerprint "+mallory.Fingerprint().String(),
		"the token names "+west.authority.Fingerprint().String(), "somebody is in between, or cluster west has got a new authority since; nothing was sent")
	if !strings.Contains(e.String(), "TLS and chain east→west "+listener.Addr().String()+"/tcp failed") {
		t.Errorf("the check is not shown:\n%s", e)
	}
	eventually(t, "the connection has ended", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return connections == 1
	})
	if read != 0 {
		t.Error("something was sent to him")
	}
	east.empty()

	// Another endpoint of the token is the real one.
	token.Endpoints = append(token.Endpoints, west.endpoint)
	if e, err := east.connect(token.String(), ConnectOptions{}); err != nil {
		t.Errorf("%v\n%s", err, e)
	}
	// With west's real authority in front of a certificate that mallory signed he fares no better.
	forged := tls.Certificate{Certificate: [][]byte{cert.Certificate[0], west.authority.Cert.Raw}, PrivateKey: cert.PrivateKey}
	second := mustGet[net.Listener](t)(tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{forged}, NextProtos: []string{"h2"}}))
	acceptAll(t, second, func(conn net.Conn) { _ = conn.(*tls.Conn).Handshake() })
	p := east.peer("west")
	p.Endpoints = []string{second.Addr().String()}
	if _, err := east.Ask(t.Context(), p); err == nil {
		t.Error("a forged certificate is accepted")
	}
}

// joinRequest does what Connect does until the exchange, and returns what it would send.
func joinRequest(t testing.TB, joiner *cluster, text string) (*connect, *JoinRequest) {
	t.Helper()
	token, err := ParseToken(text)
	must(t, err)
	c := &connect{s: joiner.Service, token: token, report: func(Event) {}, began: time.Now()}
	must(t, c.preflight(t.Context()))
	t.Cleanup(c.link.Close)
	authority, err := joiner.Authority(t.Context())
	must(t, err)
	cert, err := authority.Sign(c.request, pki.Request{User: pki.PeerUser(token.Cluster)}, time.Now())
	must(t, err)
	request, _, err := pki.NewRequest()
	must(t, err)
	return c, &JoinRequest{Token: c.credential(), Joiner: c.own.message(), Certificate: cert, Request: request}
}

func TestReplay(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	c, req := joinRequest(t, east, west.token(TokenOptions{}))
	_, err := c.link.Join(t.Context(), req)
	must(t, err)
	users := west.readers()
	_, err = c.link.Join(t.Context(), req)
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(status.Convert(err).Message(), "the token was used by cluster east at ") {
		t.Errorf("the same request again: %v", err)
	}
	if !slices.Equal(west.readers(), users) {
		t.Errorf("users are %q, were %q", west.readers(), users)
	}
}

// TestTwoWithOneToken: of two clusters that use a token at the same moment one gets through, and the other leaves nothing.
func TestTwoWithOneToken(t *testing.T) {
	var arrived sync.WaitGroup
	west := newCluster(t, "west", 2, func(c *cluster) {
		administer := c.Administer
		c.Administer = func(ctx context.Context, a *pki.Authority) (Administrator, error) {
			arrived.Done()
			arrived.Wait() // both have been found to have a good token by then
			return administer(ctx, a)
		}
	})
	text := west.token(TokenOptions{})
	results := make(chan error, 2)
	arrived.Add(cap(results))
	for id, name := range []string{"north", "east"} {
		c, req := joinRequest(t, newCluster(t, name, identity.ClusterID(3+id)), text)
		go func() { results <- second(c.link.Join(t.Context(), req)) }()
	}
	accepted := 0
	for range cap(results) {
		if err := <-results; err == nil {
			accepted++
		} else if reasonOf(err) != Refusal_TOKEN {
			t.Errorf("refused with %v", err)
		}
	}
	entries, err := west.Store.List(t.Context(), PeersPrefix)
	if err != nil || accepted != 1 || len(entries) != 1 || len(west.readers()) != 1 {
		t.Errorf("%d were accepted, %d records, users %q, %v", accepted, len(entries), west.readers(), err)
	}
}

func TestJoinRefuses(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	text := west.token(TokenOptions{})
	stranger := mustGet[*pki.Authority](t)(pki.NewAuthority("east", time.Now()))
	other, _, err := pki.NewRequest()
	must(t, err)
	c, good := joinRequest(t, east, text)
	sign := func(by *pki.Authority, request []byte, user string) []byte {
		return mustGet[[]byte](t)(by.Sign(request, pki.Request{User: user}, time.Now()))
	}
	for name, tc := range map[string]struct {
		change func(*JoinRequest)
		want   string
	}{
		"signed by another authority": {func(r *JoinRequest) { r.Certificate = sign(stranger, c.request, pki.PeerUser("west")) }, "not signed by the authority that came with it"},
		"for another key":             {func(r *JoinRequest) { r.Certificate = sign(east.authority, other, pki.PeerUser("west")) }, "another key than the one that was asked for"},
		"for another user":            {func(r *JoinRequest) { r.Certificate = sign(east.authority, c.request, pki.PeerUser("north")) }, "no user of cluster west"},
		"no certificate":              {func(r *JoinRequest) { r.Certificate = []byte("x") }, "is refused"},
		"no request":                  {func(r *JoinRequest) { r.Request = []byte("x") }, "request for a certificate is refused"},
		"a leaf as the authority":     {func(r *JoinRequest) { r.Joiner.Authority = r.Certificate }, "not one of an authority"},
		"another mesh":                {func(r *JoinRequest) { r.Joiner.Mesh = "prod" }, "of mesh prod"},
		"west's ranges":               {func(r *JoinRequest) { r.Joiner.Cluster.PodCidrs = []string{"10.2.0.0/16"} }, "overlap"},
		"another protocol":            {func(r *JoinRequest) { r.Joiner.Protocol = 2 }, "update Causeway in west"},
		"no name":                     {func(r *JoinRequest) { r.Joiner.Cluster.Name = "../x" }, "DNS label"},
		"no endpoints":                {func(r *JoinRequest) { r.Joiner.Endpoints = nil }, "0 endpoints"},
		"no side":                     {func(r *JoinRequest) { r.Joiner = nil }, "version 0"},
		"no token":                    {func(r *JoinRequest) { r.Token = nil }, "token is not known"},
	} {
		req := &JoinRequest{Token: good.Token, Joiner: c.own.message(), Certificate: good.Certificate, Request: good.Request}
		tc.change(req)
		_, err := c.link.Join(t.Context(), req)
		if !strings.Contains(status.Convert(err).Message(), tc.want) {
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
	}
	west.empty()
	_, err = c.link.Join(t.Context(), good)
	must(t, err)
}

// TestLookedAtAnotherNode: the node that answers Join has not seen the Look, as behind a load balancer.
func TestLookedAtAnotherNode(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	text := west.token(TokenOptions{})
	token, err := ParseToken(text)
	must(t, err)
	c := &connect{s: east.Service, token: token, report: func(Event) {}, began: time.Now()}
	defer func() { c.link.Close() }()
	must(t, c.preflight(t.Context()))
	west.pending.drop(token.ID)
	must(t, c.join(t.Context()))
	if west.state("east") != Joining {
		t.Error("not joined")
	}
}

// TestKeysThatNobodyAgreedOnStay: a node that has only begun has gossip keys of its own making. A cluster that got them would never hear the others.
func TestKeysThatNobodyAgreedOnStay(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	token := west.token(TokenOptions{})
	for _, begun := range []*cluster{west, east} {
		begun.ringAt = 0
		_, err := east.connect(token, ConnectOptions{})
		wantError(t, err, "has not learnt from its cluster's store yet which gossip keys")
		begun.ringAt = 1
	}
	east.empty()
	west.empty()
	if _, err := east.connect(token, ConnectOptions{}); err != nil {
		t.Errorf("both agree now, and the token was not used: %v", err)
	}
}

func TestConflictsAreToldBeforeAnythingIsWritten(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	info := sampleInfo("east", 2)
	info.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("100.64.2.128/25")}
	east.Cluster = func() identity.ClusterInfo { return info }
	e, err := east.connect(west.token(TokenOptions{}), ConnectOptions{})
	wantError(t, err, "cluster ID 2 of east is taken by west: leave cluster.id out of the configuration of east's agents and start them again, one after the other; then it takes one that is free (such as 1) when it joins",
		"pod CIDR 10.2.0.0/16 of east and pod CIDR 10.2.0.0/16 of west overlap", "service CIDR 100.64.2.128/25 of east and service CIDR 100.64.2.0/24 of west overlap")
	var conflict *ConflictError
	if !errors.As(err, &conflict) || len(conflict.Conflicts) != 3 {
		t.Errorf("conflicts are %#v\n%s", conflict, e)
	}
	east.empty()
	west.empty()
}

// TestStoreMustBeReachable in both directions, as long as there is nothing to be taken back.
func TestStoreMustBeReachable(t *testing.T) {
	closed := "https://" + freeAddress(t)
	away := func(c *cluster) { c.StoreEndpoints = []string{closed} }
	oneAway := func(c *cluster) { c.StoreEndpoints = append([]string{closed}, c.StoreEndpoints...) }
	well := func(*cluster) {}
	for _, tc := range []struct {
		west, east func(*cluster)
		want       string // of the error
	}{
		{away, well, "west's etcd cannot be reached: TCP to "}, {well, away, "cluster west cannot reach this cluster's etcd: TCP to "}, {oneAway, oneAway, ""},
	} {
		west, east := newCluster(t, "west", 2, tc.west), newCluster(t, "east", 1, tc.east)
		e, err := east.connect(west.token(TokenOptions{}), ConnectOptions{})
		if tc.want == "" {
			if err != nil {
				t.Errorf("one endpoint of several is enough: %v\n%s", err, e)
			}
			continue
		}
		wantError(t, err, tc.want, "nothing listens there")
		if text := e.String(); !strings.Contains(text, "/tcp failed") || !regexp.MustCompile("TLS and chain .* skipped").MatchString(text) {
			t.Errorf("no check has failed, or none was skipped, in\n%s", text)
		}
		east.empty()
		west.empty()
	}
}

func TestOwnStoreAway(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	text := west.token(TokenOptions{})
	west.Store.(*kvstore.Memory).Disconnect()
	_, err := east.connect(text, ConnectOptions{})
	wantError(t, err, "cluster west does not answer: its own store does not answer; try again")
	west.Store.(*kvstore.Memory).Reconnect()
	east.Store.(*kvstore.Memory).Disconnect()
	_, err = east.connect(text, ConnectOptions{})
	wantError(t, err, "own store")
	east.Store.(*kvstore.Memory).Reconnect()
	if _, err := east.connect(text, ConnectOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestAskWithoutAPeer(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	east.mustConnect(west)
	record := east.peer("west")

	// It answers at an address that the record does not know.
	gone := record
	gone.Endpoints = []string{freeAddress(t)}
	east.Known = func(string) []string { return []string{west.endpoint} }
	_, err := east.Ask(t.Context(), gone)
	must(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	east.Known = nil
	_, err = east.Ask(ctx, gone)
	wantError(t, err, "cluster west cannot be reached", "connection refused")

	var checks []Check
	must(t, east.AskChecks(t.Context(), record, func(c Check) { checks = append(checks, c) }))
	if len(checks) != 1 || checks[0].From != "west" || checks[0].To != "east" {
		t.Errorf("checks %+v", checks)
	}
	west.setVerify(func(context.Context, Peer) error { return errors.New("no\x1b[31m echo") })
	err = east.AskChecks(t.Context(), record, func(Check) {})
	wantError(t, err, "as seen from cluster west: no [31m echo")
}

// TestNamesAreResolved: an endpoint may be a name, and one that is none is told as that.
func TestNamesAreResolved(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	_, port, err := net.SplitHostPort(west.endpoint)
	must(t, err)
	token, err := ParseToken(west.token(TokenOptions{}))
	must(t, err)
	token.Endpoints = []string{"no-such-host.invalid:7958", "localhost:" + port}
	e, err := east.connect(token.String(), ConnectOptions{})
	if err != nil {
		t.Fatalf("%v\n%s", err, e)
	}
	for _, line := range []string{
		"name resolution east→west no-such-host.invalid:7958/tcp failed", "the name is not known here",
		"TCP east→west no-such-host.invalid:7958/tcp skipped", "name resolution east→west localhost:" + port + "/tcp ok",
	} {
		if !strings.Contains(e.String(), line) {
			t.Errorf("no %q in\n%s", line, e)
		}
	}
}
