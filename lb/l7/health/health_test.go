package health

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"causeway/lb"
	"causeway/lb/l7/balance"
	"causeway/lb/l7/state"
)

var web = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "http", Protocol: lb.TCP, Family: lb.IPv4}

func route(check lb.HealthCheck) state.Update {
	options := lb.DefaultL7Options()
	check.Interval, check.Timeout = 10*time.Millisecond, 2*time.Second
	if check.Kind != lb.HealthNone {
		options.Health = check
	}
	return state.Update{Route: &lb.Route{Port: web, Number: 80, Options: options}}
}

func target(address string) *lb.Target {
	a := netip.MustParseAddrPort(address)
	return &lb.Target{TargetKey: lb.TargetKey{Port: web, Address: a.Addr(), Number: a.Port()}, Cluster: "east", ClusterID: 1, Node: "node1"}
}

// watched runs checks of one backend until the test ends, and returns its endpoint and the table.
func watched(t *testing.T, check lb.HealthCheck, address string) (*balance.Endpoint, *balance.Table) {
	t.Helper()
	table := balance.NewTable()
	table.Apply([]state.Update{{Reset: true}, route(check), {Target: target(address)}, {Synced: true}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Run(ctx, table, func(ctx context.Context, e *balance.Endpoint) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", e.Address().String())
		}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	}()
	t.Cleanup(func() { cancel(); <-done })
	return table.Ports()[0].Endpoints()[0], table
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestHTTP(t *testing.T) {
	var status, asked atomic.Int64
	status.Store(http.StatusOK)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" || r.Host != "web.shop" {
			t.Errorf("asked for %s of %s", r.URL.Path, r.Host)
		}
		asked.Add(1)
		w.WriteHeader(int(status.Load()))
	}))
	defer server.Close()
	e, table := watched(t, lb.HealthCheck{Kind: lb.HealthHTTP, Path: "/healthz"}, server.Listener.Addr().String())
	until(t, "three checks", func() bool { return asked.Load() >= 3 })
	if e.Health().Unhealthy {
		t.Errorf("%+v", e.Health())
	}
	for _, step := range []struct {
		status int
		sick   bool
	}{{503, true}, {302, false}, {404, true}, {204, false}} {
		status.Store(int64(step.status))
		until(t, http.StatusText(step.status), func() bool { return e.Health().Unhealthy == step.sick })
	}
	status.Store(500)
	until(t, "a sick backend", func() bool { return e.Health().Unhealthy })
	if reason := e.Health().Reason; reason != "GET /healthz: status 500" {
		t.Error(reason)
	}
	// Who wants no checks any more has no sick backends.
	table.Apply([]state.Update{route(lb.HealthCheck{})})
	until(t, "the end of checks", func() bool { return !e.Health().Unhealthy })
	// And who wants them again, has.
	table.Apply([]state.Update{route(lb.HealthCheck{Kind: lb.HealthHTTP, Path: "/healthz"})})
	until(t, "a sick backend again", func() bool { return e.Health().Unhealthy })
	// What is removed is not asked any more.
	table.Apply([]state.Update{{TargetGone: &e.Target().TargetKey}})
	<-e.Removed()
}

func TestGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, says := grpc.NewServer(), grpchealth.NewServer()
	healthpb.RegisterHealthServer(server, says)
	go server.Serve(l)
	defer server.Stop()
	says.SetServingStatus("shop.Cart", healthpb.HealthCheckResponse_SERVING)
	e, _ := watched(t, lb.HealthCheck{Kind: lb.HealthGRPC, Service: "shop.Cart"}, l.Addr().String())
	for _, step := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_NOT_SERVING, healthpb.HealthCheckResponse_SERVING} {
		says.SetServingStatus("shop.Cart", step)
		until(t, step.String(), func() bool { return e.Health().Unhealthy == (step != healthpb.HealthCheckResponse_SERVING) })
	}
	other, _ := watched(t, lb.HealthCheck{Kind: lb.HealthGRPC, Service: "shop.Unknown"}, l.Addr().String())
	until(t, "an unknown service", func() bool { return strings.Contains(other.Health().Reason, `gRPC status "5"`) })
	all, _ := watched(t, lb.HealthCheck{Kind: lb.HealthGRPC}, l.Addr().String())
	says.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	until(t, "a server as a whole", func() bool { return strings.HasSuffix(all.Health().Reason, "NOT_SERVING") })
}

func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e, _ := watched(t, lb.HealthCheck{Kind: lb.HealthTCP}, l.Addr().String())
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	l.Close()
	until(t, "a closed port", func() bool { return strings.Contains(e.Health().Reason, "connection refused") })
	if l, err = net.Listen("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	until(t, "an open port", func() bool { return !e.Health().Unhealthy })
}

func FuzzHealthAnswer(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 2, 8, 1})
	f.Add([]byte{0, 0, 0, 0, 2, 8, 0x80})
	f.Fuzz(func(t *testing.T, body []byte) { healthAnswer(body) })
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
