package testbed

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// serve runs Serve on a free port until the test ends, and returns its address.
func serve(t *testing.T, name string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan string, 1), make(chan error, 1)
	go func() { done <- Serve(ctx, name, "127.0.0.1:0", func(a net.Addr) { ready <- a.String() }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ending the server: %v", err)
		}
	})
	select {
	case a := <-ready:
		return a
	case err := <-done:
		t.Fatal(err)
		return ""
	}
}

func TestServeSaysWhoAnsweredWhom(t *testing.T) {
	at := serve(t, "east/shop-1")
	defer http.DefaultClient.CloseIdleConnections()
	resp, err := http.Post("http://"+at+"/some/path?q=1", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var got Served
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if resp.Header.Get(ServedByHeader) != "east/shop-1" || got.ServedBy != "east/shop-1" || got.Method != "POST" ||
		got.Path != "/some/path" || got.Host != at || got.Address != at || !strings.HasPrefix(got.Client, "127.0.0.1:") || got.Hostname == "" {
		t.Errorf("header %q, body %+v", resp.Header.Get(ServedByHeader), got)
	}
}

func TestServeSendsPacketsBack(t *testing.T) {
	conn, err := net.Dial("udp", serve(t, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("there and back")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := conn.Read(buf); err != nil || string(buf[:n]) != "there and back" {
		t.Errorf("%q came back, %v", buf[:n], err)
	}
}

func TestServePortTaken(t *testing.T) {
	at := serve(t, "first")
	if err := Serve(t.Context(), "second", at, nil); err == nil || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("error %v", err)
	}
}

func TestLoad(t *testing.T) {
	at := serve(t, "east/shop-1")
	for _, fresh := range []bool{true, false} {
		r, err := Load(t.Context(), LoadOptions{URL: "http://" + at, Rate: 2000, Requests: 200, NewConnections: fresh})
		if err != nil || r.Requests != 200 || r.Failed != 0 || r.By["east"] != 200 || r.Servers["east/shop-1"] != 200 || r.Latency.P50 <= 0 || r.Latency.P50 > r.Latency.Max {
			t.Errorf("new connections %v: %+v, %v", fresh, r, err)
		}
	}
	r, err := Load(t.Context(), LoadOptions{URL: "http://" + at, Rate: 100, Duration: 200 * time.Millisecond})
	if err != nil || r.Requests != 20 {
		t.Errorf("20 requests make 200 ms at 100/s: %+v, %v", r, err)
	}
}

func TestLoadCountsFailures(t *testing.T) {
	before := time.Now()
	r, err := Load(t.Context(), LoadOptions{URL: "http://127.0.0.1:1", Rate: 1000, Requests: 5})
	if err != nil || r.Failed != 5 || r.Errors["connection refused"] != 5 || len(r.By) != 0 ||
		len(r.Failures) != 5 || r.Failures[0].Error != "connection refused" || r.Failures[0].Sent.Before(before) || r.Failures[0].Sent.After(time.Now()) {
		t.Errorf("%+v, %v", r, err)
	}
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	r, err = Load(t.Context(), LoadOptions{URL: "http://" + mute.Addr().String(), Rate: 1000, Requests: 2, Timeout: 50 * time.Millisecond})
	if err != nil || r.Errors["timeout"] != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	for _, o := range []LoadOptions{{URL: "nonsense", Rate: 1, Requests: 1}, {URL: "http://x", Requests: 1}, {URL: "http://x", Rate: 1}} {
		if _, err := Load(t.Context(), o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

func TestLoadEndsWithItsContext(t *testing.T) {
	at := serve(t, "x")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	r, err := Load(ctx, LoadOptions{URL: "http://" + at, Rate: 100, Duration: time.Hour})
	if err != nil || r.Requests == 0 || r.Requests > 6 || r.Failed > 0 {
		t.Errorf("%+v, %v", r, err)
	}
}
