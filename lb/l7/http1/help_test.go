package http1

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"causeway/lb"
	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

var webKey = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "80", Protocol: lb.TCP, Family: lb.IPv4}

// patience is how long tests wait for what must come.
const patience = 10 * time.Second

// listen serves each connection by f, and returns where.
func listen(t testing.TB, f func(net.Conn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c)
			}()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}

// web is a backend of net/http.
func web(t testing.TB, f http.HandlerFunc) netip.AddrPort {
	s := httptest.NewServer(f)
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return netip.MustParseAddrPort(s.Listener.Addr().String())
}

// says is a backend that answers every request that it reads (without a body) with the same bytes, and then closes if told so.
func says(t testing.TB, answer string, closes bool) netip.AddrPort {
	return listen(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			io.Copy(io.Discard, request.Body)
			io.WriteString(c, answer)
			if closes {
				return
			}
		}
	})
}

// records is an Observer that keeps all.
type records struct {
	mu    sync.Mutex
	began int
	ended []exchange.Record
	more  chan struct{}
}

func (r *records) Begin(*exchange.Client, exchange.Protocol) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.began++
}

func (r *records) End(record *exchange.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := *record
	e.Method, e.Path, e.Host = append([]byte(nil), e.Method...), append([]byte(nil), e.Path...), append([]byte(nil), e.Host...)
	e.TraceParent = append([]byte(nil), e.TraceParent...)
	r.ended = append(r.ended, e)
	select {
	case r.more <- struct{}{}:
	default:
	}
}

// wait for n records in all.
func (r *records) wait(t testing.TB, n int) []exchange.Record {
	t.Helper()
	timeout := time.After(patience)
	for {
		r.mu.Lock()
		ended := append([]exchange.Record(nil), r.ended...)
		r.mu.Unlock()
		if len(ended) >= n {
			return ended
		}
		select {
		case <-r.more:
		case <-timeout:
			t.Fatalf("%d records instead of %d", len(ended), n)
		}
	}
}

// proxy is an engine with a listener, for one port.
type proxy struct {
	at      string
	table   *balance.Table
	port    *balance.Port
	records *records
	env     *exchange.Env
	drain   chan struct{}
	cancel  context.CancelFunc
}

type settings struct {
	limits  exchange.Limits
	options lb.L7Options
}

func target(a netip.AddrPort) lb.TargetKey {
	return lb.TargetKey{Port: webKey, Address: a.Addr(), Number: a.Port()}
}

// start a proxy in front of backends.
func start(t testing.TB, change func(*settings), backends ...netip.AddrPort) *proxy {
	t.Helper()
	s := settings{limits: exchange.DefaultLimits(), options: lb.DefaultL7Options()}
	s.options.RetryBudget = 100
	if change != nil {
		change(&s)
	}
	updates := []state.Update{{Reset: true}, {Self: &state.Self{Cluster: "east", Node: "n1"}}, {Route: &lb.Route{Port: webKey, Number: 80, App: lb.AppHTTP, Options: s.options}}}
	for _, b := range backends {
		updates = append(updates, state.Update{Target: &lb.Target{TargetKey: target(b), Cluster: "east"}})
	}
	p := &proxy{table: balance.NewTable(), records: &records{more: make(chan struct{}, 1)}, drain: make(chan struct{})}
	p.table.Apply(append(updates, state.Update{Synced: true}))
	p.port = p.table.Ports()[0]
	p.env = &exchange.Env{
		Dial: func(ctx context.Context, e *balance.Endpoint, _ state.Client) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", e.Address().String())
		},
		Observer: p.records, Limits: s.limits, Draining: p.drain, Log: slog.New(slog.DiscardHandler),
	}
	if _, bench := t.(*testing.B); bench {
		p.env.Observer = exchange.Unobserved{}
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.at = l.Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			address := netip.MustParseAddrPort(c.RemoteAddr().String())
			serving.Go(func() {
				Serve(ctx, p.env, &exchange.Client{Conn: c, Port: p.port, Address: address, Pod: p.table.Client(address.Addr())})
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		cancel()
		serving.Wait()
		for _, e := range p.port.Endpoints() {
			if n := e.InFlight(); n != 0 {
				t.Errorf("%d tries are still under way at %s", n, e.Address())
			}
		}
		if r := p.records; r.began != len(r.ended) {
			t.Errorf("%d requests began, %d ended", r.began, len(r.ended))
		}
	})
	return p
}

func (p *proxy) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", p.at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return c.(*net.TCPConn)
}

func (p *proxy) url(path string) string { return "http://" + p.at + path }

// answers that a raw connection gives to what is sent, until it is closed: "STATUS BODY" each, and how it ended.
func (p *proxy) raw(t testing.TB, send string, methods ...string) (answers []string, end error) {
	t.Helper()
	c := p.dial(t)
	if _, err := io.WriteString(c, send); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	return readAnswers(c, methods...)
}

func readAnswers(c net.Conn, methods ...string) (answers []string, end error) {
	return readSome(c, 1<<30, methods...)
}

// readSome reads at most so many answers.
func readSome(c net.Conn, most int, methods ...string) (answers []string, end error) {
	r := bufio.NewReader(c)
	for i := 0; ; i++ {
		if i == most {
			return answers, io.EOF
		}
		if _, err := r.Peek(1); err != nil {
			return answers, err
		}
		method := "GET"
		if i < len(methods) {
			method = methods[i]
		}
		a, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			return answers, err
		}
		body, err := io.ReadAll(a.Body)
		answers = append(answers, fmt.Sprintf("%d %s", a.StatusCode, strings.TrimSpace(string(body))))
		if err != nil {
			return answers, err
		}
	}
}

func client(t testing.TB) *http.Client {
	transport := &http.Transport{MaxIdleConnsPerHost: 100, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 2 * patience}
}

// serve a connection of which some bytes were read already.
func (p *proxy) serve(t testing.TB, c net.Conn, read []byte) {
	Serve(t.Context(), p.env, &exchange.Client{Conn: c, Port: p.port, Read: read})
}
