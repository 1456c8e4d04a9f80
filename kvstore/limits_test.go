package kvstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
)

// rawAs returns a plain etcd client that is this user.
func (p *process) rawAs(t testing.TB, user string) *clientv3.Client {
	t.Helper()
	cfg := p.as(t, user)
	must(t, cfg.complete())
	client, err := newClient(cfg)
	must(t, err)
	t.Cleanup(func() { client.Close() })
	return client
}

// TestRevokedUserIsCutOff has a peer watch when its user is removed, and when it gets one again.
func TestRevokedUserIsCutOff(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p, a, agent := prepared(t)
	must(t, a.GrantRead(ctx, "peer-west", Prefix))
	peer := p.dialAs(t, "peer-west")
	watch := follow(t, peer, Prefix)
	watch.want("listed: ")
	must(t, agent.Put(ctx, Prefix+"a", []byte("1")))
	watch.want("put causeway/v1/a=1")
	raw := p.rawAs(t, "peer-west").Watch(ctx, Prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-raw
	own := follow(t, agent, Prefix)
	own.want("listed: put causeway/v1/a=1")

	began := time.Now()
	must(t, a.Revoke(ctx, "peer-west"))
	select {
	case resp, open := <-raw:
		if open && !denied(resp.Err()) {
			t.Errorf("the watch was told %v", resp.Err())
		}
	case <-time.After(time.Second):
		t.Error("the watch of a revoked user goes on")
	}
	must(t, agent.Put(ctx, Prefix+"a", []byte("2")))
	own.want("put causeway/v1/a=2")
	var status Status
	eventually(t, 2*time.Second, "the peer sees that it is denied, by its watch and by its health check", func() bool {
		status = peer.Status()
		return status.Denied && !status.Connected
	})
	t.Logf("denied after %s", time.Since(began).Round(time.Millisecond))
	if !strings.Contains(status.LastError, `no user for our certificate of "peer-west"`) || !strings.Contains(status.LastError, "was disconnected there") {
		t.Errorf("status %+v", status)
	}
	watch.wantNothing(300 * time.Millisecond)
	if s := agent.Status(); !s.Connected || s.Denied {
		t.Errorf("status of an agent: %+v", s)
	}

	must(t, a.GrantRead(ctx, "peer-west", Prefix))
	watch.want("put causeway/v1/a=2") // a difference or an event, whichever way it was found
	eventually(t, 2*time.Second, "the peer sees that it is let in again", func() bool {
		s := peer.Status()
		return s.Connected && !s.Denied && s.LastError == ""
	})
}

func TestUserThatLosesARoleIsCutOff(t *testing.T) {
	t.Parallel()
	for name, take := range map[string]func(context.Context, *Access) error{
		"permission of the role": func(ctx context.Context, a *Access) error { return a.GrantRead(ctx, "peer-west", "other/") },
		"role of the user": func(ctx context.Context, a *Access) error {
			return second(a.client.UserRevokeRole(ctx, "peer-west", "peer-west"))
		},
		"role": func(ctx context.Context, a *Access) error { return second(a.client.RoleDelete(ctx, "peer-west")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			p, a, agent := prepared(t)
			must(t, a.GrantRead(ctx, "peer-west", Prefix))
			must(t, a.GrantRead(ctx, "peer-north", Prefix))
			west := p.rawAs(t, "peer-west").Watch(ctx, Prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
			north := p.rawAs(t, "peer-north").Watch(ctx, Prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
			<-west
			<-north
			must(t, take(ctx, a))
			select {
			case resp, open := <-west:
				if open && !denied(resp.Err()) {
					t.Errorf("the watch was told %v", resp.Err())
				}
			case <-time.After(time.Second):
				t.Error("the watch goes on")
			}
			must(t, agent.Put(ctx, Prefix+"a", nil))
			if resp := <-north; len(resp.Events) != 1 {
				t.Errorf("another peer's watch got %+v", resp)
			}
		})
	}
}

// TestWatchFromBeforeUsers was begun when everybody with a certificate might read everything.
func TestWatchFromBeforeUsers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p := startProcess(t)
	raw := p.rawAs(t, "peer-west").Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-raw
	must(t, p.access(t).Prepare(ctx, "agent"))
	select {
	case resp, open := <-raw:
		if open && !denied(resp.Err()) {
			t.Errorf("the watch was told %v", resp.Err())
		}
	case <-time.After(time.Second):
		t.Error("the watch goes on")
	}
}

func TestDeniedWatchIsToldInStatus(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p, a, _ := prepared(t)
	must(t, a.GrantRead(ctx, "peer-west", Prefix))
	peer := p.dialAs(t, "peer-west")
	watchCtx, cancel := context.WithCancel(ctx)
	out := peer.Watch(watchCtx, PrivatePrefix)
	eventually(t, 5*time.Second, "status tells of a watch that is denied", func() bool {
		s := peer.Status()
		return s.Connected && s.Denied && strings.Contains(s.LastError, PrivatePrefix)
	})
	cancel()
	for range out {
		t.Error("a watch delivers what is denied")
	}
	eventually(t, 5*time.Second, "the watch is forgotten", func() bool { return !peer.Status().Denied })
}

// TestLimitedUser is about what needs no right of etcd's, or could be done before there are any.
func TestLimitedUser(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p := startProcess(t)
	peer := p.rawAs(t, "peer-west")
	for _, prepare := range []bool{false, true} {
		if prepare {
			a := p.access(t)
			must(t, a.Prepare(ctx, "agent"))
			must(t, a.GrantRead(ctx, "peer-west", Prefix))
		}
		if _, err := peer.Get(ctx, Prefix, clientv3.WithPrefix()); err != nil {
			t.Errorf("read: %v", err)
		}
		for what, err := range map[string]error{
			"put":          second(peer.Put(ctx, Prefix+"x", "")),
			"delete":       second(peer.Delete(ctx, Prefix+"x")),
			"empty txn":    second(peer.Txn(ctx).Commit()),
			"compact":      second(peer.Compact(ctx, 1)),
			"lease":        second(peer.Grant(ctx, 100)),
			"leases":       second(peer.Leases(ctx)),
			"members":      second(peer.MemberList(ctx)),
			"status":       second(peer.Status(ctx, peer.Endpoints()[0])),
			"alarms":       second(peer.AlarmList(ctx)),
			"users":        second(peer.UserList(ctx)),
			"own user":     second(peer.UserGet(ctx, "peer-west")),
			"enable":       second(peer.AuthEnable(ctx)),
			"authenticate": second(peer.Authenticate(ctx, "peer-west", "x")),
			"long key":     second(peer.Get(ctx, strings.Repeat("x", limitedKey+1))),
			"snapshot":     snapshot(ctx, peer),
		} {
			wantCode := codes.PermissionDenied
			if what == "long key" {
				wantCode = codes.InvalidArgument
			}
			if errorCode(err) != wantCode || what != "long key" && !strings.Contains(err.Error(), `the user "peer-west" may read and watch, and not call`) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

func snapshot(ctx context.Context, c *clientv3.Client) error {
	r, err := c.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = r.Read(make([]byte, 1))
	return err
}

func TestLimitedUserCannotPileUpWatches(t *testing.T) {
	t.Parallel()
	p, a, _ := prepared(t)
	must(t, a.GrantRead(t.Context(), "peer-west", Prefix))
	watches := pb.NewWatchClient(p.rawAs(t, "peer-west").ActiveConnection())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	stream, err := watches.Watch(ctx)
	must(t, err)
	for range limitedWatches + 1 {
		must(t, stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(Prefix)}}}))
	}
	for n := 0; err == nil; n++ {
		if _, err = stream.Recv(); n > limitedWatches {
			t.Fatal("more watches than allowed were begun")
		}
	}
	if errorCode(err) != codes.ResourceExhausted {
		t.Errorf("too many watches: %v", err)
	}

	var refused error
	for n := 0; n <= limitedCalls && refused == nil; n++ {
		stream, err := watches.Watch(ctx)
		must(t, err)
		err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(Prefix)}}})
		if !errors.Is(err, io.EOF) { // which says that the stream is refused already, and Recv why
			must(t, err)
		}
		if _, refused = stream.Recv(); refused != nil && n < limitedCalls {
			t.Errorf("stream %d: %v", n, refused)
		}
	}
	if errorCode(refused) != codes.ResourceExhausted {
		t.Errorf("too many streams: %v", refused)
	}
	// Another connection is not concerned, and this one is served again when some have ended.
	_, err = p.dialAs(t, "peer-west").List(t.Context(), Prefix)
	must(t, err)
	cancel()
	eventually(t, 5*time.Second, "calls are counted down", func() bool {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := watches.Watch(ctx)
		must(t, err)
		must(t, stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(Prefix)}}}))
		_, err = stream.Recv()
		return err == nil
	})
}

func TestDeniedErrorsKeepTheCause(t *testing.T) {
	t.Parallel()
	p, _, _ := prepared(t)
	_, err := p.dialAs(t, "peer-west").Get(t.Context(), Prefix+"a")
	if !errors.Is(err, ErrDenied) || !strings.Contains(fmt.Sprint(err), "permission denied") || errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
