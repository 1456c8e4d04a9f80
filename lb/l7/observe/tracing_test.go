package observe

import (
	"context"
	"net"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"

	"causeway/lb/l7/exchange"
)

type fakeCollector struct {
	collector.UnimplementedTraceServiceServer
	names chan string
}

func (f *fakeCollector) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	for _, of := range r.ResourceSpans {
		for _, scope := range of.ScopeSpans {
			for _, s := range scope.Spans {
				f.names <- s.Name
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func TestSpansReachACollector(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, fake := grpc.NewServer(), &fakeCollector{names: make(chan string, 10)}
	collector.RegisterTraceServiceServer(server, fake)
	go server.Serve(l)
	defer server.Stop()

	o, b := observer(t, Config{OTLP: l.Addr().String(), TracePercent: 100}), table()
	o.did(request(o, b, func(r *exchange.Record) { r.Protocol, r.GRPC, r.Path = exchange.GRPC, 0, []byte("/pkg.Service/Call") }))
	o.Close() // It sends what is left.
	select {
	case name := <-fake.names:
		if name != "pkg.Service/Call" {
			t.Errorf("the span is named %q", name)
		}
	default:
		t.Error("no span came")
	}
}
