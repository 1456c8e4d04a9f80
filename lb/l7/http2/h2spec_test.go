package http2

import (
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	h2 "github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"

	"causeway/lb"
	"causeway/lb/l7/exchange"
)

// webServer is net/http's, with prior knowledge of HTTP/2.
func webServer(t testing.TB, h http.HandlerFunc) string {
	l := listen(t)
	s := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	s.Protocols.SetUnencryptedHTTP2(true)
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// otherwise are cases in which RFC 9113 differs from RFC 7540, which h2spec has.
var otherwise = map[string]string{}

func TestH2Spec(t *testing.T) {
	p := newProxy(t, func(_ *lb.L7Options, l *exchange.Limits) { l.Resets = 0 }, webServer(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "hello")
	}))
	host, port, _ := net.SplitHostPort(p.address)
	number, _ := net.LookupPort("tcp", port)
	c := &config.Config{Host: host, Port: number, Path: "/", Timeout: 2 * time.Second, MaxHeaderLen: 4000, Strict: true}
	passed := 0
	var walk func(*spec.TestGroup)
	walk = func(g *spec.TestGroup) {
		for i, x := range append(g.Tests[:len(g.Tests):len(g.Tests)], g.StrictTests...) {
			if x.Result == nil {
				continue
			}
			if why, ok := otherwise[g.ID()+" "+x.Desc]; ok {
				t.Log(x.Desc, "is otherwise:", why)
			} else if x.Result.Failed || x.Result.Skipped {
				t.Errorf("%s/%d %s: %v", g.ID(), i+1, x.Desc, x.Result.Error)
			} else {
				passed++
			}
		}
		for _, sub := range g.Groups {
			walk(sub)
		}
	}
	for _, g := range []*spec.TestGroup{generic.Spec(), h2.Spec(), hpack.Spec()} {
		g.Test(c)
		walk(g)
	}
	t.Log(passed, "cases passed")
	if passed < 140 {
		t.Errorf("only %d cases were run", passed)
	}
}
