package http1

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"causeway/lb"
)

// TestInPieces: where reads begin and end makes no difference, on either side.
func TestInPieces(t *testing.T) {
	const answer = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;e=f\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\nT: u\r\n\r\n"
	p := start(t, nil, listen(t, func(c net.Conn) {
		for r := bufio.NewReader(c); ; {
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			io.Copy(io.Discard, request.Body)
			for i := range answer {
				io.WriteString(c, answer[i:i+1])
			}
		}
	}))
	request := "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n" + chunkedHead + "3\r\nabc\r\n0\r\nA: b\r\n\r\n" +
		"POST /3 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" + "GET /4 HTTP/1.1\r\nHost: a\r\n\r\n"
	c := p.dial(t)
	go func() {
		for i := range request {
			io.WriteString(c, request[i:i+1])
		}
		c.CloseWrite()
	}()
	const one = "200 abc0123456789abcdef"
	var finals []string
	answers, end := readAnswers(c)
	for _, a := range answers {
		if !strings.HasPrefix(a, "103") {
			finals = append(finals, a)
		}
	}
	if want := []string{one, one, one, one}; fmt.Sprint(finals) != fmt.Sprint(want) || len(answers) != 8 || end != io.EOF {
		t.Errorf("%q, %v", answers, end)
	}
	for i, r := range p.records.wait(t, 4) {
		if want := []int64{0, 3, 5, 0}[i]; r.In != want || r.Out != 19 || r.Status != 200 {
			t.Errorf("record %d: in %d, out %d, status %d", i, r.In, r.Out, r.Status)
		}
	}
}

// TestBehindABody: what a client sends behind a body that was copied is its next request, as long as the connection stays.
func TestBehindABody(t *testing.T) {
	p := start(t, nil, web(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, r.URL.Path, " ", n)
	}))
	large := strings.Repeat("x", 300_000)
	chunk := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(large), large)
	c := p.dial(t)
	go func() {
		for range 3 {
			fmt.Fprintf(c, "POST /l HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", len(large), large)
			fmt.Fprintf(c, "%s%s", strings.Replace(chunkedHead, "/", "/c", 1), chunk)
			fmt.Fprint(c, "GET /g HTTP/1.1\r\nHost: a\r\n\r\n")
		}
		c.CloseWrite()
	}()
	answers, end := readAnswers(c)
	if got := fmt.Sprint(answers); got != "["+strings.TrimSpace(strings.Repeat("200 /l 300000 200 /c 300000 200 /g 0 ", 3))+"]" || end != io.EOF {
		t.Errorf("%s, %v", got, end)
	}
}

// TestLargeHeads pass up to their limit, in both directions.
func TestLargeHeads(t *testing.T) {
	p := start(t, nil, web(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Large", r.Header.Get("Large"))
	}))
	for _, n := range []int{7 << 10, 8 << 10, 9 << 10, 17 << 10, 40 << 10, 63 << 10} {
		r, _ := http.NewRequest("GET", p.url("/"), nil)
		r.Header.Set("Large", strings.Repeat("x", n))
		a, err := client(t).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		a.Body.Close()
		if a.StatusCode != 200 || len(a.Header.Get("Large")) != n {
			t.Errorf("%d: %d, %d bytes come back", n, a.StatusCode, len(a.Header.Get("Large")))
		}
	}
}

// TestHash: what is hashed alike goes to one backend.
func TestHash(t *testing.T) {
	for _, test := range []struct {
		name           string
		header, cookie string
		field          string
	}{
		{"header", "x-user", "", "X-User: %d\r\n"},
		{"cookie", "", "sid", "Cookie: other=1; sid=%d; more=2\r\n"},
	} {
		name := func(n string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, n) }
		}
		p := start(t, func(s *settings) {
			s.options.Algorithm, s.options.HashHeader, s.options.HashCookie = lb.Hashed, test.header, test.cookie
		}, web(t, name("a")), web(t, name("b")), web(t, name("c")))
		all := map[string]bool{}
		for user := range 20 {
			one := "GET / HTTP/1.1\r\nHost: a\r\n" + fmt.Sprintf(test.field, user) + "\r\n"
			answers, _ := p.raw(t, strings.Repeat(one, 5))
			if len(answers) != 5 || strings.Join(answers, "") != strings.Repeat(answers[0], 5) {
				t.Fatalf("%s %d: %q", test.name, user, answers)
			}
			all[answers[0]] = true
		}
		if len(all) != 3 {
			t.Errorf("%s: all users are at %v", test.name, all)
		}
	}
}

// TestReadBefore: what was read to see what a client speaks is its first request.
func TestReadBefore(t *testing.T) {
	p := start(t, nil, web(t, echo))
	for _, cut := range []int{1, 10, 30} {
		const request = "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
		near, far := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.serve(t, far, []byte(request[:cut]))
		}()
		go io.WriteString(near, request[cut:])
		if answers, _ := readAnswers(near); fmt.Sprint(answers) != "[200 POST /x hello]" {
			t.Errorf("%d: %q", cut, answers)
		}
		near.Close()
		<-done
	}
}
