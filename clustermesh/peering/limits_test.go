package peering

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// closedWithin tells how long it takes until the other side closes a connection, whatever it sends until then.
func closedWithin(t testing.TB, conn net.Conn, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	must(t, conn.SetReadDeadline(began.Add(limit)))
	if _, err := io.Copy(io.Discard, conn); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("still open after %s", limit)
	}
	return time.Since(began)
}

// secured opens a connection as somebody who knows the cluster's authority, and nothing else.
func (c *cluster) secured() *tls.Conn {
	who := pinned{cluster: c.Self.Cluster, authority: c.authority.Fingerprint(), by: "token"}
	conn := mustGet[*tls.Conn](c.t)(c.dialTLS(c.t.Context(), who, c.endpoint))
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

func (c *cluster) connection() net.Conn {
	conn := mustGet[net.Conn](c.t)(net.Dial("tcp", c.endpoint))
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

// TestSlowConnectionsAreClosed: whoever connects and does not ask for something soon.
func TestSlowConnectionsAreClosed(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	c, _ := joinRequest(t, east, west.token(TokenOptions{}))
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	half := west.connection()
	_, err := half.Write([]byte("\x16\x03\x01\x02\x00\x01")) // the beginning of a ClientHello
	must(t, err)
	greeted := west.secured()
	_, err = greeted.Write([]byte(preface + settings))
	must(t, err)
	trickle := west.secured()
	var all sync.WaitGroup
	for name, conn := range map[string]net.Conn{"silent": west.connection(), "half a handshake": half, "no request": west.secured(), "no request after HTTP/2's": greeted, "trickle": trickle} {
		all.Go(func() {
			if took := closedWithin(t, conn, 2*firstRequest); took > firstRequest+2*time.Second {
				t.Errorf("%s: closed after %s", name, took)
			}
		})
	}
	all.Go(func() {
		for i := 0; ; i++ { // one byte after the other, as slowly as it gets
			if _, err := trickle.Write([]byte{preface[i%len(preface)]}); err != nil || i == len(preface)-2 {
				return
			}
			select {
			case <-t.Context().Done():
				return
			case <-time.After(firstRequest / 10):
			}
		}
	})
	all.Wait()

	// Who has asked for something in time is left alone.
	if _, err := c.ask(t.Context(), false); err != nil {
		t.Error(err)
	}
}

func TestConnectionsOfAnAddressAreBounded(t *testing.T) {
	west := newCluster(t, "west", 2)
	var open []net.Conn
	for range maxConnectionsPerAddress {
		open = append(open, west.secured())
	}
	if took := closedWithin(t, west.connection(), firstRequest); took > firstRequest/2 {
		t.Errorf("one too many is closed after %s", took)
	}
	open[0].Close()
	who := pinned{cluster: "west", authority: west.authority.Fingerprint()}
	eventually(t, "there is room again", func() bool {
		conn, err := west.dialTLS(t.Context(), who, west.endpoint)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

func TestSources(t *testing.T) {
	at := func(address string) net.Addr { return mustGet[*net.TCPAddr](t)(net.ResolveTCPAddr("tcp", address)) }
	for _, tc := range []struct {
		a, b string
		same bool
	}{
		{"10.0.0.1:1", "10.0.0.1:2", true}, {"10.0.0.1:1", "10.0.0.2:1", false}, {"[::ffff:10.0.0.1]:1", "10.0.0.1:1", true},
		{"[fd00::1]:1", "[fd00::2:1]:1", true}, {"[fd00::1]:1", "[fd00:0:0:1::1]:1", false},
	} {
		if got := sourceOf(at(tc.a)) == sourceOf(at(tc.b)); got != tc.same {
			t.Errorf("%s and %s: %v", tc.a, tc.b, got)
		}
	}
	l := limitListener(nil, newFirstRequests())
	for i := range maxConnections {
		if !l.take(sourceOf(at(fmt.Sprintf("10.0.%d.1:1", i)))) {
			t.Fatalf("%d is too many", i)
		}
	}
	if l.take(sourceOf(at("10.1.0.1:1"))) {
		t.Error("more than there may be")
	}
}

func TestHugeMessagesAreRefused(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	c, _ := joinRequest(t, east, west.token(TokenOptions{}))
	_, err := c.link.Look(t.Context(), &LookRequest{Token: c.credential(), Joiner: &Side{Mesh: strings.Repeat("x", maxMessage+1)}})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
	if _, err := c.ask(t.Context(), false); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// TestGuessing: after a few tokens that are none nobody at that address is listened to for a minute.
func TestGuessing(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	c, _ := joinRequest(t, east, west.token(TokenOptions{}))
	right := c.token
	for range maxFailures {
		c.token.Secret = newToken().Secret
		_, err := c.ask(t.Context(), false)
		wantError(t, err, "the token is not known here")
	}
	c.token = right
	_, err := c.ask(t.Context(), false)
	wantError(t, err, "too many tokens were refused that came from this address: wait a minute")
	west.clock.set(failuresWithin + time.Second)
	if _, err := c.ask(t.Context(), false); err != nil {
		t.Errorf("a minute later: %v", err)
	}
}

// TestChecksForOthersAreBounded: a peer that asks for many at once does not make this node do all of them at once.
func TestChecksForOthersAreBounded(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	east.mustConnect(west)
	begun, release := make(chan struct{}, maxVerifying+1), make(chan struct{})
	west.setVerify(func(context.Context, Peer) error {
		begun <- struct{}{}
		<-release
		return nil
	})
	p := east.peer("west")
	ask := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		return east.AskChecks(ctx, p, func(Check) {})
	}
	var all sync.WaitGroup
	for range maxVerifying {
		all.Go(func() {
			if err := ask(time.Minute); err != nil {
				t.Error(err)
			}
		})
		<-begun
	}
	wantError(t, ask(time.Second), "it makes checks for others already; try again")
	if len(begun) != 0 {
		t.Error("one more has begun")
	}
	close(release)
	all.Wait()
	must(t, ask(time.Minute))
}

// TestStrangersGetNothing: what is for peers needs a certificate of the own authority, and one that a record names.
func TestStrangersGetNothing(t *testing.T) {
	west, east := newCluster(t, "west", 2), newCluster(t, "east", 1)
	c, _ := joinRequest(t, east, west.token(TokenOptions{}))
	ctx := t.Context()
	calls := map[string]func(*link) error{
		"confirm":   func(l *link) error { return second(l.Confirm(ctx, &ConfirmRequest{})) },
		"report":    func(l *link) error { return second(l.Report(ctx, &ReportRequest{})) },
		"renew":     func(l *link) error { return second(l.Renew(ctx, &RenewRequest{})) },
		"leave":     func(l *link) error { return second(l.Leave(ctx, &LeaveRequest{})) },
		"introduce": func(l *link) error { return second(l.Introduce(ctx, &IntroduceRequest{To: "north"})) },
		"invite":    func(l *link) error { return second(l.Invite(ctx, &InviteRequest{Cluster: "north"})) },
		"verify": func(l *link) error {
			return east.remoteVerify(ctx, l, false, func(Check) {})
		},
	}
	for name, call := range calls {
		if err := call(c.link); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s without a certificate: %v", name, err)
		}
	}
	east.mustConnect(west)
	p := east.peer("west")
	for _, user := range []string{"agent", "root", "peer-east-aaaaaaaa", "peer-north-aaaaaaaa"} {
		for name, call := range calls {
			if err := east.callAs(t, west, user, call); !errors.Is(err, ErrLeft) {
				t.Errorf("%s as %s: %v", name, user, err)
			}
		}
	}
	if got := west.peer("east"); got.State != Connected || got.User == "" || p.State != Connected {
		t.Errorf("west's record is now %+v", got)
	}
}
