package http1

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// echo answers with the request's method, path and body.
func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	fmt.Fprintf(w, "%s %s %s", r.Method, r.RequestURI, body)
}

func TestRequestsAndAnswers(t *testing.T) {
	p := start(t, nil, web(t, echo))
	h := client(t)
	for _, test := range []struct{ method, path, body, want string }{
		{"GET", "/a?b=c", "", "GET /a?b=c "},
		{"POST", "/", "hello", "POST / hello"},
		{"PUT", "/x", strings.Repeat("y", 30_000), "PUT /x " + strings.Repeat("y", 30_000)},
		{"POST", "/large", strings.Repeat("z", 3<<20), "POST /large " + strings.Repeat("z", 3<<20)},
		{"DELETE", "/d", "", "DELETE /d "},
	} {
		for _, chunked := range []bool{false, true} {
			var body io.Reader
			if test.body != "" {
				body = strings.NewReader(test.body)
				if chunked {
					body = io.MultiReader(body)
				}
			}
			r, err := http.NewRequest(test.method, p.url(test.path), body)
			if err != nil {
				t.Fatal(err)
			}
			a, err := h.Do(r)
			if err != nil {
				t.Fatalf("%s chunked=%v: %v", test.method, chunked, err)
			}
			got, err := io.ReadAll(a.Body)
			a.Body.Close()
			if err != nil || string(got) != test.want {
				t.Errorf("%s %s chunked=%v: %d bytes, %v", test.method, test.path, chunked, len(got), err)
			}
		}
	}
	for i, r := range p.records.wait(t, 10) {
		if r.Status != 200 || r.Local != "" || r.Retries != 0 || r.Endpoint == nil || r.In == 0 && i > 1 && i < 8 || r.Out == 0 {
			t.Errorf("record %d: %+v", i, r)
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	p := start(t, nil, web(t, echo), web(t, echo), web(t, echo))
	h := client(t)
	data := make([]byte, 100_000)
	rand.Read(data)
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			for j := range 20 {
				part := data[:(i*j*977)%len(data)]
				a, err := h.Post(p.url("/"), "x/y", bytes.NewReader(part))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(a.Body)
				a.Body.Close()
				if want := append([]byte("POST / "), part...); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes instead of %d, %v", len(got), len(want), err)
				}
			}
		})
	}
	all.Wait()
	p.records.wait(t, 400)
}
