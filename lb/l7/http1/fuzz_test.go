package http1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"causeway/lb/l7/exchange"
)

// parse reads a request as the engine does: its head, and its body without the coding. Ok: it is one, and all there.
func parse(b []byte) (h *head, body []byte, ok bool) {
	end, p := findHead(b, 0)
	if p != nil || end <= 4 {
		return nil, nil, false
	}
	h = &head{}
	if h.parseRequest(b[:end], exchange.DefaultLimits().HeaderFields) != nil {
		return nil, nil, false
	}
	body, ok = parseBody(h, b[end:])
	return h, body, ok
}

func parseBody(h *head, rest []byte) (body []byte, ok bool) {
	if h.chunked {
		c := chunked{strip: true}
		rest = bytes.Clone(rest)
		_, p := c.feed(rest)
		return rest[:c.kept], p == nil && c.done()
	}
	n := max(h.length, 0)
	if int64(len(rest)) < n {
		return nil, false
	}
	return rest[:n], true
}

// FuzzRequest: what the engine takes for a request, net/http takes for the same. It is the stricter one, except that
//   - it forgives one empty line before a request (RFC 9112, 2.2),
//   - it does not look into targets further than for what may be in them ("/%zz"), nor into an absolute target's port,
//   - net/http gives up on chunks that are mostly not data.
func FuzzRequest(f *testing.F) {
	for _, test := range refused {
		if len(test.request) < 2000 {
			f.Add([]byte(test.request))
		}
	}
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET /a?b HTTP/1.0\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET http://b/c HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
		"\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: x, close\r\nX: 1\r\n\r\n",
		chunkedHead + "3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\n", chunkedHead + "00\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, body, ok := parse(b)
		if !ok {
			return
		}
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b[h.line:])))
		if err != nil {
			if _, urlErr := url.ParseRequestURI(string(h.target)); urlErr != nil || h.authority != nil {
				return
			}
			t.Fatalf("net/http refuses %q: %v", b, err)
		}
		if r.Method != string(h.method) || r.Host != string(h.host) || h.authority == nil && r.RequestURI != string(h.target) {
			t.Fatalf("net/http reads %s %s of %s in %q", r.Method, r.RequestURI, r.Host, b)
		}
		if h.chunked != (len(r.TransferEncoding) == 1) || !h.chunked && r.ContentLength != max(h.length, 0) {
			t.Fatalf("net/http frames %q otherwise: %v, %d", b, r.TransferEncoding, r.ContentLength)
		}
		got, err := io.ReadAll(r.Body)
		if err != nil && strings.Contains(err.Error(), "non-data") {
			return
		}
		if err != nil || !bytes.Equal(got, body) {
			t.Fatalf("net/http reads the body of %q as %q instead of %q, %v", b, got, body, err)
		}
		// What is sent on is read the same way again, by both.
		checkWritten(t, h, b)
	})
}

// checkWritten writes a request as a backend is sent it, and reads it again.
func checkWritten(t *testing.T, h *head, b []byte) {
	x := &transfer{c: &conn{client: &exchange.Client{}}, in: takeBuffer(len(b)).add(b), whole: true}
	x.req.parseRequest(b[:len(h.raw)], 0)
	x.taken = len(b)
	x.writeRequest()
	sent := x.out.bytes()
	again, _, ok := parse(sent)
	if !ok || !bytes.Equal(again.method, h.method) || !bytes.Equal(again.target, h.target) || !bytes.Equal(again.host, h.host) || again.length != h.length || again.chunked != h.chunked {
		t.Fatalf("%q is sent on as %q", b, sent)
	}
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(sent)))
	if err != nil {
		if _, urlErr := url.ParseRequestURI(string(h.target)); urlErr == nil {
			t.Fatalf("%q is sent on as %q, which net/http refuses: %v", b, sent, err)
		}
		return
	}
	for _, name := range []string{"Keep-Alive", "Te", "Proxy-Connection", "Proxy-Authorization"} {
		if r.Header.Get(name) != "" {
			t.Fatalf("%s of %q is sent on", name, b)
		}
	}
}

// FuzzResponse: what the engine takes for an answer, net/http takes for the same.
func FuzzResponse(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 204\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\nuntil the end",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
		"HTTP/1.1 200 OK\r\nConnection: close, x\r\nX: y\r\n\r\nabc", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		end, p := findHead(b, 0)
		if p != nil || end == 0 {
			return
		}
		x := &transfer{c: &conn{}, answer: takeBuffer(len(b)).add(b)}
		x.req.minor = 1
		if x.ans.parseAnswer(x.answer.bytes()[:end], 200) != nil || x.ans.status < 200 {
			return
		}
		part, p := x.beginBody()
		if p != nil || !x.bodyDone() && !x.toEnd {
			return
		}
		if x.ans.chunked {
			c := chunked{strip: true}
			part = bytes.Clone(part)
			c.feed(part)
			part = part[:c.kept]
		}
		r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), nil)
		if err != nil {
			t.Fatalf("net/http refuses %q: %v", b, err)
		}
		got, err := io.ReadAll(r.Body)
		if err != nil && strings.Contains(err.Error(), "non-data") {
			return
		}
		if err != nil || r.StatusCode != x.ans.status || !bytes.Equal(got, part) {
			t.Fatalf("net/http reads %q as %d %q instead of %d %q, %v", b, r.StatusCode, got, x.ans.status, part, err)
		}
	})
}

// FuzzChunked: where reads end makes no difference to what a chunked body is.
func FuzzChunked(f *testing.F) {
	f.Add([]byte("3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\nGET"), 4)
	f.Add([]byte("ffffffffffffffff\r\n"), 2)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		cut = min(max(cut, 0), len(b))
		var whole, pieces chunked
		n, p := whole.feed(b)
		m, q := pieces.feed(b[:cut])
		if m == cut && q == nil {
			var more int
			more, q = pieces.feed(b[cut:])
			m += more
		}
		if n != m || p != q || whole.done() != pieces.done() || whole.data != pieces.data {
			t.Fatalf("%q cut at %d: %d, %v instead of %d, %v", b, cut, m, q, n, p)
		}
	})
}
