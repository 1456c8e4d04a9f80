package xds

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/xds"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"causeway/identity/pki"
	"causeway/lb"
)

const patience = 20 * time.Second

var shopPort = lb.PortKey{Service: lb.Name{Namespace: "web", Name: "shop"}, Port: "grpc", Protocol: lb.TCP, Family: lb.IPv4}

// backend is a real gRPC server that counts its calls.
type backend struct {
	target lb.Target
	calls  atomic.Int64
	server *grpc.Server
}

func startBackend(t *testing.T, cluster string) *backend {
	t.Helper()
	b := &backend{}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.server = grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		b.calls.Add(1)
		return h(ctx, r)
	}))
	grpc_health_v1.RegisterHealthServer(b.server, health.NewServer())
	go b.server.Serve(listener) //nolint:errcheck // it ends with the test
	t.Cleanup(b.server.Stop)
	at := netip.MustParseAddrPort(listener.Addr().String())
	b.target = lb.Target{TargetKey: lb.TargetKey{Port: shopPort, Address: at.Addr(), Number: at.Port()}, Cluster: cluster, Node: "node1", Local: cluster == "east"}
	return b
}

// mesh is a server with clients' certificates.
type mesh struct {
	t       *testing.T
	server  *Server
	address string
	dir     string
	roots   *x509.CertPool
	leaf    tls.Certificate
	header  metadata.MD // of the calls
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	authority, err := pki.NewAuthority("east", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Issue(pki.Request{User: "xds", Server: true, Hosts: []string{"127.0.0.1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{t: t, server: NewServer(), dir: t.TempDir(), roots: x509.NewCertPool()}
	m.roots.AddCert(authority.Cert)
	if m.leaf, err = pair.TLS(); err != nil {
		t.Fatal(err)
	}
	if err := pki.WriteFiles(m.file("cert"), m.file("key"), pair); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.file("ca"), authority.CertPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m.address = listener.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- m.server.Serve(ctx, listener, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{m.leaf},
			ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: m.roots})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return m
}

func (m *mesh) file(name string) string { return filepath.Join(m.dir, name+".pem") }

func (m *mesh) set(o lb.L7Options, backends ...*backend) {
	m.t.Helper()
	rows := Rows{Self: "east", Routes: []lb.Route{{Port: shopPort, Number: 80, App: lb.AppHTTP2, Options: o}}}
	for _, b := range backends {
		rows.Targets = append(rows.Targets, b.target)
	}
	if err := m.server.Set(Resources(rows)); err != nil {
		m.t.Fatal(err)
	}
}

// client is grpc-go's own xDS client, with a bootstrap file's content as a user writes it.
func (m *mesh) client(target string) func() error {
	m.t.Helper()
	bootstrap, err := json.Marshal(map[string]any{
		"xds_servers": []any{map[string]any{
			"server_uri":      m.address,
			"server_features": []string{"xds_v3"},
			"channel_creds": []any{map[string]any{"type": "tls", "config": map[string]string{
				"ca_certificate_file": m.file("ca"), "certificate_file": m.file("cert"), "private_key_file": m.file("key")}}},
		}},
		"node": map[string]string{"id": "test"},
	})
	if err != nil {
		m.t.Fatal(err)
	}
	builder, err := xds.NewXDSResolverWithConfigForTesting(bootstrap)
	if err != nil {
		m.t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///"+target, grpc.WithResolvers(builder), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { conn.Close() })
	return func() error {
		ctx, cancel := context.WithTimeout(m.t.Context(), patience)
		defer cancel()
		ctx = metadata.NewOutgoingContext(ctx, m.header)
		_, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
		return err
	}
}

// reach calls until each of the backends was called, so that all connections are there.
func reach(t *testing.T, call func() error, backends ...*backend) {
	t.Helper()
	for _, b := range backends {
		before := b.calls.Load()
		for deadline := time.Now().Add(patience); b.calls.Load() == before; {
			if err := call(); err != nil || time.Now().After(deadline) {
				t.Fatalf("backend %s was not called: %v", b.target.Address, err)
			}
		}
	}
}

// spread calls n times, and returns how many each backend got.
func spread(t *testing.T, n int, call func() error, backends ...*backend) []int {
	t.Helper()
	before := make([]int64, len(backends))
	for i, b := range backends {
		before[i] = b.calls.Load()
	}
	for range n {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]int, len(backends))
	for i, b := range backends {
		got[i] = int(b.calls.Load() - before[i])
	}
	return got
}

func TestGRPCSpreadsOverClusters(t *testing.T) {
	for _, algorithm := range []lb.L7Algorithm{lb.RoundRobin, lb.LeastRequest, lb.Random} {
		t.Run(string(algorithm), func(t *testing.T) {
			m := newMesh(t)
			a, b, c := startBackend(t, "east"), startBackend(t, "east"), startBackend(t, "west")
			o := lb.DefaultL7Options()
			o.Algorithm = algorithm
			m.set(o, a, b, c)
			call := m.client("web/shop:80")
			reach(t, call, a, b, c)
			got := spread(t, 3000, call, a, b, c)
			t.Logf("calls %v", got)
			for _, n := range got {
				if n < 880 || n > 1120 {
					t.Errorf("3000 calls went %v, want about 1000 each", got)
				}
			}
		})
	}
}

func TestGRPCFollowsWeightsAndChanges(t *testing.T) {
	m := newMesh(t)
	east, west, more := startBackend(t, "east"), startBackend(t, "west"), startBackend(t, "west")
	o := lb.DefaultL7Options()
	o.Weights = []lb.ClusterWeight{{Cluster: "east", Weight: 90}, {Cluster: "west", Weight: 10}}
	m.set(o, east, west, more)
	call := m.client("web/shop:grpc")
	reach(t, call, east, west, more)
	got := spread(t, 3000, call, east, west, more)
	t.Logf("calls under 90/10: %v", got)
	if west := got[1] + got[2]; west < 200 || west > 400 {
		t.Errorf("3000 calls went %v, want about 300 to west", got)
	}

	// One goes: it gets nothing as soon as the client knows, and no call fails.
	more.target.Quarantined = true
	m.set(o, east, west, more)
	quiet(t, call, more)

	m.set(o, east, west)
	more.server.Stop()
	spread(t, 300, call, east, west)
}

func TestGRPCSendsAUserToOneBackend(t *testing.T) {
	m := newMesh(t)
	backends := []*backend{startBackend(t, "east"), startBackend(t, "east"), startBackend(t, "west")}
	o := lb.DefaultL7Options()
	o.Algorithm, o.HashHeader = lb.Hashed, "x-user"
	m.set(o, backends...)
	call := m.client("web/shop:80")
	used := map[int]bool{}
	for user := range 30 {
		m.header = metadata.Pairs("x-user", fmt.Sprint("user", user))
		for i, n := range spread(t, 10, call, backends...) {
			if n != 0 && n != 10 {
				t.Errorf("backend %d got %d of a user's 10 calls", i, n)
			}
			used[i] = used[i] || n > 0
		}
	}
	if len(used) != 3 || !used[0] || !used[1] || !used[2] {
		t.Errorf("30 users are at %v, want some at each", used)
	}
}

func TestGRPCFailsOverInOrder(t *testing.T) {
	m := newMesh(t)
	east, west := startBackend(t, "east"), startBackend(t, "west")
	o := lb.DefaultL7Options()
	o.Failover = []string{"west", "east"}
	m.set(o, east, west)
	call := m.client("web/shop:80")
	if got := spread(t, 100, call, east, west); got[0] != 0 {
		t.Errorf("calls went %v, want all to west", got)
	}
	m.set(o, east)
	reach(t, call, east)
	m.set(o, east, west)
	quiet(t, call, east)
}

// quiet calls until 50 calls in a row do not reach the backend.
func quiet(t *testing.T, call func() error, b *backend) {
	t.Helper()
	for deadline := time.Now().Add(patience); spread(t, 50, call, b)[0] > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("%s of %s is called for ever", b.target.Address, b.target.Cluster)
		}
	}
}

func (m *mesh) dial(config *tls.Config) discovery.AggregatedDiscoveryServiceClient {
	m.t.Helper()
	conn, err := grpc.NewClient(m.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { conn.Close() })
	return discovery.NewAggregatedDiscoveryServiceClient(conn)
}

func TestDeltaSendsOnlyWhatChanged(t *testing.T) {
	m := newMesh(t)
	east, west := startBackend(t, "east"), startBackend(t, "west")
	m.set(lb.DefaultL7Options(), east)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := m.dial(&tls.Config{RootCAs: m.roots, Certificates: []tls.Certificate{m.leaf}}).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	next := func() *discovery.DeltaDiscoveryResponse {
		t.Helper()
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}); err != nil {
			t.Fatal(err)
		}
		return r
	}
	node := &core.Node{Id: "raw"}
	for _, kind := range []string{resource.ClusterType, resource.EndpointType} {
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: kind, ResourceNamesSubscribe: []string{"*"}}); err != nil {
			t.Fatal(err)
		}
		if r := next(); r.GetTypeUrl() != kind || len(r.GetResources()) != 1 || r.GetResources()[0].GetName() != "web/shop:grpc/TCP" {
			t.Fatalf("got %v", r)
		}
	}
	m.set(lb.DefaultL7Options(), east, west) // endpoints alone change
	if r := next(); r.GetTypeUrl() != resource.EndpointType || len(r.GetResources()) != 1 {
		t.Fatalf("got %v, want the endpoints", r)
	}
	if err := m.server.Set(Resources(Rows{Self: "east"})); err != nil {
		t.Fatal(err)
	}
	gone := map[string]string{}
	for range 2 {
		r := next()
		gone[r.GetTypeUrl()] = fmt.Sprint(r.GetRemovedResources())
	}
	if want := "[web/shop:grpc/TCP]"; gone[resource.ClusterType] != want || gone[resource.EndpointType] != want {
		t.Errorf("gone are %v", gone)
	}
}

func TestClientsWithoutACertificateAreRefused(t *testing.T) {
	m := newMesh(t)
	m.set(lb.DefaultL7Options(), startBackend(t, "east"))
	other := newMesh(t)
	for name, config := range map[string]*tls.Config{
		"none": {RootCAs: m.roots}, "another authority's": {RootCAs: m.roots, Certificates: []tls.Certificate{other.leaf}},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		stream, err := m.dial(config).StreamAggregatedResources(ctx)
		if err == nil {
			_ = stream.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "x"}, TypeUrl: resource.ClusterType})
			_, err = stream.Recv()
		}
		if err == nil || ctx.Err() != nil {
			t.Errorf("with a certificate of %s: %v", name, err)
		}
		cancel()
	}
}
