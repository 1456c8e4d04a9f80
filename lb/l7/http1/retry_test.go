package http1

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

// nowhere is an address that refuses connections.
func nowhere(t *testing.T) netip.AddrPort {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// TestRetries: what may be repeated is, and nothing else.
func TestRetries(t *testing.T) {
	unavailable := func(status int) func(t *testing.T) netip.AddrPort {
		return func(t *testing.T) netip.AddrPort {
			return web(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) })
		}
	}
	closes := func(t *testing.T) netip.AddrPort { return says(t, "", true) }
	silent := func(t *testing.T) netip.AddrPort {
		return listen(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	}
	for _, test := range []struct {
		name    string
		bad     func(*testing.T) netip.AddrPort
		method  string
		retries int
		want    int
	}{
		{"refused GET", nowhere, "GET", 2, 200},
		{"refused POST", nowhere, "POST", 0, 200},
		{"503 GET", unavailable(503), "GET", 2, 200},
		{"502 PUT", unavailable(502), "PUT", 2, 200},
		{"504 DELETE", unavailable(504), "DELETE", 2, 200},
		{"503 GET without retries", unavailable(503), "GET", 0, 503},
		{"503 POST", unavailable(503), "POST", 2, 503},
		{"503 PATCH", unavailable(503), "PATCH", 2, 503},
		{"500 GET", unavailable(500), "GET", 2, 500},
		{"closing GET", closes, "GET", 2, 200},
		{"closing POST", closes, "POST", 2, 502},
		{"silent GET", silent, "GET", 2, 200},
		{"silent POST", silent, "POST", 2, 504},
	} {
		// Both backends get the first of two requests once.
		p := start(t, func(s *settings) { s.options.Retries, s.options.TryTimeout = test.retries, 200*time.Millisecond }, test.bad(t), web(t, echo))
		h := client(t)
		var got []int
		for range 2 {
			r, _ := http.NewRequest(test.method, p.url("/"), strings.NewReader("body"))
			a, err := h.Do(r)
			if err != nil {
				t.Fatal(test.name, err)
			}
			b, _ := io.ReadAll(a.Body)
			if a.StatusCode == 200 && string(b) != test.method+" / body" {
				t.Errorf("%s: %q", test.name, b)
			}
			got = append(got, a.StatusCode)
		}
		if max(got[0], got[1]) != test.want || min(got[0], got[1]) != 200 {
			t.Errorf("%s: %v instead of 200 and %d", test.name, got, test.want)
		}
		retries := 0
		for _, r := range p.records.wait(t, 2) {
			retries += r.Retries
		}
		// A retry moves the turn on, so that the second request may meet the bad one as well.
		if test.want == 200 && retries == 0 || test.want != 200 && retries != 0 {
			t.Errorf("%s: %d retries recorded", test.name, retries)
		}
	}
}

// TestBestAnswer: with nobody else to ask, the client gets what there is.
func TestBestAnswer(t *testing.T) {
	p := start(t, nil, says(t, "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy", false))
	answers, _ := p.raw(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if fmt.Sprint(answers) != "[503 busy]" {
		t.Errorf("%q", answers)
	}
}

func TestNoBackend(t *testing.T) {
	p := start(t, nil)
	answers, _ := p.raw(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "HEAD")
	if fmt.Sprint(answers) != "[503 no backend 503  503 no backend]" {
		t.Errorf("%q", answers)
	}
}

// TestClosedMeanwhile: a backend that closes its kept connections costs no request, whatever its method.
func TestClosedMeanwhile(t *testing.T) {
	var served atomic.Int32
	closed := make(chan struct{}, 100)
	p := start(t, nil, listen(t, func(c net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		io.Copy(io.Discard, r.Body)
		served.Add(1)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		c.Close()
		closed <- struct{}{}
	}))
	h := client(t)
	for i := range 20 {
		a, err := h.Post(p.url("/"), "", strings.NewReader("x"))
		if err != nil || a.StatusCode != 200 {
			t.Fatal(i, a, err)
		}
		<-closed
	}
	if n := served.Load(); n != 20 {
		t.Errorf("20 requests were served %d times", n)
	}
}

// TestConnectionsAreKept: requests one after the other share a connection.
func TestConnectionsAreKept(t *testing.T) {
	var connections atomic.Int32
	p := start(t, nil, listen(t, func(c net.Conn) {
		connections.Add(1)
		for r := bufio.NewReader(c); ; {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	}))
	for i := range 10 {
		p.raw(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
		p.records.wait(t, 2*i+2)
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	// When the backend is removed its idle connections go.
	e := p.port.Endpoints()[0]
	key := e.Target().TargetKey
	p.table.Apply([]state.Update{{TargetGone: &key}})
	pool := poolOf(e)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		pool.mu.Lock()
		open := pool.open
		pool.mu.Unlock()
		if open == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections to a removed backend are open", open)
		}
	}
}

// TestConnectionLimit: no more connections than allowed, a bounded queue, and an answer to those beyond.
func TestConnectionLimit(t *testing.T) {
	release := make(chan struct{})
	var atOnce, most atomic.Int32
	p := start(t, func(s *settings) { s.options.MaxConnections, s.options.MaxPending = 2, 3 }, web(t, func(w http.ResponseWriter, r *http.Request) {
		n := atOnce.Add(1)
		defer atOnce.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-release
	}))
	h := client(t)
	codes := make(chan int, 10)
	for range 10 {
		go func() {
			a, err := h.Get(p.url("/"))
			if err != nil {
				codes <- 0
				return
			}
			a.Body.Close()
			codes <- a.StatusCode
		}()
	}
	for range 5 {
		if code := <-codes; code != 503 {
			t.Errorf("%d", code)
		}
	}
	close(release)
	for range 5 {
		if code := <-codes; code != 200 {
			t.Errorf("%d", code)
		}
	}
	if most.Load() > 2 {
		t.Errorf("%d connections at once", most.Load())
	}
	overflows := 0
	for _, r := range p.records.wait(t, 10) {
		if r.Local == "overflow" {
			overflows++
		}
	}
	if overflows != 5 {
		t.Errorf("%d overflows", overflows)
	}
}

// TestTimeout bounds a request with all its tries.
func TestTimeout(t *testing.T) {
	p := start(t, func(s *settings) { s.options.Timeout = 200 * time.Millisecond }, listen(t, func(c net.Conn) { io.Copy(io.Discard, c) }))
	answers, _ := p.raw(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if fmt.Sprint(answers) != "[504 timeout]" {
		t.Errorf("%q", answers)
	}
}

// TestDraining: the next answer is the last, and says so; an idle connection stays for its request.
func TestDraining(t *testing.T) {
	for _, how := range []string{"proxy drains", "port is gone"} {
		p := start(t, nil, web(t, echo))
		c := p.dial(t)
		r := bufio.NewReader(c)
		for i := range 2 {
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			a, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(how, err)
			}
			io.Copy(io.Discard, a.Body)
			if a.Close != (i == 1) {
				t.Errorf("%s: answer %d, close %v", how, i, a.Close)
			}
			if how == "port is gone" {
				p.table.Apply([]state.Update{{RouteGone: &webKey}})
			} else if i == 0 {
				close(p.drain)
			}
			if i == 1 {
				if _, err := r.ReadByte(); err != io.EOF {
					t.Errorf("%s: %v", how, err)
				}
				break
			}
		}
	}
}

// TestEnd: when the context ends, so does everything.
func TestEnd(t *testing.T) {
	here := make(chan struct{}, 1)
	p := start(t, nil, listen(t, func(c net.Conn) {
		here <- struct{}{}
		io.Copy(io.Discard, c)
	}))
	idle, waiting := p.dial(t), p.dial(t)
	io.WriteString(waiting, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	<-here
	p.cancel()
	for _, c := range []net.Conn{idle, waiting} {
		if answers, _ := readAnswers(c); len(answers) != 0 {
			t.Errorf("%q", answers)
		}
	}
	if r := p.records.wait(t, 1)[0]; r.Status != 0 || r.Local != "proxy ends" {
		t.Errorf("%+v", r)
	}
}

// TestIdentities: clients of different identities share no connection.
func TestIdentities(t *testing.T) {
	var connections atomic.Int32
	at := listen(t, func(c net.Conn) {
		connections.Add(1)
		for r := bufio.NewReader(c); ; {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	p := start(t, nil, at)
	var asked sync.Map
	dial := p.env.Dial
	p.env.Dial = func(ctx context.Context, e *balance.Endpoint, pod state.Client) (net.Conn, error) {
		asked.Store(pod.Identity, true)
		return dial(ctx, e, pod)
	}
	for _, identity := range []uint32{7, 8, 7, 8} {
		near, far := net.Pipe()
		go Serve(t.Context(), p.env, &exchange.Client{Conn: far, Port: p.port, Pod: state.Client{Identity: identity}, Read: []byte("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")})
		if answers, err := readAnswers(near); len(answers) != 1 || answers[0] != "200 " || !errors.Is(err, io.EOF) {
			t.Errorf("%q, %v", answers, err)
		}
	}
	if n := connections.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	for _, identity := range []uint32{7, 8} {
		if _, ok := asked.Load(identity); !ok {
			t.Errorf("no connection in the name of %d", identity)
		}
	}
}
