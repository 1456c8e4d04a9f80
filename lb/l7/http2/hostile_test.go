package http2

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"causeway/lb"
	"causeway/lb/l7/exchange"
)

// raw is a client that says what it likes.
type raw struct {
	*http2.Framer
	net.Conn
	t   testing.TB
	enc *hpack.Encoder
	buf bytes.Buffer
}

func newRaw(p *proxy, settings ...http2.Setting) *raw {
	conn, err := net.Dial("tcp", p.address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(15 * time.Second))
	r := &raw{Conn: conn, Framer: http2.NewFramer(conn, conn), t: p.t}
	r.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	r.enc = hpack.NewEncoder(&r.buf)
	io.WriteString(conn, Preface)
	r.WriteSettings(settings...)
	return r
}

func (r *raw) ask(id uint32, last bool, more ...string) {
	r.buf.Reset()
	for i, f := range append([]string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "x"}, more...) {
		if i%2 == 1 {
			continue
		}
		v := append([]string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "x"}, more...)[i+1]
		r.enc.WriteField(hpack.HeaderField{Name: f, Value: v})
	}
	r.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: r.buf.Bytes(), EndStream: last, EndHeaders: true})
}

// until reads frames until f says that it is the one.
func (r *raw) until(what string, f func(http2.Frame) bool) {
	r.t.Helper()
	for {
		x, err := r.ReadFrame()
		if err != nil {
			r.t.Fatalf("waiting for %s: %v", what, err)
		}
		if f(x) {
			return
		}
	}
}

func (r *raw) calm() {
	r.t.Helper()
	r.until("GOAWAY ENHANCE_YOUR_CALM", func(f http2.Frame) bool {
		g, ok := f.(*http2.GoAwayFrame)
		return ok && g.ErrCode == http2.ErrCodeEnhanceYourCalm
	})
}

func TestFloodsAreCalmed(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	p := newProxy(t, nil, webServer(t, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-stop:
		case <-r.Context().Done():
		}
	}))
	floods := map[string]func(*raw, int) error{
		"rapid reset": func(r *raw, i int) error {
			r.ask(uint32(2*i+1), true)
			return r.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel)
		},
		"SETTINGS": func(r *raw, _ int) error { return r.WriteSettings() },
		"PING":     func(r *raw, _ int) error { return r.WritePing(false, [8]byte{}) },
		"empty DATA": func(r *raw, i int) error {
			if i == 0 {
				r.ask(1, false)
			}
			return r.WriteData(1, false, nil)
		},
		"CONTINUATION": func(r *raw, i int) error {
			if i == 0 {
				return r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			}
			return r.WriteContinuation(1, false, nil)
		},
	}
	for name, flood := range floods {
		t.Run(name, func(t *testing.T) {
			r := newRaw(p)
			r.t = t
			go func() {
				for i := range 20_000 {
					if flood(r, i) != nil {
						return
					}
				}
			}()
			r.calm()
		})
	}
	// Who behaves is served.
	r := newRaw(p)
	r.ask(1, true)
	r.WritePing(false, [8]byte{1})
	r.until("PING's answer", func(f http2.Frame) bool { _, ok := f.(*http2.PingFrame); return ok })
}

func TestSlowReaderHoldsLittleAndHarmsNobody(t *testing.T) {
	body := make([]byte, 64<<20)
	p := newProxy(t, func(_ *lb.L7Options, l *exchange.Limits) { l.BodyTimeout = 3 * time.Second }, webServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			w.Write(body) //nolint:errcheck
		}
		io.WriteString(w, "small")
	}))
	var before, after runtime.MemStats
	slow := newRaw(p, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
	slow.WriteWindowUpdate(0, 1<<31-1-65535)
	runtime.GC()
	runtime.ReadMemStats(&before)
	shut := newRaw(p, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	for id := uint32(1); id < 40; id += 2 {
		slow.ask(id, true) // It is never read.
		shut.ask(id, true)
	}
	good := newRaw(p)
	for id := uint32(1); id < 20; id += 2 {
		good.ask(id, true)
		got := 0
		good.until("a body", func(f http2.Frame) bool {
			if d, ok := f.(*http2.DataFrame); ok {
				got += len(d.Data())
				good.WriteWindowUpdate(0, uint32(max(1, len(d.Data()))))
				good.WriteWindowUpdate(id, uint32(max(1, len(d.Data()))))
				return got >= 1<<20
			}
			return false
		})
		good.WriteRSTStream(id, http2.ErrCodeCancel)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 32<<20 {
		t.Errorf("%d MiB are held", grown>>20)
	}
	shut.until("a reset for want of a window", func(f http2.Frame) bool {
		x, ok := f.(*http2.RSTStreamFrame)
		return ok && x.ErrCode == http2.ErrCodeCancel
	})
}

func TestHeadersTooLarge(t *testing.T) {
	p := newProxy(t, func(_ *lb.L7Options, l *exchange.Limits) { l.HeaderBytes = 4 << 10 }, webServer(t, func(http.ResponseWriter, *http.Request) {}))
	r := newRaw(p)
	r.ask(1, true, "x-a", strings.Repeat("a", 2000), "x-b", strings.Repeat("b", 2000), "x-c", strings.Repeat("c", 2000))
	r.until("431", func(f http2.Frame) bool {
		h, ok := f.(*http2.MetaHeadersFrame)
		return ok && h.PseudoValue("status") == "431"
	})
	r.ask(3, true)
	r.until("200", func(f http2.Frame) bool {
		h, ok := f.(*http2.MetaHeadersFrame)
		return ok && h.StreamID == 3 && h.PseudoValue("status") == "200"
	})
}

func TestMalformedRequestsAreResetAlone(t *testing.T) {
	p := newProxy(t, nil, webServer(t, func(http.ResponseWriter, *http.Request) {}))
	r := newRaw(p)
	bad := [][]string{
		{"connection", "close"}, {"transfer-encoding", "chunked"}, {"te", "gzip"}, {"X-Upper", "a"}, {"x", "a\r\nb: c"}, {"x y", "a"}, {":path", "/2"},
		{"content-length", "5"}, {"content-length", "0", "content-length", "1"}, {"content-length", "+0"}, {":status", "200"},
	}
	id := uint32(1)
	for _, fields := range bad {
		r.ask(id, true, fields...)
		r.until("a reset of "+strings.Join(fields, " "), func(f http2.Frame) bool {
			x, ok := f.(*http2.RSTStreamFrame)
			return ok && x.StreamID == id
		})
		id += 2
	}
	r.ask(id, true)
	r.until("200", func(f http2.Frame) bool {
		h, ok := f.(*http2.MetaHeadersFrame)
		return ok && h.PseudoValue("status") == "200"
	})
}

// liar is a backend that does what f says with each connection's first request.
func liar(t testing.TB, f func(*raw, uint32)) string {
	l := listen(t)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.ReadFull(conn, make([]byte, len(Preface)))
				r := &raw{Conn: conn, Framer: http2.NewFramer(conn, conn), t: t}
				r.enc = hpack.NewEncoder(&r.buf)
				r.WriteSettings()
				for {
					x, err := r.ReadFrame()
					if err != nil {
						return
					}
					if h, ok := x.(*http2.HeadersFrame); ok {
						f(r, h.StreamID)
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

func (r *raw) answer(id uint32, last bool, fields ...string) {
	r.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		r.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	r.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: r.buf.Bytes(), EndStream: last, EndHeaders: true})
}

func TestBackendsThatFail(t *testing.T) {
	good := webServer(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "good") })
	for _, test := range []struct {
		name    string
		f       func(*raw, uint32)
		retried bool
	}{
		{"refuses", func(r *raw, id uint32) { r.WriteRSTStream(id, http2.ErrCodeRefusedStream) }, true},
		{"goes away", func(r *raw, _ uint32) { r.WriteGoAway(0, http2.ErrCodeNo, nil) }, true},
		{"closes", func(r *raw, _ uint32) { r.Close() }, true},
		{"is busy", func(r *raw, id uint32) { r.answer(id, true, ":status", "503") }, true},
		{"has no status", func(r *raw, id uint32) { r.answer(id, true, "x", "y") }, false},
		{"speaks HTTP/1", func(r *raw, _ uint32) { io.WriteString(r.Conn, "HTTP/1.1 400 Bad Request\r\n\r\n") }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newProxy(t, nil, liar(t, test.f), good)
			client := &http.Client{Transport: &http.Transport{Protocols: new(http.Protocols)}}
			client.Transport.(*http.Transport).Protocols.SetUnencryptedHTTP2(true)
			defer client.CloseIdleConnections()
			var codes []int
			for range 4 {
				a, err := client.Get("http://" + p.address + "/")
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, a.Body)
				a.Body.Close()
				codes = append(codes, a.StatusCode)
			}
			for _, c := range codes {
				if c != 200 && (test.retried || c != 502) {
					t.Errorf("%v", codes)
				}
			}
		})
	}
}

func TestBodyThatIsCutShortIsReset(t *testing.T) {
	p := newProxy(t, nil, liar(t, func(r *raw, id uint32) {
		r.answer(id, false, ":status", "200", "content-length", "10")
		r.WriteData(id, true, []byte("12345"))
	}))
	r := newRaw(p)
	r.ask(1, true)
	r.until("a reset", func(f http2.Frame) bool { _, ok := f.(*http2.RSTStreamFrame); return ok })
}

func FuzzConn(f *testing.F) {
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	fr.WriteSettings()
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82, 0x86, 0x84, 0x41, 1, 'x'}, EndHeaders: true})
	fr.WriteData(1, true, []byte("hello"))
	fr.WriteWindowUpdate(1, 7)
	fr.WriteRSTStream(1, http2.ErrCodeCancel)
	f.Add(b.Bytes())
	p := newProxy(f, nil)
	f.Fuzz(func(t *testing.T, input []byte) {
		a, z := net.Pipe()
		go io.Copy(io.Discard, z)
		go func() {
			io.WriteString(z, Preface)
			z.Write(input)
			z.Close()
		}()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		Serve(ctx, p.env, &exchange.Client{Conn: a, Port: p.table.Ports()[0]})
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
			t.Fatal(err)
		}
	})
}

func BenchmarkUnary(b *testing.B) {
	p := newProxy(b, nil, liar(b, func(r *raw, id uint32) {
		r.answer(id, false, ":status", "200", "content-type", "application/grpc")
		r.WriteData(id, false, []byte("\x00\x00\x00\x00\x05hello"))
		r.answer(id, true, "grpc-status", "0")
	}))
	r := newRaw(p)
	r.SetDeadline(time.Time{})
	r.ReadMetaHeaders = nil
	r.SetReuseFrames()
	fields := []string{":method", "POST", ":scheme", "http", ":path", "/test.Echo/Say", ":authority", "x", "content-type", "application/grpc", "te", "trailers"}
	b.ReportAllocs()
	id := uint32(1)
	for b.Loop() {
		r.answer(id, false, fields...)
		r.WriteData(id, true, []byte("\x00\x00\x00\x00\x05hello"))
		for {
			x, err := r.ReadFrame()
			if err != nil {
				b.Fatal(err)
			}
			if x.Header().StreamID == id && x.Header().Type == http2.FrameHeaders && x.Header().Flags.Has(http2.FlagHeadersEndStream) {
				break
			}
		}
		r.WriteWindowUpdate(0, 10) // what the answer's message took of the connection
		id += 2
	}
}
