package testbed

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// serving starts a server of its own and returns its address, and what ends it and returns Serve's error.
func serving(t *testing.T, name string) (string, func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- Serve(ctx, name, "127.0.0.1:0", func(a net.Addr) { ready <- a.String() }) }()
	select {
	case address := <-ready:
		return address, func() error { cancel(); return <-ended }
	case err := <-ended:
		cancel()
		t.Fatal(err)
		return "", nil
	}
}

func TestServeSpeaksHTTP1AndHTTP2(t *testing.T) {
	address, end := serving(t, "east/a")
	defer end()
	for _, major := range []int{1, 2} {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(major == 1)
		protocols.SetUnencryptedHTTP2(major == 2)
		client := &http.Client{Transport: &http.Transport{Protocols: protocols}}
		defer client.CloseIdleConnections()
		resp, err := client.Post("http://"+address+"/upload", "text/plain", strings.NewReader("12345"))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.ProtoMajor != major || resp.Header.Get(ServedByHeader) != "east/a" || string(body) != "5\n" {
			t.Errorf("HTTP/%d answered with HTTP/%d, %v, %q", major, resp.ProtoMajor, resp.Header, body)
		}
	}
}

func TestServeSpeaksGRPCAndFinishesItsStreams(t *testing.T) {
	address, end := serving(t, "east/a")
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var header metadata.MD
	out := new(wrapperspb.StringValue)
	if err := conn.Invoke(ctx, GRPCUnary, wrapperspb.String("hello"), out, grpc.Header(&header)); err != nil || out.Value != "hello" {
		t.Fatalf("the call was answered with %v, %v", out, err)
	}
	if by := header.Get(ServedByHeader); len(by) != 1 || by[0] != "east/a" {
		t.Errorf("answered by %q", by)
	}
	for path, want := range map[string]grpc_health_v1.HealthCheckResponse_ServingStatus{"/sick": grpc_health_v1.HealthCheckResponse_NOT_SERVING} {
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		health, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, new(grpc_health_v1.HealthCheckRequest))
		if err != nil || health.Status != want {
			t.Errorf("after %s: %v, %v; want %v", path, health, err, want)
		}
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, GRPCBidi)
	if err != nil {
		t.Fatal(err)
	}
	say := func(text string) {
		t.Helper()
		out := new(wrapperspb.StringValue)
		if err := stream.SendMsg(wrapperspb.String(text)); err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(out); err != nil || out.Value != text {
			t.Fatalf("%s came back as %v, %v", text, out, err)
		}
	}
	say("before")
	ended := make(chan error, 1)
	go func() { ended <- end() }()
	say("while it ends")
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(out); err != io.EOF {
		t.Errorf("the stream ended with %v", err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the server ended with %v", err)
	}
}

func TestLoadByEveryProtocol(t *testing.T) {
	address, end := serving(t, "east/a")
	defer end()
	for _, protocol := range []string{ProtocolHTTP1, ProtocolHTTP2, ProtocolGRPC} {
		r, err := Load(t.Context(), LoadOptions{URL: "http://" + address + "/", Rate: 1000, Requests: 50, Protocol: protocol, Connections: 2})
		if err != nil || r.Failed > 0 || r.Servers["east/a"] != 50 {
			t.Errorf("%s: %+v, %v", protocol, r, err)
		}
	}
	if _, err := Load(t.Context(), LoadOptions{URL: "http://" + address, Rate: 1, Requests: 1, Protocol: "gopher"}); err == nil {
		t.Error("an unknown protocol was taken")
	}
}
