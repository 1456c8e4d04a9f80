package kvstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/auth"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"google.golang.org/grpc"
)

// ServerConfig of the embedded etcd server: the only member, for test-beds, demos and small clusters, or one of several.
type ServerConfig struct {
	// Name of the member, "kvstore" if empty.
	Name string
	// DataDir holds everything; created with mode 0700 if missing.
	DataDir string
	// ListenClient is the "host:port" where clients are served, over TLS only.
	ListenClient string
	// AdvertiseClient is the "host:port" told to clients that ask for members, ListenClient if empty.
	AdvertiseClient string
	// CAFile, CertFile and KeyFile are PEM files: the authority whose certificates clients must show,
	// and the server's own certificate and key, which are read again for every connection.
	CAFile, CertFile, KeyFile string
	// Members are all that there are; zero if this is the only one.
	Members MembersConfig
	// ListenHealth is the "host:port" where GET /livez and /readyz are answered, and /metrics, by HTTP and to everybody: on the loopback. Default: none.
	ListenHealth string
	// UnsafeNoFsync leaves writing to disk to the operating system. The data survives
	// the death of the process, kill -9 included, but not that of the machine or a power cut.
	UnsafeNoFsync bool
	// AutoCompaction is how much history is kept for watches that lost their connection, 10 minutes if 0.
	// Watches that need more list anew.
	AutoCompaction time.Duration
	// LogLevel of etcd's own log: debug, info, warn (if empty) or error. LogOutput is stderr if nil.
	LogLevel  string
	LogOutput io.Writer
	// Limited tells of a user (the common name of a client's certificate) whether it may at best read and watch, whatever etcd would let it do: the users of
	// other clusters. Nil is nobody.
	Limited func(user string) bool
	// Ready, if not nil, is called once when clients are served, with the address.
	Ready func(net.Addr)
}

const (
	// A single member elects itself, after an election timeout that is drawn from 1 to 2 times this, of which etcd
	// skips the first. No other member can be upset by a short one; shorter ticks would cost CPU in idleness.
	tickMs     = 100
	electionMs = 500
	// walSegment is preallocated, twice, as soon as the server starts; etcd's 64 MB are much for a memory file system.
	walSegment = 16 << 20
	// progressInterval of idle watches, so that after a lost connection they go on from a
	// revision that isn't compacted yet.
	progressInterval = time.Minute
	startTimeout     = 30 * time.Second
)

// Serve runs an etcd server until ctx ends, and then stops it gracefully and returns nil. It fails if the server
// can't be started, saying what is missing or in the way, or if it breaks down later.
func Serve(ctx context.Context, cfg ServerConfig) error {
	if err := cfg.complete(); err != nil {
		return err
	}
	unlock, err := lockDataDir(cfg.DataDir)
	if err != nil {
		return err
	}
	defer unlock()
	streams := newStreams()
	wal.SegmentSizeBytes = walSegment
	server, err := startServer(cfg, streams)
	if err != nil {
		return err
	}
	defer server.Close()
	defer streams.end()
	timeout := startTimeout
	if cfg.Members.several() {
		timeout = membersStartTimeout
		ctx, stop := context.WithCancel(ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			streams.watchRights(ctx, server.Server.AuthStore().Revision, cfg.Limited)
		}()
		defer func() { stop(); <-watched }()
	}
	started := time.NewTimer(timeout)
	defer started.Stop()
	select {
	case <-server.Server.ReadyNotify():
	case <-started.C:
		if cfg.Members.several() {
			return fmt.Errorf("kvstore: etcd did not get ready within %s: more than half of its members have to be reached, see its log", timeout)
		}
		return fmt.Errorf("kvstore: etcd did not get ready within %s: see its log, and try an empty --data-dir instead of %s", timeout, cfg.DataDir)
	case err := <-server.Err():
		return cfg.explain(err)
	case <-ctx.Done():
		return nil
	}
	if cfg.Ready != nil {
		cfg.Ready(server.Clients[0].Addr())
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-server.Err():
		return cfg.explain(err)
	case <-server.Server.StopNotify():
		return errors.New("kvstore: etcd stopped by itself: see its log for the reason")
	}
}

// complete fills in defaults and checks what can be checked beforehand.
func (c *ServerConfig) complete() error {
	if c.Name == "" {
		c.Name = "kvstore"
	}
	if c.AdvertiseClient == "" {
		c.AdvertiseClient = c.ListenClient
	}
	if c.AutoCompaction == 0 {
		c.AutoCompaction = 10 * time.Minute
	}
	if c.LogLevel == "" {
		c.LogLevel = "warn"
	}
	if c.LogOutput == nil {
		c.LogOutput = os.Stderr
	}
	if c.DataDir == "" {
		return errors.New("kvstore: no data directory: give --data-dir")
	}
	if _, _, err := net.SplitHostPort(c.ListenClient); err != nil {
		return fmt.Errorf("kvstore: listen address %q: %w: give --listen-client host:port", c.ListenClient, err)
	}
	if err := c.Members.check(c.Name); err != nil {
		return err
	}
	if c.ListenHealth != "" {
		if _, _, err := net.SplitHostPort(c.ListenHealth); err != nil {
			return fmt.Errorf("kvstore: listen address for health %q: %w: give --listen-health host:port", c.ListenHealth, err)
		}
	}
	// The files are what a client needs too, so check them in the same way.
	client := Config{Endpoints: []string{c.ListenClient}, CAFile: c.CAFile, CertFile: c.CertFile, KeyFile: c.KeyFile}
	return client.complete()
}

// lockDataDir makes sure that no other process uses the directory: etcd itself would wait for it without a word.
func lockDataDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("kvstore: create data directory: %w", err)
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("kvstore: lock data directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("kvstore: data directory %s is in use by another process (%w): stop that, or choose another --data-dir", dir, err)
	}
	return func() { f.Close() }, nil
}

func startServer(cfg ServerConfig, streams *streams) (*embed.Etcd, error) {
	ec, err := cfg.embed()
	if err != nil {
		return nil, err
	}
	limits := newLimits(cfg.Limited)
	ec.GRPCAdditionalServerOptions = []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(limits.call, streams.call),
		grpc.ChainStreamInterceptor(limits.stream, streams.stream),
	}
	server, err := embed.StartEtcd(ec)
	if err != nil {
		return nil, cfg.explain(err)
	}
	auth := server.Server.AuthStore()
	streams.setHolders(func(role string) []string { return usersWith(auth, role) })
	return server, nil
}

// usersWith returns the users that have a role.
func usersWith(store auth.AuthStore, role string) (users []string) {
	all, err := store.UserList(&pb.AuthUserListRequest{})
	if err != nil {
		return nil // it has no way to fail
	}
	for _, user := range all.Users {
		got, err := store.UserGet(&pb.AuthUserGetRequest{Name: user})
		if err == nil && slices.Contains(got.Roles, role) {
			users = append(users, user)
		}
	}
	return users
}

// embed translates to etcd's configuration.
func (c *ServerConfig) embed() (*embed.Config, error) {
	logger, err := serverLogger(c.LogLevel, c.LogOutput)
	if err != nil {
		return nil, err
	}
	ec := embed.NewConfig()
	ec.Name = c.Name
	ec.Dir = c.DataDir
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logger)
	ec.LogLevel = c.LogLevel

	ec.ListenClientUrls = []url.URL{{Scheme: "https", Host: c.ListenClient}}
	ec.AdvertiseClientUrls = []url.URL{{Scheme: "https", Host: c.AdvertiseClient}}
	ec.ClientTLSInfo.CertFile = c.CertFile
	ec.ClientTLSInfo.KeyFile = c.KeyFile
	ec.ClientTLSInfo.TrustedCAFile = c.CAFile
	ec.ClientTLSInfo.ClientCertAuth = true
	ec.TlsMinVersion = "TLS1.3"
	ec.EnableGRPCGateway = false
	ec.GRPCKeepAliveMinTime = time.Second
	ec.MaxConcurrentStreams = maxCalls

	// The only member has no peers: it listens for none, and the address that it must advertise is never used.
	ec.ListenPeerUrls = nil
	ec.InitialCluster = ec.InitialClusterFromName(ec.Name)
	// The cluster's ID is made from the token. A new one for every new data directory (it isn't looked at
	// in an old one) lets clients tell a wiped server from a restarted one.
	ec.InitialClusterToken = rand.Text()

	ec.TickMs, ec.ElectionMs = tickMs, electionMs
	if c.Members.several() {
		if err := c.Members.embed(ec, c.CertFile, c.KeyFile, c.CAFile); err != nil {
			return nil, err
		}
	}
	if c.ListenHealth != "" {
		ec.ListenMetricsUrls = []url.URL{{Scheme: "http", Host: c.ListenHealth}}
	}
	ec.UnsafeNoFsync = c.UnsafeNoFsync
	ec.AutoCompactionMode = embed.CompactorModePeriodic
	ec.AutoCompactionRetention = c.AutoCompaction.String()
	ec.WatchProgressNotifyInterval = progressInterval
	ec.SnapshotCount = 10_000
	return ec, nil
}

// explain adds to an error of etcd what to do about it.
func (c *ServerConfig) explain(err error) error {
	switch {
	case err == nil:
		return errors.New("kvstore: etcd stopped serving: see its log for the reason")
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("kvstore: %s is taken by another process (%w): stop that, or choose --listen-client host:port with a free port", c.ListenClient, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("kvstore: %s is no address of this machine (%w): choose --listen-client host:port with one that it has", c.ListenClient, err)
	}
	return fmt.Errorf("kvstore: etcd in %s: %w", c.DataDir, err)
}
