package testbed

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// pod is what a server of [Serve] answers with.
type pod struct {
	name string
	sick atomic.Bool
}

// handler answers what the tests of L7 balancing ask, and everything else with [Served]:
//
//	/status/CODE  that status
//	/slow?ms=N    after N milliseconds
//	/bytes/N      N bytes, streamed
//	/upload       how many bytes came
//	/drip?n=N&ms=M  N lines, one every M milliseconds
//	/sick, /well  from now on everything else fails with 503, and no longer
func (p *pod) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 599 {
			http.Error(w, "the status is to be from 200 to 599", http.StatusBadRequest)
			return
		}
		w.WriteHeader(code)
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		if p.wait(r, r.FormValue("ms")) {
			p.echo(w, r)
		}
	})
	mux.HandleFunc("/bytes/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "say how many bytes, like /bytes/1000", http.StatusBadRequest)
			return
		}
		chunk := bytes.Repeat([]byte("x"), 32<<10)
		for ; n > 0; n -= int64(len(chunk)) {
			if _, err := w.Write(chunk[:min(n, int64(len(chunk)))]); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(w, n)
	})
	mux.HandleFunc("/drip", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.FormValue("n"))
		for i := range n {
			fmt.Fprintln(w, i)
			_ = http.NewResponseController(w).Flush() // the client has gone; the next wait sees it
			if !p.wait(r, r.FormValue("ms")) {
				return
			}
		}
	})
	mux.HandleFunc("/sick", func(http.ResponseWriter, *http.Request) { p.sick.Store(true) })
	mux.HandleFunc("/well", func(http.ResponseWriter, *http.Request) { p.sick.Store(false) })
	mux.HandleFunc("/", p.echo)
	calls := p.grpc()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			calls.ServeHTTP(w, r)
			return
		}
		w.Header().Set(ServedByHeader, p.name)
		if p.sick.Load() && r.URL.Path != "/sick" && r.URL.Path != "/well" {
			http.Error(w, "told to be sick; ask for /well", http.StatusServiceUnavailable)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// wait is false if the client has gone meanwhile.
func (p *pod) wait(r *http.Request, ms string) bool {
	n, _ := strconv.Atoi(ms)
	select {
	case <-r.Context().Done():
		return false
	case <-time.After(time.Duration(n) * time.Millisecond):
		return true
	}
}

func (p *pod) echo(w http.ResponseWriter, r *http.Request) {
	served := p.served(r)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(served) // the client has gone; nobody is left to tell
}
