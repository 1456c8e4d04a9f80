package http2

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"causeway/lb"
	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

var key = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "grpc", Protocol: lb.TCP, Family: lb.IPv4}

// seen are the records of requests.
type seen struct {
	mu      sync.Mutex
	records []exchange.Record
	ended   chan struct{}
}

func (o *seen) Begin(*exchange.Client, exchange.Protocol) {}
func (o *seen) End(r *exchange.Record) {
	o.mu.Lock()
	o.records = append(o.records, *r)
	o.mu.Unlock()
	select {
	case o.ended <- struct{}{}:
	default:
	}
}

// proxy is an engine on loopback with one port.
type proxy struct {
	t       testing.TB
	table   *balance.Table
	env     *exchange.Env
	seen    *seen
	address string
	drain   chan struct{}
}

func newProxy(t testing.TB, change func(*lb.L7Options, *exchange.Limits), backends ...string) *proxy {
	o := lb.DefaultL7Options()
	limits := exchange.DefaultLimits()
	if change != nil {
		change(&o, &limits)
	}
	p := &proxy{t: t, table: balance.NewTable(), seen: &seen{ended: make(chan struct{}, 1)}, drain: make(chan struct{})}
	list := []state.Update{{Reset: true}, {Self: &state.Self{Cluster: "east"}}, {Route: &lb.Route{Port: key, Number: 80, Options: o}}}
	for _, b := range backends {
		a := netip.MustParseAddrPort(b)
		list = append(list, state.Update{Target: &lb.Target{TargetKey: lb.TargetKey{Port: key, Address: a.Addr(), Number: a.Port()}, Cluster: "east"}})
	}
	p.table.Apply(append(list, state.Update{Synced: true}))
	p.env = &exchange.Env{
		Dial: func(ctx context.Context, e *balance.Endpoint, _ state.Client) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", e.Address().String())
		},
		Observer: p.seen, Limits: limits, Draining: p.drain, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	l := listen(t)
	p.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				Serve(ctx, p.env, &exchange.Client{Conn: conn, Port: p.table.Ports()[0], Address: conn.RemoteAddr().(*net.TCPAddr).AddrPort()})
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		cancel()
		work.Wait()
	})
	return p
}

func listen(t testing.TB) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// records waits for n of them.
func (p *proxy) records(n int) []exchange.Record {
	p.t.Helper()
	late := time.After(10 * time.Second)
	for {
		p.seen.mu.Lock()
		list := p.seen.records
		p.seen.mu.Unlock()
		if len(list) >= n {
			return list
		}
		select {
		case <-p.seen.ended:
		case <-late:
			p.t.Fatalf("%d records, want %d", len(list), n)
		}
	}
}

func (p *proxy) dial() *grpc.ClientConn {
	p.t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { cc.Close() })
	return cc
}

// echoServer answers unary calls by f, and echoes streams.
func echoServer(t testing.TB, f func(context.Context, string) (string, error)) string {
	l := listen(t)
	s := grpc.NewServer()
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "test.Echo", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Say", Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			var in wrapperspb.StringValue
			if err := dec(&in); err != nil {
				return nil, err
			}
			v, err := f(ctx, in.Value)
			return wrapperspb.String(v), err
		}}},
		Streams: []grpc.StreamDesc{{StreamName: "Talk", ServerStreams: true, ClientStreams: true, Handler: func(_ any, ss grpc.ServerStream) error {
			for {
				var in wrapperspb.StringValue
				if err := ss.RecvMsg(&in); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
				if err := ss.SendMsg(&in); err != nil {
					return err
				}
			}
		}}},
	}, nil)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return l.Addr().String()
}

func say(cc *grpc.ClientConn, ctx context.Context, v string) (string, error) {
	out := &wrapperspb.StringValue{}
	err := cc.Invoke(ctx, "/test.Echo/Say", wrapperspb.String(v), out)
	return out.Value, err
}
