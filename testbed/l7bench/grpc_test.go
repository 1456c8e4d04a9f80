package main

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// cleartext is HTTP/2 with prior knowledge and nothing else.
func cleartext() *http.Protocols {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &p
}

func TestBackendAnswersARealClient(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_ = serveGRPC(c)
			}()
		}
	}()
	transport := &http.Transport{Protocols: cleartext()}
	defer transport.CloseIdleConnections()
	for range 3 { // the later ones meet what is in the header tables
		resp, err := (&http.Client{Transport: transport}).Post("http://"+ln.Addr().String()+grpcMethod, "application/grpc", bytes.NewReader(grpcMessage))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(body, grpcMessage) || resp.StatusCode != 200 || resp.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("answered %d, body %q, trailers %v, error %v", resp.StatusCode, body, resp.Trailer, err)
		}
	}
	took, err := calls(ln.Addr().String(), grpcMethod, grpcStreams, time.Now().Add(20*time.Millisecond))
	if err != nil || len(took) <= grpcStreams {
		t.Errorf("%d calls ended, error %v; want more than the first ones", len(took), err)
	}
}

func TestClientRefusesWhatIsNoAnswer(t *testing.T) {
	answer := func(status int, grpcStatus string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/grpc")
			w.WriteHeader(status)
			_, _ = w.Write(grpcMessage)
			w.Header().Set(http.TrailerPrefix+"Grpc-Status", grpcStatus)
		}
	}
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		want    string // in the error; empty: none
	}{
		"an answer":         {answer(200, "0"), ""},
		"a gRPC failure":    {answer(200, "14"), `grpc-status "14"`},
		"a status":          {answer(502, "0"), "status 502"},
		"no trailers":       {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200) }, `grpc-status ""`},
		"a stream cut off":  {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "was reset"},
		"an answer of data": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(grpcMessage) }, "without trailers"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewUnstartedServer(c.handler)
			server.Config.Protocols = cleartext()
			server.Start()
			defer server.Close()
			err := probeGRPC(server.Listener.Addr().String(), grpcMethod)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}
