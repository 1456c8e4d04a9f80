package http1

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// refused are requests that nobody may read one way here and another way at the backend.
var refused = []struct{ name, request, want string }{
	{"bare LF", "GET / HTTP/1.1\nHost: a\n\n", "400"},
	{"bare LF in a field", "GET / HTTP/1.1\r\nHost: a\r\nA: b\nC: d\r\n\r\n", "400"},
	{"bare CR in a value", "GET / HTTP/1.1\r\nHost: a\r\nA: b\rC: d\r\n\r\n", "400"},
	{"NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nA: b\x00\r\n\r\n", "400"},
	{"DEL in a value", "GET / HTTP/1.1\r\nHost: a\r\nA: b\x7f\r\n\r\n", "400"},
	{"folded", "GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\n\r\n", "400"},
	{"folded first", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", "400"},
	{"blank before the colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n", "400"},
	{"no colon", "GET / HTTP/1.1\r\nHost: a\r\nnothing\r\n\r\n", "400"},
	{"empty name", "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", "400"},
	{"bad name", "GET / HTTP/1.1\r\nHost: a\r\nA(): b\r\n\r\n", "400"},
	{"bad method", "G<T / HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"two blanks", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"blank at the end", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", "400"},
	{"tab", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"control in the target", "GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"fragment", "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"8 bit target", "GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"target without a slash", "GET a HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"star", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"user in an absolute target", "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"CONNECT", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "405"},
	{"HTTP/0.9", "GET /\r\n\r\n", "400"},
	{"HTTP/1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", "505"},
	{"HTTP/2.0", "GET / HTTP/2.0\r\nHost: a\r\n\r\n", "505"},
	{"http/1.1", "GET / http/1.1\r\nHost: a\r\n\r\n", "400"},
	{"HTTP/01.1", "GET / HTTP/01.1\r\nHost: a\r\n\r\n", "400"},
	{"no Host", "GET / HTTP/1.1\r\nA: b\r\n\r\n", "400"},
	{"two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "400"},
	{"two Hosts of HTTP/1.0", "GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", "400"},
	{"bad Host", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "400"},
	{"list as Host", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", "400"},
	{"two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "400"},
	{"twice a length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", "400"},
	{"list of lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\na", "400"},
	{"signed length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na", "400"},
	{"negative length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\na", "400"},
	{"hex length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\na", "400"},
	{"empty length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\na", "400"},
	{"huge length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\na", "400"},
	{"blank in a length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1 1\r\n\r\na", "400"},
	{"CL.TE", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", "400"},
	{"TE.CL", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n1\r\na\r\n0\r\n\r\n", "400"},
	{"TE.TE", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", "400"},
	{"twice TE", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
	{"xchunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "501"},
	{"gzip, chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "501"},
	{"chunked, identity", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", "501"},
	{"vertical tab before chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", "400"},
	{"TE folded", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", "501"},
	{"TE with a blank", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", "400"},
	{"TE of HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
	{"chunk size overflows", chunkedHead + "10000000000000001\r\na\r\n0\r\n\r\n", "400"},
	{"chunk size signed", chunkedHead + "+1\r\na\r\n0\r\n\r\n", "400"},
	{"chunk size 0x", chunkedHead + "0x1\r\na\r\n0\r\n\r\n", "400"},
	{"chunk size empty", chunkedHead + "\r\n\r\n", "400"},
	{"chunk size with a blank", chunkedHead + "1 \r\na\r\n0\r\n\r\n", "400"},
	{"chunk size ends with LF", chunkedHead + "1\na\r\n0\r\n\r\n", "400"},
	{"chunk ends with LF", chunkedHead + "1\r\na\n0\r\n\r\n", "400"},
	{"chunk too short", chunkedHead + "2\r\na\r\n0\r\n\r\n", "400"},
	{"chunk too long", chunkedHead + "1\r\nab\r\n0\r\n\r\n", "400"},
	{"extension with LF", chunkedHead + "1;a\nb\r\na\r\n0\r\n\r\n", "400"},
	{"extension with CR", chunkedHead + "1;a\rb\r\na\r\n0\r\n\r\n", "400"},
	{"long extension", chunkedHead + "1;" + strings.Repeat("x", 300) + "\r\na\r\n0\r\n\r\n", "400"},
	{"trailer with LF", chunkedHead + "0\r\nA: b\n\r\n", "400"},
	{"trailer folded", chunkedHead + "0\r\nA: b\r\n c\r\n\r\n", "400"},
	{"trailer of framing", chunkedHead + "0\r\nContent-Length: 5\r\n\r\n", "400"},
	{"trailer of Host", chunkedHead + "0\r\nHost: b\r\n\r\n", "400"},
	{"large head", "GET / HTTP/1.1\r\nHost: a\r\nA: " + strings.Repeat("x", 70<<10) + "\r\n\r\n", "431"},
	{"many fields", "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("A: b\r\n", 201) + "\r\n", "431"},
	{"long target", "GET /" + strings.Repeat("x", 70<<10) + " HTTP/1.1\r\nHost: a\r\n\r\n", "414"},
	{"two empty lines", "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
}

const chunkedHead = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"

// TestRefused: a request that is no good is refused, whatever comes behind it is not looked at, and no backend takes any of it for a request.
func TestRefused(t *testing.T) {
	p := start(t, nil, web(t, func(_ http.ResponseWriter, r *http.Request) {
		if b, err := io.ReadAll(r.Body); err == nil {
			t.Errorf("a backend was sent %s %s %v: %q", r.Method, r.RequestURI, r.Header, b)
		}
	}))
	for i, test := range refused {
		answers, end := p.raw(t, test.request+"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
		if len(answers) != 1 || !strings.HasPrefix(answers[0], test.want) || end != io.EOF {
			t.Errorf("%s: %q, %v instead of one %s", test.name, answers, end, test.want)
		}
		if r := p.records.wait(t, i+1)[i]; fmt.Sprint(r.Status) != test.want || r.Local == "" {
			t.Errorf("%s: recorded as %d %q", test.name, r.Status, r.Local)
		}
	}
}

// TestRefusedInPieces: where what is read ends makes no difference.
func TestRefusedInPieces(t *testing.T) {
	for _, test := range refused {
		for cut := 1; cut < min(len(test.request), 200); cut++ {
			end, p := findHead([]byte(test.request[:cut]), 0)
			if p == nil && end == 0 {
				end, p = findHead([]byte(test.request), cut)
			}
			whole, wholeP := findHead([]byte(test.request), 0)
			if p != nil {
				continue // Refused at the piece already.
			}
			if wholeP == nil && whole > 4 && end > 4 && whole != end {
				t.Errorf("%s: the head ends at %d in pieces and at %d as a whole", test.name, end, whole)
			}
		}
	}
}

// TestLargeTrailer: trailers are bounded, though they may come in any number of pieces.
func TestLargeTrailer(t *testing.T) {
	var c chunked
	if _, p := c.feed([]byte("0\r\nA: ")); p != nil {
		t.Fatal(p)
	}
	for range maxTrailer {
		if _, p := c.feed([]byte("x")); p != nil {
			if p != largeHead {
				t.Error(p)
			}
			return
		}
	}
	t.Error("a trailer without an end is taken")
}

// TestBadAnswers: what a backend must not say is a 502, its connection is not used again, and it counts as its failure.
func TestBadAnswers(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, test := range []struct{ name, answer string }{
		{"nothing of HTTP", "hello\r\n\r\n"},
		{"HTTP/2", "HTTP/2.0 200 OK\r\n\r\n"},
		{"status of two digits", "HTTP/1.1 20 OK\r\n\r\n"},
		{"status of four digits", "HTTP/1.1 2000 OK\r\n\r\n"},
		{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 0\n\n"},
		{"bare CR", ok + "A: b\rc\r\nContent-Length: 0\r\n\r\n"},
		{"folded", ok + "A: b\r\n c\r\nContent-Length: 0\r\n\r\n"},
		{"two lengths", ok + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"},
		{"length and chunks", ok + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"gzip", ok + "Transfer-Encoding: gzip\r\n\r\n"},
		{"chunks of HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{"bad chunk", ok + "Transfer-Encoding: chunked\r\n\r\nzz\r\n"},
		{"unasked switch", "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"},
		{"large head", ok + "A: " + strings.Repeat("x", 70<<10) + "\r\n\r\n"},
		{"closes without a word", ""},
		{"closes in the head", "HTTP/1.1 200 OK\r\nA: "},
	} {
		p := start(t, func(s *settings) { s.options.Retries = 0 }, says(t, test.answer, true))
		answers, _ := p.raw(t, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
		if len(answers) != 1 || !strings.HasPrefix(answers[0], "502") {
			t.Errorf("%s: %q", test.name, answers)
		}
		if r := p.records.wait(t, 1)[0]; r.Status != 502 || r.Local == "" {
			t.Errorf("%s: recorded as %d %q", test.name, r.Status, r.Local)
		}
		if pool := poolOf(p.port.Endpoints()[0]); pool.open != 0 {
			t.Errorf("%s: %d connections are open", test.name, pool.open)
		}
	}
}

// TestLyingBackends: an answer that is cut is never taken for complete.
func TestLyingBackends(t *testing.T) {
	for _, test := range []struct{ name, answer string }{
		{"less than its length", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"},
		{"no last chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"},
		{"half a chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc"},
		{"bad chunk later", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("400\r\n"+strings.Repeat("x", 1024)+"\r\n", 100) + "zz\r\n"},
	} {
		p := start(t, nil, says(t, test.answer, true))
		a, err := client(t).Get(p.url("/"))
		if err == nil {
			_, err = io.ReadAll(a.Body)
			a.Body.Close()
		}
		if err == nil {
			t.Errorf("%s: taken for complete", test.name)
		}
		if r := p.records.wait(t, 1)[0]; r.Local == "" {
			t.Errorf("%s: recorded as %d %q", test.name, r.Status, r.Local)
		}
	}
}

// TestResetAnswer: an answer that ends with its connection is not complete if that was reset.
func TestResetAnswer(t *testing.T) {
	read := make(chan struct{})
	p := start(t, nil, listen(t, func(c net.Conn) {
		c.Read(make([]byte, 4096))
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nabc")
		<-read
		c.(*net.TCPConn).SetLinger(0)
	}))
	c := p.dial(t)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	a, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(a.Body, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	close(read)
	if rest, err := io.ReadAll(a.Body); err == nil {
		t.Errorf("taken for complete, with %q", rest)
	}
	if r := p.records.wait(t, 1)[0]; r.Status != 200 || r.Local == "" {
		t.Errorf("recorded as %d %q", r.Status, r.Local)
	}
}

// TestSurplus: what a backend says behind its answer is nobody's.
func TestSurplus(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
		"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nevil",
		"HTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
	} {
		var connections atomic.Int32
		p := start(t, nil, listen(t, func(c net.Conn) {
			connections.Add(1)
			for r := bufio.NewReader(c); ; {
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				io.WriteString(c, answer)
			}
		}))
		for range 3 {
			answers, end := p.raw(t, strings.Repeat("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 3))
			if len(answers) != 3 || end != io.EOF || strings.Contains(strings.Join(answers, ""), "evil") {
				t.Errorf("%.40q: %q, %v", answer, answers, end)
			}
		}
		if n := connections.Load(); n != 9 {
			t.Errorf("%.40q: 9 requests took %d connections to a backend that is not to be trusted", answer, n)
		}
	}
}

// TestSurplusLater: also if it comes when the connection is idle.
func TestSurplusLater(t *testing.T) {
	said := make(chan struct{}, 10)
	answered := make(chan struct{}, 10)
	p := start(t, nil, listen(t, func(c net.Conn) {
		b := make([]byte, 4096)
		if _, err := c.Read(b); err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
		<-answered
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
		said <- struct{}{}
		io.Copy(io.Discard, c)
	}))
	for range 3 {
		a, err := client(t).Post(p.url("/"), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := io.ReadAll(a.Body); string(b) != "good" {
			t.Errorf("%q", b)
		}
		answered <- struct{}{}
		<-said
	}
}

// TestSlowHead: a head that does not end is answered by 408, one that does not begin by nothing.
func TestSlowHead(t *testing.T) {
	p := start(t, func(s *settings) {
		s.limits.HeaderTimeout, s.limits.IdleTimeout = 100*time.Millisecond, 100*time.Millisecond
	}, web(t, echo))
	c := p.dial(t)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost:")
	if answers, end := readAnswers(c); len(answers) != 1 || !strings.HasPrefix(answers[0], "408") || end != io.EOF {
		t.Errorf("%q, %v", answers, end)
	}
	if answers, end := readAnswers(p.dial(t)); len(answers) != 0 || end != io.EOF {
		t.Errorf("%q, %v", answers, end)
	}
}

// TestSlowBody: a body that does not move ends the request.
func TestSlowBody(t *testing.T) {
	p := start(t, func(s *settings) { s.limits.BodyTimeout = 200 * time.Millisecond }, web(t, echo))
	c := p.dial(t)
	io.WriteString(c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
	if answers, _ := readAnswers(c); len(answers) != 1 || !strings.HasPrefix(answers[0], "408") {
		t.Errorf("%q", answers)
	}
}
