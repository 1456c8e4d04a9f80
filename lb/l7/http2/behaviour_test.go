package http2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"causeway/lb"
	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/http2/standard"
	"causeway/lb/l7/state"
)

var web = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "grpc", Protocol: lb.TCP, Family: lb.IPv4}

// engine is the one that a test runs on.
var engine = Serve

// TestBehaviour runs the same tests on this engine and on the one of the standard stack.
func TestBehaviour(t *testing.T) {
	defer func() { engine = Serve }()
	for _, e := range []struct {
		name  string
		serve func(context.Context, *exchange.Env, *exchange.Client)
	}{{"ours", Serve}, {"standard", standard.Serve}} {
		engine = e.serve
		t.Run(e.name, func(t *testing.T) {
			for _, b := range behaviours {
				t.Run(b.name, b.test)
			}
		})
	}
}

var behaviours = []struct {
	name string
	test func(*testing.T)
}{
	{"UnaryIsSpreadEvenly", testUnaryIsSpreadEvenly},
	{"LargeMessages", testLargeMessages},
	{"BidirectionalStreams", testBidirectionalStreams},
	{"Retries", testRetries},
	{"NobodyThere", testNobodyThere},
	{"Deadlines", testDeadlines},
	{"ReplacedBackends", testReplacedBackends},
	{"Drain", testDrain},
	{"HTTP", testHTTP},
	{"ReadAlready", testReadAlready},
}

// fixture is the engine with some backends, at an address.
type fixture struct {
	*testing.T
	table   *balance.Table
	address string
	drain   chan struct{}
	mu      sync.Mutex
	records []exchange.Record
}

func (p *fixture) Begin(*exchange.Client, exchange.Protocol) {}
func (p *fixture) End(r *exchange.Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.records = append(p.records, *r)
}

func (p *fixture) last() exchange.Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.records[len(p.records)-1]
}

func newFixture(t *testing.T, change func(*lb.L7Options), backends ...string) *fixture {
	t.Helper()
	options := lb.DefaultL7Options()
	if change != nil {
		change(&options)
	}
	p := &fixture{T: t, table: balance.NewTable(), drain: make(chan struct{})}
	updates := []state.Update{{Reset: true}, {Route: &lb.Route{Port: web, Number: 80, Options: options}}}
	for _, b := range backends {
		updates = append(updates, state.Update{Target: targetAt(b)})
	}
	p.table.Apply(append(updates, state.Update{Synced: true}))
	env := &exchange.Env{
		Dial: func(ctx context.Context, e *balance.Endpoint, _ state.Client) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", e.Address().String())
		},
		Observer: p, Limits: exchange.DefaultLimits(), Draining: p.drain, Log: slog.New(slog.DiscardHandler),
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	t.Cleanup(func() { cancel(); l.Close(); tasks.Wait() })
	tasks.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			tasks.Go(func() {
				engine(ctx, env, &exchange.Client{Conn: conn, Port: p.table.Ports()[0], Address: netip.MustParseAddrPort(conn.RemoteAddr().String())})
			})
		}
	})
	return p
}

func targetAt(address string) *lb.Target {
	a := netip.MustParseAddrPort(address)
	return &lb.Target{TargetKey: lb.TargetKey{Port: web, Address: a.Addr(), Number: a.Port()}, Cluster: "east", ClusterID: 1, Node: "node1"}
}

// echoBackend is a gRPC server with one unary and one bidirectional method.
type echoBackend struct {
	address string
	server  *grpc.Server
	calls   atomic.Int64
	fail    atomic.Pointer[status.Status]
}

func newEcho(t *testing.T) *echoBackend {
	t.Helper()
	b := &echoBackend{server: grpc.NewServer()}
	b.server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "test.Echo", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.StringValue)
			if err := decode(in); err != nil {
				return nil, err
			}
			b.calls.Add(1)
			if s := b.fail.Load(); s != nil {
				return nil, s.Err()
			}
			if in.Value == "wait" {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			_ = grpc.SetHeader(ctx, metadata.Pairs("x-served-by", b.address))
			_ = grpc.SetTrailer(ctx, metadata.Pairs("x-after", "1"))
			return in, nil
		}}},
		Streams: []grpc.StreamDesc{{StreamName: "Bidi", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
			for {
				in := new(wrapperspb.StringValue)
				if err := s.RecvMsg(in); err != nil {
					if err == io.EOF {
						return nil
					}
					return err
				}
				if err := s.SendMsg(in); err != nil {
					return err
				}
			}
		}}},
	}, b)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.address = l.Addr().String()
	go b.server.Serve(l)
	t.Cleanup(b.server.Stop)
	return b
}

func (p *fixture) client() *grpc.ClientConn {
	p.Helper()
	c, err := grpc.NewClient(p.address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { c.Close() })
	return c
}

func unary(ctx context.Context, c *grpc.ClientConn, say string) (by string, err error) {
	out, header := new(wrapperspb.StringValue), metadata.MD{}
	if err := c.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String(say), out, grpc.Header(&header)); err != nil {
		return "", err
	}
	if out.Value != say {
		return "", fmt.Errorf("%d bytes came back of %d", len(out.Value), len(say))
	}
	return strings.Join(header["x-served-by"], ""), nil
}

func testUnaryIsSpreadEvenly(t *testing.T) {
	var addresses []string
	for range 6 {
		addresses = append(addresses, newEcho(t).address)
	}
	p := newFixture(t, nil, addresses...)
	c := p.client()
	by := map[string]int{}
	for range 1200 {
		a, err := unary(t.Context(), c, "hello")
		if err != nil {
			t.Fatal(err)
		}
		by[a]++
	}
	for _, a := range addresses {
		if by[a] != 200 {
			t.Errorf("%s has answered %d of 1200", a, by[a])
		}
	}
	if r := p.last(); r.Protocol != exchange.GRPC || r.Status != 200 || r.GRPC != 0 || r.Local != "" || string(r.Path) != "/test.Echo/Unary" || r.In == 0 || r.Out == 0 {
		t.Errorf("%+v", r)
	}
}

func testLargeMessages(t *testing.T) {
	p := newFixture(t, nil, newEcho(t).address)
	c := p.client()
	for _, size := range []int{1, 16 << 10, 1 << 20, 3 << 20} {
		if _, err := unary(t.Context(), c, strings.Repeat("x", size)); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func testBidirectionalStreams(t *testing.T) {
	p := newFixture(t, nil, newEcho(t).address, newEcho(t).address)
	c := p.client()
	for range 4 {
		s, err := c.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/test.Echo/Bidi")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			in := new(wrapperspb.StringValue)
			if err := s.SendMsg(wrapperspb.String(fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
			if err := s.RecvMsg(in); err != nil || in.Value != fmt.Sprint(i) {
				t.Fatalf("%v, %v", in, err)
			}
		}
		s.CloseSend()
		if err := s.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
			t.Error(err)
		}
	}
}

func testRetries(t *testing.T) {
	sick, well := newEcho(t), newEcho(t)
	sick.fail.Store(status.New(codes.Unavailable, "not now"))
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	p := newFixture(t, func(o *lb.L7Options) { o.OutlierFailures = 0; o.RetryBudget = 100 }, sick.address, well.address, dead.Addr().String())
	c := p.client()
	for range 60 {
		if by, err := unary(t.Context(), c, "hello"); err != nil || by != well.address {
			t.Fatalf("%s, %v", by, err)
		}
	}
	if sick.calls.Load() == 0 {
		t.Error("the sick echoBackend was never asked")
	}
	// An error of another kind is an answer.
	sick.fail.Store(status.New(codes.Internal, "broken"))
	failed := 0
	for range 30 {
		if _, err := unary(t.Context(), c, "hello"); status.Code(err) == codes.Internal {
			failed++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if failed == 0 {
		t.Error("no answer of the sick echoBackend got through")
	}
}

func testNobodyThere(t *testing.T) {
	p := newFixture(t, nil)
	if _, err := unary(t.Context(), p.client(), "hello"); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no backend") {
		t.Error(err)
	}
	if r := p.last(); r.Local != "no backend" || r.GRPC != 14 {
		t.Errorf("%+v", r)
	}
	answer := p.get("/", nil)
	if answer.StatusCode != 503 {
		t.Error(answer.Status)
	}
}

func testDeadlines(t *testing.T) {
	b := newEcho(t)
	p := newFixture(t, func(o *lb.L7Options) { o.Timeout = 200 * time.Millisecond; o.Retries = 0 }, b.address)
	_, err := unary(t.Context(), p.client(), "wait")
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("the route's timeout: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := unary(ctx, p.client(), "wait"); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("the client's: %v", err)
	}
}

// TestReplacedBackends: backends come and go under traffic, each ended gracefully after it was taken out, and no call fails.
func testReplacedBackends(t *testing.T) {
	live := []*echoBackend{newEcho(t), newEcho(t)}
	p := newFixture(t, nil, live[0].address, live[1].address)
	c := p.client()
	stop := make(chan struct{})
	var calls, failed atomic.Int64
	var tasks sync.WaitGroup
	for range 4 {
		tasks.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				calls.Add(1)
				if _, err := unary(t.Context(), c, "hello"); err != nil {
					failed.Add(1)
					t.Error(err)
				}
			}
		})
	}
	for range 6 {
		next := newEcho(t)
		was := calls.Load()
		p.table.Apply([]state.Update{{Target: targetAt(next.address)}, {TargetGone: &targetAt(live[0].address).TargetKey}})
		live[0].server.GracefulStop()
		live = []*echoBackend{live[1], next}
		for calls.Load() < was+50 && failed.Load() == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	close(stop)
	tasks.Wait()
}

// TestDrain: the client gets GOAWAY, finishes its streams, and goes elsewhere.
func testDrain(t *testing.T) {
	b := newEcho(t)
	p := newFixture(t, nil, b.address)
	c := p.client()
	s, err := c.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/test.Echo/Bidi")
	if err != nil {
		t.Fatal(err)
	}
	say := func() {
		in := new(wrapperspb.StringValue)
		if err := errors.Join(s.SendMsg(wrapperspb.String("x")), s.RecvMsg(in)); err != nil {
			t.Fatal(err)
		}
	}
	say()
	close(p.drain)
	for range 20 {
		say()
		time.Sleep(5 * time.Millisecond)
	}
	s.CloseSend()
	if err := s.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
		t.Error(err)
	}
}

func (p *fixture) transport() *http.Client {
	t := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	t.Protocols.SetUnencryptedHTTP2(true)
	p.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t, Timeout: 20 * time.Second}
}

func (p *fixture) get(path string, header http.Header) *http.Response {
	p.Helper()
	r, _ := http.NewRequest(http.MethodGet, "http://"+p.address+path, nil)
	for k, v := range header {
		r.Header[k] = v
	}
	answer, err := p.transport().Do(r)
	if err != nil {
		p.Fatal(err)
	}
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		p.Fatal(err)
	}
	answer.Body.Close()
	answer.Body = io.NopCloser(bytes.NewReader(body))
	return answer
}

// serveH2C is an HTTP/2 echoBackend of net/http's.
func serveH2C(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	s.Protocols.SetUnencryptedHTTP2(true)
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

func testHTTP(t *testing.T) {
	address := serveH2C(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/echo":
			w.Header().Set("X-Length", fmt.Sprint(r.ContentLength))
			io.Copy(w, r.Body)
		case "/cut":
			w.Write(make([]byte, 1000))
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		case "/teapot":
			w.WriteHeader(http.StatusTeapot)
		default:
			fmt.Fprintf(w, "%s %s %s %s|%s", r.Host, r.URL.RequestURI(), r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Proto"), r.Header.Get("User-Agent"))
		}
	})
	p := newFixture(t, nil, address)
	answer := p.get("/a%2Fb?x=1&y", http.Header{"X-Forwarded-For": {"192.0.2.1"}, "User-Agent": {"me"}})
	body, _ := io.ReadAll(answer.Body)
	if got, want := string(body), p.address+" /a%2Fb?x=1&y 192.0.2.1, 127.0.0.1 http|me"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if answer := p.get("/teapot", nil); answer.StatusCode != http.StatusTeapot {
		t.Error(answer.Status)
	}
	sent := bytes.Repeat([]byte("0123456789"), 1<<20)
	up, err := p.transport().Post("http://"+p.address+"/echo", "text/plain", bytes.NewReader(sent))
	if err != nil {
		t.Fatal(err)
	}
	back, err := io.ReadAll(up.Body)
	if up.Body.Close(); err != nil || !bytes.Equal(back, sent) || up.Header.Get("X-Length") != fmt.Sprint(len(sent)) {
		t.Errorf("%d bytes came back, %v, %v", len(back), err, up.Header)
	}
	cut, err := p.transport().Get("http://" + p.address + "/cut")
	if err != nil {
		t.Fatal(err)
	}
	defer cut.Body.Close()
	if _, err := io.ReadAll(cut.Body); err == nil {
		t.Error("an answer that was cut off looks whole")
	}
}

// TestReadAlready: what was read of a connection to see what it speaks is not lost.
func testReadAlready(t *testing.T) {
	p := newFixture(t, nil, serveH2C(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }))
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		read := make([]byte, 10)
		io.ReadFull(far, read)
		engine(context.Background(), &exchange.Env{Observer: exchange.Unobserved{}, Limits: exchange.DefaultLimits(), Draining: make(chan struct{}), Log: slog.New(slog.DiscardHandler),
			Dial: func(ctx context.Context, e *balance.Endpoint, _ state.Client) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", e.Address().String())
			}}, &exchange.Client{Conn: far, Read: read, Port: p.table.Ports()[0]})
	}()
	c := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return near, nil }}
	c.Protocols.SetUnencryptedHTTP2(true)
	r, _ := http.NewRequest(http.MethodGet, "http://web/", nil)
	answer, err := c.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	if body, _ := io.ReadAll(answer.Body); string(body) != "hello" {
		t.Errorf("%q", body)
	}
	c.CloseIdleConnections()
	near.Close()
	<-done
}
