package http1

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"
)

// reference is a reverse proxy of net/http, which behaviours are compared with.
func reference(t *testing.T, backend netip.AddrPort) string {
	to, _ := url.Parse("http://" + backend.String())
	s := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"]
		r.SetXForwarded()
		r.SetURL(to)
		r.Out.Host = r.In.Host
	}, FlushInterval: -1})
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s.Listener.Addr().String()
}

// TestBehaviour has what clients see in common with a reverse proxy of net/http.
func TestBehaviour(t *testing.T) {
	backend := web(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch r.URL.Path {
		case "/none":
			w.WriteHeader(204)
		case "/same":
			w.Header().Set("ETag", `"x"`)
			w.WriteHeader(304)
		case "/chunked":
			fmt.Fprint(w, "a")
			w.(http.Flusher).Flush()
			fmt.Fprint(w, "b")
		default:
			fmt.Fprintf(w, "%s %s %s|%s|xff=%v|xfp=%v|te=%v|ka=%v|x=%v|conn=%v|tp=%v", r.Method, r.RequestURI, r.Host, body, r.Header["X-Forwarded-For"], r.Header["X-Forwarded-Proto"],
				r.Header["Te"], r.Header["Keep-Alive"], r.Header["X"], r.Header["Connection"], r.Header["Traceparent"])
		}
	})
	p := start(t, nil, backend)
	ways := map[string]string{"engine": p.at, "net/http": reference(t, backend)}
	const tail = "|xff=[127.0.0.1]|xfp=[http]|te=[]|ka=[]|x=[]|conn=[]|tp=[]"
	for _, test := range []struct {
		name, send string
		methods    []string
		want       []string
	}{
		{"plain", "GET /a?b HTTP/1.1\r\nHost: a:80\r\n\r\n", nil, []string{"200 GET /a?b a:80|" + tail}},
		{"pipelined", "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nxyGET /3 HTTP/1.1\r\nHost: a\r\n\r\n", nil,
			[]string{"200 GET /1 a|" + tail, "200 POST /2 a|xy" + tail, "200 GET /3 a|" + tail}},
		{"hop by hop", "GET / HTTP/1.1\r\nHost: a\r\nConnection: x, keep-alive\r\nX: y\r\nKeep-Alive: 1\r\nTraceparent: 00-1-2-01\r\n\r\n", nil,
			[]string{"200 GET / a||xff=[127.0.0.1]|xfp=[http]|te=[]|ka=[]|x=[]|conn=[]|tp=[00-1-2-01]"}},
		{"forwarded before", "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 5.6.7.8\r\n\r\n", nil,
			[]string{"200 GET / a||xff=[1.2.3.4, 5.6.7.8, 127.0.0.1]|xfp=[http]|te=[]|ka=[]|x=[]|conn=[]|tp=[]"}},
		{"chunked request", chunkedHead + "3;x\r\nabc\r\n0\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", nil, []string{"200 POST / a|abc" + tail, "200 GET /2 a|" + tail}},
		{"close", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", nil, []string{"200 GET / a|" + tail}},
		{"HTTP/1.0", "GET / HTTP/1.0\r\nHost: a\r\n\r\nGET /2 HTTP/1.0\r\nHost: a\r\n\r\n", nil, []string{"200 GET / a|" + tail}},
		{"HTTP/1.0 kept", "GET /1 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\nGET /2 HTTP/1.0\r\nHost: a\r\n\r\n", nil, []string{"200 GET /1 a|" + tail, "200 GET /2 a|" + tail}},
		{"HTTP/1.0 of chunks", "GET /chunked HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", nil, []string{"200 ab"}},
		{"chunked", "GET /chunked HTTP/1.1\r\nHost: a\r\n\r\nGET /chunked HTTP/1.1\r\nHost: a\r\n\r\n", nil, []string{"200 ab", "200 ab"}},
		{"bodyless", "GET /none HTTP/1.1\r\nHost: a\r\n\r\nGET /same HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
			[]string{"GET", "GET", "HEAD"}, []string{"204 ", "304 ", "200 ", "200 GET /2 a|" + tail}},
		{"absolute", "GET http://b/c?d HTTP/1.1\r\nHost: a\r\n\r\n", nil, []string{"200 GET /c?d b|" + tail}},
	} {
		for name, at := range ways {
			c, err := net.Dial("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(patience))
			io.WriteString(c, test.send)
			most := len(test.want)
			if name == "engine" {
				// Half-closed clients still get their answers; net/http cuts what is under way for those.
				c.(*net.TCPConn).CloseWrite()
				most++
			}
			got, end := readSome(c, most, test.methods...)
			c.Close()
			want := strings.Join(test.want, "\n")
			if strings.Join(got, "\n") != want || end != io.EOF {
				t.Errorf("%s, %s:\n%q, %v\ninstead of\n%q", test.name, name, got, end, test.want)
			}
		}
	}
}

// TestToTheEnd: an answer without a length ends with its connection, for the client too.
func TestToTheEnd(t *testing.T) {
	p := start(t, nil, says(t, "HTTP/1.0 200 OK\r\n\r\nuntil the end", true))
	answers, end := p.raw(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if fmt.Sprint(answers) != "[200 until the end]" || end != io.EOF {
		t.Errorf("%q, %v", answers, end)
	}
}

// TestContinue: a client that waits for 100 gets it from the backend, or its final answer without having sent the body.
func TestContinue(t *testing.T) {
	p := start(t, nil, web(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(417)
			return
		}
		echo(w, r)
	}))
	for path, want := range map[string]string{"/": "200 POST / hello", "/no": "417 "} {
		c := p.dial(t)
		io.WriteString(c, "POST "+path+" HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
		r := bufio.NewReader(c)
		a, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if a.StatusCode == 100 {
			io.WriteString(c, "hello")
			if a, err = http.ReadResponse(r, nil); err != nil {
				t.Fatal(err)
			}
		}
		body, _ := io.ReadAll(a.Body)
		if got := fmt.Sprintf("%d %s", a.StatusCode, body); got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
}

// TestEarlyAnswer comes before the request is complete, whose rest the client need not send.
func TestEarlyAnswer(t *testing.T) {
	p := start(t, nil, listen(t, func(c net.Conn) {
		c.Read(make([]byte, 4096))
		io.WriteString(c, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno")
	}))
	c := p.dial(t)
	io.WriteString(c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\nabc")
	if answers, end := readAnswers(c); fmt.Sprint(answers) != "[413 no]" || end != io.EOF {
		t.Errorf("%q, %v", answers, end)
	}
}

// TestBothWays: bodies stream in both directions at once.
func TestBothWays(t *testing.T) {
	p := start(t, nil, web(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		b := make([]byte, 1)
		for {
			if n, _ := r.Body.Read(b); n == 0 {
				return
			}
			w.Write(b)
			w.(http.Flusher).Flush()
		}
	}))
	c := p.dial(t)
	io.WriteString(c, chunkedHead+"1\r\na\r\n")
	r := bufio.NewReader(c)
	a, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	one := make([]byte, 1)
	for i := range 10 {
		if _, err := io.ReadFull(a.Body, one); err != nil || one[0] != byte('a'+i) {
			t.Fatalf("%q, %v", one, err)
		}
		fmt.Fprintf(c, "1\r\n%c\r\n", 'b'+i)
	}
	io.WriteString(c, "1\r\nz\r\n0\r\n\r\n")
	if rest, err := io.ReadAll(a.Body); err != nil || string(rest) != "kz" {
		t.Errorf("%q, %v", rest, err)
	}
}

// TestCutRequest: a request that its client does not complete is none for the backend.
func TestCutRequest(t *testing.T) {
	got := make(chan error, 1)
	p := start(t, nil, web(t, func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		got <- err
	}))
	for _, send := range []string{chunkedHead + "3\r\nabc\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nabc"} {
		c := p.dial(t)
		io.WriteString(c, send)
		c.CloseWrite()
		if err := <-got; err == nil {
			t.Errorf("%q was taken for complete", send)
		}
		c.Close()
	}
}

// TestUpgrade: after the switch both sides say what they like, each until it closes its side.
func TestUpgrade(t *testing.T) {
	p := start(t, nil, listen(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		request, err := http.ReadRequest(r)
		if err != nil || request.Header.Get("Upgrade") != "echo" || request.Header.Get("Connection") != "Upgrade" {
			io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			return
		}
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nfirst ")
		io.Copy(c, r)
		io.WriteString(c, " last")
	}))
	c := p.dial(t)
	data := bytes.Repeat([]byte("0123456789"), 50_000)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: echo\r\n\r\nearly ")
	go func() {
		c.Write(data)
		c.CloseWrite()
	}()
	r := bufio.NewReader(c)
	a, err := http.ReadResponse(r, nil)
	if err != nil || a.StatusCode != 101 || a.Header.Get("Upgrade") != "echo" {
		t.Fatal(a, err)
	}
	got, err := io.ReadAll(r)
	if want := "first early " + string(data) + " last"; err != nil || string(got) != want {
		t.Errorf("%d bytes instead of %d, %v", len(got), len(want), err)
	}
	if r := p.records.wait(t, 1)[0]; r.Status != 101 || r.Local != "" || r.In != int64(len(data)+len("early ")) || r.Out != int64(len(got)) {
		t.Errorf("%+v", r)
	}
}

// TestNoUpgradeToHTTP2: through one, requests could pass unseen.
func TestNoUpgradeToHTTP2(t *testing.T) {
	p := start(t, nil, web(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header["Upgrade"], r.Header["Http2-Settings"])
	}))
	answers, _ := p.raw(t, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n")
	if fmt.Sprint(answers) != "[200 [] []]" {
		t.Errorf("%q", answers)
	}
}

// TestBackPressure: a client that does not read holds its backend up, and memory is bounded.
func TestBackPressure(t *testing.T) {
	const all = 1 << 30
	sent := make(chan int64, 1)
	p := start(t, func(s *settings) { s.limits.BodyTimeout = 500 * time.Millisecond }, listen(t, func(c net.Conn) {
		c.Read(make([]byte, 4096))
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", all)
		n, _ := io.Copy(c, io.LimitReader(zeros{}, all))
		sent <- n
	}))
	c := p.dial(t)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if n := <-sent; n > 100<<20 {
		t.Errorf("a client that does not read was sent %d bytes", n)
	}
	if r := p.records.wait(t, 1)[0]; r.Local != "body timeout" || r.Status != 200 {
		t.Errorf("%d %q", r.Status, r.Local)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestIdleConnectionsAreCheap: between requests a connection has no buffers.
func TestIdleConnectionsAreCheap(t *testing.T) {
	const clients, most = 500, 12 << 10 // bytes, of which the client's end has some, and the race detector
	p := start(t, nil, says(t, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false))
	memory := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse + m.StackInuse)
	}
	before := memory()
	answer := make([]byte, 1000)
	for range clients {
		c := p.dial(t)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if n, err := c.Read(answer); err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 200") {
			t.Fatal(err)
		}
	}
	p.records.wait(t, clients)
	each := (memory() - before) / clients
	t.Logf("%d bytes for each idle connection, with its client's", each)
	if each > most {
		t.Errorf("an idle connection costs %d bytes, more than %d", each, most)
	}
}
