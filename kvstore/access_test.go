package kvstore

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// access returns a way to administer the store of p.
func (p *process) access(t testing.TB) *Access {
	t.Helper()
	a, err := OpenAccess(t.Context(), p.as(t, rootUser))
	must(t, err)
	t.Cleanup(func() { a.Close() })
	return a
}

// as returns the configuration of a client with a certificate of this user.
func (p *process) as(t testing.TB, user string) Config {
	t.Helper()
	cfg := p.client
	cfg.CertFile, cfg.KeyFile = p.ca.issue(t, user)
	return cfg
}

// dialAs returns a Store that is this user.
func (p *process) dialAs(t testing.TB, user string) Store {
	t.Helper()
	return p.dial(t, func(c *Config) { *c = p.as(t, user) })
}

// prepared starts a store that has the user agent, and returns it with that agent's Store.
func prepared(t *testing.T) (*process, *Access, Store) {
	t.Helper()
	p := startProcess(t)
	a := p.access(t)
	must(t, a.Prepare(t.Context(), "agent"))
	return p, a, p.dialAs(t, "agent")
}

func TestAccess(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p, a, agent := prepared(t)
	must(t, agent.Put(ctx, Prefix+"nodes/east/node1", []byte("1"), Leased))
	must(t, agent.Put(ctx, PrivatePrefix+"ca", []byte("2")))
	if err := agent.Put(ctx, "other", nil); !errors.Is(err, ErrDenied) {
		t.Errorf("an agent writes outside of what is Causeway's: %v", err)
	}
	stranger := p.dialAs(t, "client")
	if _, err := stranger.Get(ctx, Prefix+"nodes/east/node1"); !errors.Is(err, ErrDenied) {
		t.Errorf("a certificate without a user reads: %v", err)
	}
	must(t, a.GrantRead(ctx, "peer-west", Prefix))
	peer := p.dialAs(t, "peer-west")
	if entries, err := peer.List(ctx, Prefix); err != nil || len(entries) != 1 {
		t.Errorf("a peer lists %v, %v", entries, err)
	}
	for what, err := range map[string]error{
		"writes":                    peer.Put(ctx, Prefix+"nodes/east/node1", nil),
		"deletes":                   peer.Delete(ctx, Prefix+"nodes/east/node1"),
		"writes on a lease":         peer.Put(ctx, Prefix+"nodes/east/node1", nil, Leased),
		"reads what is private":     second(peer.List(ctx, PrivatePrefix)),
		"reads the private key":     second(peer.Get(ctx, PrivatePrefix+"ca")),
		"lists more than it may":    second(peer.List(ctx, "causeway/")),
		"lists all":                 second(peer.List(ctx, "")),
		"writes on a condition":     peer.Create(ctx, Prefix+"x", nil),
		"administers":               second(OpenAccess(ctx, p.as(t, "peer-west"))),
		"administers, as the agent": second(OpenAccess(ctx, p.as(t, "agent"))),
	} {
		if !errors.Is(err, ErrDenied) {
			t.Errorf("a peer %s: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestAccessOfAUserThatHadMore(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p, a, _ := prepared(t)
	must(t, a.GrantRead(ctx, "peer-west", "other/"))
	for _, role := range []string{"more", "another"} {
		_, err := a.client.RoleAdd(ctx, role)
		must(t, err)
		_, err = a.client.RoleGrantPermission(ctx, role, "x", "", clientv3.PermissionType(clientv3.PermReadWrite))
		must(t, err)
		_, err = a.client.UserGrantRole(ctx, "peer-west", role)
		must(t, err)
	}
	_, err := a.client.RoleGrantPermission(ctx, "peer-west", Prefix, clientv3.GetPrefixRangeEnd(Prefix), clientv3.PermissionType(clientv3.PermReadWrite))
	must(t, err)
	if readers, err := a.Readers(ctx); err != nil || len(readers) != 0 {
		t.Errorf("readers %v, %v", readers, err)
	}
	must(t, a.GrantRead(ctx, "peer-west", Prefix))
	peer := p.dialAs(t, "peer-west")
	for what, err := range map[string]error{
		"the prefix of before":        second(peer.List(ctx, "other/")),
		"another role's key":          second(peer.Get(ctx, "x")),
		"writing in what it may read": peer.Put(ctx, Prefix+"x", nil),
	} {
		if !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := peer.List(ctx, Prefix); err != nil {
		t.Error(err)
	}
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p, a, _ := prepared(t)
	must(t, a.GrantRead(ctx, "peer-west", Prefix))
	must(t, a.GrantRead(ctx, "peer-north", Prefix))
	if readers, err := a.Readers(ctx); err != nil || !slices.Equal(readers, []string{"peer-north", "peer-west"}) {
		t.Errorf("readers %v, %v", readers, err)
	}
	peer := p.dialAs(t, "peer-west")
	_, err := peer.List(ctx, Prefix)
	must(t, err)
	for range 2 {
		must(t, a.Revoke(ctx, "peer-west"))
	}
	if _, err := peer.List(ctx, Prefix); !errors.Is(err, ErrDenied) {
		t.Errorf("a revoked user reads: %v", err)
	}
	if readers, err := a.Readers(ctx); err != nil || !slices.Equal(readers, []string{"peer-north"}) {
		t.Errorf("readers %v, %v", readers, err)
	}
	roles, err := a.client.RoleList(ctx)
	must(t, err)
	if slices.Contains(roles.Roles, "peer-west") {
		t.Errorf("roles that are left: %v", roles.Roles)
	}
}

// TestPrepareByMany has several processes do it at once, first on a store that is half done, and with users coming and going meanwhile.
func TestPrepareByMany(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p := startProcess(t)
	half := p.access(t)
	must(t, half.addUser(ctx, rootUser))
	must(t, half.addRole(ctx, "agent"))
	for round := range 2 {
		var wg sync.WaitGroup
		for range 4 {
			a := p.access(t)
			wg.Go(func() {
				if err := a.Prepare(ctx, "agent"); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
			if round == 1 {
				wg.Go(func() {
					if err := errors.Join(a.GrantRead(ctx, "peer-west", Prefix), a.Revoke(ctx, "peer-"+time.Now().String())); err != nil {
						t.Errorf("round %d: %v", round, err)
					}
				})
			}
		}
		wg.Wait()
	}
	must(t, p.dialAs(t, "agent").Put(ctx, Prefix+"x", nil))
	_, err := p.dialAs(t, "peer-west").List(ctx, Prefix)
	must(t, err)
}

// TestUsersChangeUnderRequests: etcd refuses requests that were under way when any user changed, and nobody may notice.
func TestUsersChangeUnderRequests(t *testing.T) {
	t.Parallel()
	p, a, agent := prepared(t)
	must(t, a.GrantRead(t.Context(), "peer-west", Prefix))
	peer := p.dialAs(t, "peer-west")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel()
		for range 20 {
			if err := errors.Join(a.GrantRead(t.Context(), "peer-north", Prefix), a.Revoke(t.Context(), "peer-north")); err != nil {
				t.Error(err)
			}
		}
	})
	for ctx.Err() == nil {
		if err := agent.Put(t.Context(), Prefix+"x", nil, Leased); err != nil {
			t.Fatal(err)
		}
		if _, err := peer.List(t.Context(), Prefix); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	for _, s := range []Store{agent, peer} {
		if status := s.Status(); !status.Connected || status.Denied || status.Reconnects != 0 {
			t.Errorf("status %+v", status)
		}
	}
}

func TestAccessSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p, a, _ := prepared(t)
	for _, tc := range []struct {
		err  error
		is   error
		want string
	}{
		{second(OpenAccess(ctx, p.as(t, "peer-west"))), ErrDenied, "takes a certificate of the user root"},
		{a.GrantRead(ctx, "root", Prefix), nil, "choose another name"},
		{a.GrantRead(ctx, "", Prefix), nil, "needs a name"},
		{a.GrantRead(ctx, "peer-west", ""), nil, "prefix is empty"},
		{a.Revoke(ctx, "root"), nil, "choose another name"},
		{a.Prepare(ctx, "root"), nil, "choose another name"},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) || tc.is != nil && !errors.Is(tc.err, tc.is) {
			t.Errorf("got %v, want %q", tc.err, tc.want)
		}
	}
	gone := p.as(t, rootUser)
	gone.Endpoints, gone.RequestTimeout = []string{freeAddress(t)}, 300*time.Millisecond
	if _, err := OpenAccess(ctx, gone); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("without a server: %v", err)
	}
}
