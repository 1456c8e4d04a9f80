package peering

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"causeway/clustermesh/gossip"
	"causeway/identity"
	"causeway/identity/pki"
	"causeway/kvstore"
)

// serverEnv makes the test binary run an etcd server, with the certificates of a directory, instead of the tests.
const serverEnv = "CAUSEWAY_PEERING_TEST_SERVER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(serverEnv); dir != "" {
		os.Exit(serverMain(dir))
	}
	goleak.VerifyTestMain(m)
}

func serverMain(dir string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	cfg := kvstore.ServerConfig{
		DataDir: filepath.Join(dir, "data"), ListenClient: os.Getenv(serverEnv + "_LISTEN"), UnsafeNoFsync: true, LogLevel: "error",
		CAFile: filepath.Join(dir, "ca.crt"), CertFile: filepath.Join(dir, "server.crt"), KeyFile: filepath.Join(dir, "server.key"),
		Ready: func(net.Addr) { fmt.Println("ready") },
	}
	if err := kvstore.Serve(ctx, cfg); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mustGet returns a value that there must be.
func mustGet[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		must(t, err)
		return v
	}
}

func wantError(t testing.TB, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("got %v, want an error with %q", err, part)
		}
	}
}

// clock is one that can be set.
type clock struct {
	mu    sync.Mutex
	ahead time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.ahead)
}

func (c *clock) set(ahead time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead = ahead
}

// cluster is one with a single node.
type cluster struct {
	*Service
	t         testing.TB
	clock     *clock
	authority *pki.Authority
	endpoint  string
	stop      func()

	mu      sync.Mutex
	keys    [][]byte
	verify  func(ctx context.Context, p Peer) error
	users   map[string]string // of a store in memory: what they may read
	ringAt  uint64            // of keys; 0: nobody has agreed on them
	noAdmin error
	forgot  []string
	log     strings.Builder
}

// newCluster starts one with a store in memory, and something that speaks TLS where its etcd would be.
func newCluster(t testing.TB, name string, id identity.ClusterID, change ...func(*cluster)) *cluster {
	c := bareCluster(t, name, id)
	c.authority = mustGet[*pki.Authority](t)(pki.NewAuthority(name, time.Now()))
	memory := kvstore.NewMemory()
	t.Cleanup(func() { memory.Close() })
	c.Store = memory
	c.Administer = func(context.Context, *pki.Authority) (Administrator, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return (*memoryAccess)(c), c.noAdmin
	}
	c.StoreEndpoints = []string{"https://" + c.tlsListener()}
	for _, change := range change {
		change(c)
	}
	c.start()
	return c
}

// newEtcdCluster starts one with an etcd in a process of its own.
func newEtcdCluster(t testing.TB, name string, id identity.ClusterID) *cluster {
	c := bareCluster(t, name, id)
	dir := t.TempDir()
	c.authority = mustGet[*pki.Authority](t)(pki.Ensure(dir, name, []string{"127.0.0.1"}, time.Now()))
	address := freeAddress(t)
	startEtcd(t, dir, address)
	c.StoreEndpoints = []string{"https://" + address}
	c.Administer = func(ctx context.Context, authority *pki.Authority) (Administrator, error) {
		return c.root(ctx, authority)
	}
	access := mustGet[*kvstore.Access](t)(c.root(t.Context(), c.authority))
	must(t, access.Prepare(t.Context(), pki.UserAgent))
	must(t, access.Close())
	c.Store = c.dial(c.authority, mustGet[pki.Pair](t)(c.authority.Issue(pki.Request{User: pki.UserAgent}, time.Now())))
	c.start()
	return c
}

func (c *cluster) root(ctx context.Context, authority *pki.Authority) (*kvstore.Access, error) {
	pair, err := authority.Issue(pki.Request{User: pki.UserRoot, Validity: time.Hour}, time.Now())
	if err != nil {
		return nil, err
	}
	return kvstore.OpenAccess(ctx, c.storeConfig(authority.Cert, pair))
}

func (c *cluster) storeConfig(authority *x509.Certificate, pair pki.Pair) kvstore.Config {
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	cert := mustGet[tls.Certificate](c.t)(pair.TLS())
	return kvstore.Config{Endpoints: c.StoreEndpoints, TLS: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}}
}

func (c *cluster) dial(authority *pki.Authority, pair pki.Pair) kvstore.Store {
	store := mustGet[kvstore.Store](c.t)(kvstore.Dial(context.Background(), c.storeConfig(authority.Cert, pair)))
	c.t.Cleanup(func() { store.Close() })
	return store
}

func bareCluster(t testing.TB, name string, id identity.ClusterID) *cluster {
	c := &cluster{t: t, clock: &clock{}, users: map[string]string{}, keys: [][]byte{gossip.NewKey()}, ringAt: 1}
	info := sampleInfo(name, id)
	c.Service = New(Config{
		Self: identity.NodeName{Cluster: name, Node: "node1"}, Mesh: "causeway", Cluster: func() identity.ClusterInfo { return info },
		Endpoints: func() []string { return []string{c.endpoint} },
		Ring: func() gossip.Ring {
			c.mu.Lock()
			defer c.mu.Unlock()
			return gossip.Ring{At: c.ringAt, Keys: c.keys}
		},
		Adopt: func(_ context.Context, keys [][]byte) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.keys = keys
			return nil
		},
		Verify: func(ctx context.Context, p Peer, wait bool, report func(Check)) error {
			report(Check{Name: CheckPods, From: name, To: p.Name(), Outcome: OK})
			c.mu.Lock()
			verify := c.verify
			c.mu.Unlock()
			if verify != nil {
				return verify(ctx, p)
			}
			return nil
		},
		Report: func(peer string) Report {
			return Report{At: c.clock.now(), Node: identity.NodeName{Cluster: name, Node: "node1"}, Problems: []string{"none with " + peer}, RTT: time.Millisecond, MTU: 1450}
		},
		Forgotten: func(_ context.Context, cluster string) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.forgot = append(c.forgot, cluster)
			return nil
		},
		Now: c.clock.now, Log: slog.New(slog.NewTextHandler(&logWriter{c}, nil)),
	})
	return c
}

// logWriter keeps what the service logs, to look for secrets.
type logWriter struct{ c *cluster }

func (w *logWriter) Write(line []byte) (int, error) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	return w.c.log.Write(line)
}

func (c *cluster) logged() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.String()
}

// start serves the API until the test ends or stop is called; start again is at another port.
func (c *cluster) start() {
	must(c.t, StoreAuthority(c.t.Context(), c.Store, c.authority))
	listener := mustGet[net.Listener](c.t)(net.Listen("tcp", "127.0.0.1:0"))
	c.endpoint = listener.Addr().String()
	c.serveOn(listener)
}

func (c *cluster) serveOn(listener net.Listener) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx, listener) }()
	c.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			c.t.Errorf("Run of %s: %v", c.Self.Cluster, err)
		}
	})
	c.t.Cleanup(c.stop)
	eventually(c.t, "the authority is known", func() bool { _, err := c.serverTLS(nil); return err == nil })
}

// comeBack serves again where it did before.
func (c *cluster) comeBack() {
	c.serveOn(mustGet[net.Listener](c.t)(net.Listen("tcp", c.endpoint)))
}

func (c *cluster) setVerify(verify func(context.Context, Peer) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.verify = verify
}

func (c *cluster) token(o TokenOptions) string {
	c.t.Helper()
	return mustGet[Token](c.t)(c.CreateToken(c.t.Context(), o)).String()
}

// peer returns the record of a peer that there must be.
func (c *cluster) peer(name string) Peer {
	c.t.Helper()
	p, found, err := c.record(c.t.Context(), name)
	if err != nil || !found {
		c.t.Fatalf("%s has no record of %s: %v", c.Self.Cluster, name, err)
	}
	return p.Peer
}

// state of a peer; empty if there is no record.
func (c *cluster) state(name string) State {
	c.t.Helper()
	p, _, err := c.record(c.t.Context(), name)
	must(c.t, err)
	return p.State
}

// readers lists the users that peers have.
func (c *cluster) readers() []string {
	c.t.Helper()
	if _, memory := c.Store.(*kvstore.Memory); memory {
		c.mu.Lock()
		defer c.mu.Unlock()
		return slices.Sorted(maps.Keys(c.users))
	}
	access := mustGet[*kvstore.Access](c.t)(c.root(c.t.Context(), c.authority))
	defer access.Close()
	return mustGet[[]string](c.t)(access.Readers(c.t.Context()))
}

// events keeps what a connect reports.
type events struct {
	mu  sync.Mutex
	all []Event
}

func (e *events) report(event Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, event)
}

// String has a line for each.
func (e *events) String() string {
	var text strings.Builder
	for _, event := range e.all {
		fmt.Fprintf(&text, "%s %s: %s", event.Stage, event.Peer, event.Text)
		if c := event.Check; c != nil {
			fmt.Fprintf(&text, "%s %s→%s %s %s %s %s", c.Name, c.From, c.To, c.Target, c.Outcome, c.Detail, c.Cause)
		}
		text.WriteByte('\n')
	}
	return text.String()
}

func (c *cluster) connect(token string, o ConnectOptions) (*events, error) {
	e := &events{}
	return e, c.Connect(c.t.Context(), token, o, e.report)
}

func (c *cluster) mustConnect(to *cluster) {
	c.t.Helper()
	if e, err := c.connect(to.token(TokenOptions{}), ConnectOptions{}); err != nil {
		c.t.Fatalf("connect %s with %s: %v\n%s", c.Self.Cluster, to.Self.Cluster, err, e)
	}
}

// memoryAccess administers the users of a store in memory.
type memoryAccess cluster

func (a *memoryAccess) GrantRead(_ context.Context, user, prefix string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.users[user] = prefix
	return nil
}

func (a *memoryAccess) Revoke(_ context.Context, user string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.users, user)
	return nil
}

func (a *memoryAccess) Close() error { return nil }

// tlsListener completes TLS handshakes as a store's server would, and nothing else.
func (c *cluster) tlsListener() string {
	pair := mustGet[pki.Pair](c.t)(c.authority.Issue(pki.Request{User: "server", Server: true, Hosts: []string{"127.0.0.1"}, Validity: 365 * 24 * time.Hour}, time.Now()))
	cert := mustGet[tls.Certificate](c.t)(pair.TLS())
	listener := mustGet[net.Listener](c.t)(tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}))
	acceptAll(c.t, listener, func(conn net.Conn) { _ = conn.(*tls.Conn).Handshake() })
	return listener.Addr().String()
}

// acceptAll handles every connection until the test ends.
func acceptAll(t testing.TB, listener net.Listener, handle func(net.Conn)) {
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(t.Context(), func() { conn.Close() })
			all.Go(func() {
				defer stop()
				defer conn.Close()
				handle(conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		all.Wait()
	})
}

func startEtcd(t testing.TB, dir, address string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverEnv+"="+dir, serverEnv+"_LISTEN="+address)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); strings.TrimSpace(line) != "ready" {
		t.Fatalf("etcd did not start: %q, %v", line, err)
	}
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l := mustGet[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return l.Addr().String()
}

// eventually polls what has no channel to wait for.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

var errSilent = errors.New("no echo came back")

func mustCert(t testing.TB, text string) *x509.Certificate {
	t.Helper()
	return mustGet[*x509.Certificate](t)(pki.ParseCert([]byte(text)))
}

// callAs asks a cluster as somebody who has a certificate of its authority for a user.
func (c *cluster) callAs(t testing.TB, to *cluster, user string, ask func(*link) error) error {
	t.Helper()
	pair := mustGet[pki.Pair](t)(to.authority.Issue(pki.Request{User: user}, time.Now()))
	cert := mustGet[tls.Certificate](t)(pair.TLS())
	l, err := c.reach(t.Context(), pinned{cluster: to.Self.Cluster, authority: to.authority.Fingerprint(), cert: &cert}, []string{to.endpoint})
	must(t, err)
	defer l.Close()
	return fromPeer(to.Self.Cluster, ask(l))
}
