package observe

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"causeway/lb"
	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

const sampledParent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

var key = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "80", Protocol: lb.TCP, Family: lb.IPv4}

func table() *balance.Table {
	t := balance.NewTable()
	t.Apply([]state.Update{
		{Reset: true}, {Route: &lb.Route{Port: key, Options: lb.DefaultL7Options()}},
		{Target: &lb.Target{TargetKey: lb.TargetKey{Port: key, Address: netip.MustParseAddr("10.0.0.1"), Number: 80}, Cluster: "east"}}, {Synced: true},
	})
	return t
}

func observer(t *testing.T, cfg Config) *Observer {
	t.Helper()
	o, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

// request is one that has ended.
func request(o *Observer, b *balance.Table, change func(*exchange.Record)) *exchange.Record {
	port := b.Ports()[0]
	client := &exchange.Client{Port: port, Address: netip.MustParseAddrPort("10.1.1.1:999"), Observed: o.Port(port)}
	r := &exchange.Record{Protocol: exchange.HTTP1, Client: client, Endpoint: port.Endpoints()[0], Method: []byte("GET"), Path: []byte("/a?secret=1"), Host: []byte("web"),
		Status: 200, GRPC: -1, Began: time.Now(), Took: 3 * time.Millisecond, In: 1, Out: 2}
	if change != nil {
		change(r)
	}
	return r
}

func (o *Observer) did(r *exchange.Record) {
	o.Begin(r.Client, r.Protocol)
	o.End(r)
}

func metrics(o *Observer) string {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(o)
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Accept", "application/openmetrics-text")
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}).ServeHTTP(w, r)
	return w.Body.String()
}

func TestMetrics(t *testing.T) {
	o, b := observer(t, Config{}), table()
	o.did(request(o, b, func(r *exchange.Record) { r.TraceParent, r.Retries = []byte(sampledParent), 1 }))
	o.did(request(o, b, func(r *exchange.Record) { r.Protocol, r.GRPC = exchange.GRPC, 14 }))
	o.did(request(o, b, func(r *exchange.Record) { r.Endpoint, r.Status, r.Local = nil, 503, "no backend" }))
	o.did(request(o, b, func(r *exchange.Record) { r.Protocol = exchange.TCP }))
	text := metrics(o)
	for _, want := range []string{
		`causeway_l7_requests_total{cluster="east",code="200",port="80",protocol="http/1.1",service="shop/web"} 1.0`,
		`causeway_l7_requests_total{cluster="east",code="grpc:14",port="80",protocol="grpc",service="shop/web"} 1.0`,
		`causeway_l7_requests_total{cluster="",code="503",port="80",protocol="http/1.1",service="shop/web"} 1.0`,
		`causeway_l7_in_flight{port="80",service="shop/web"} 0.0`,
		`causeway_l7_retries_total{cluster="east",port="80",service="shop/web"} 1.0`,
		`causeway_l7_tcp_connections_total{cluster="east",port="80",service="shop/web"} 1.0`,
		`causeway_l7_local_answers_total{port="80",reason="no backend",service="shop/web"} 1.0`,
		`le="0.004096"} 2 # {trace_id="4bf92f3577b34da6a3ce929d0e0e4736"} 0.003`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("there is no %s in\n%s", want, text)
		}
	}
	b.Apply([]state.Update{{RouteGone: &key}})
	if text := metrics(o); strings.Contains(text, "shop/web") {
		t.Errorf("a port that is gone is still shown:\n%s", text)
	}
}

func TestLabelsAreBounded(t *testing.T) {
	o, b := observer(t, Config{}), table()
	for status := 100; status < 2000; status++ {
		o.did(request(o, b, func(r *exchange.Record) { r.Status, r.Local = status, fmt.Sprint("reason ", status) }))
	}
	text := metrics(o)
	if n := strings.Count(text, "causeway_l7_requests_total{"); n != maxCodes+1 {
		t.Errorf("there are %d codes", n)
	}
	if n := strings.Count(text, "causeway_l7_local_answers_total{"); n != maxReasons+1 {
		t.Errorf("there are %d reasons", n)
	}
	if s := o.Stats(b.Ports()[0]); s.Requests != 1900 {
		t.Errorf("%d requests are counted", s.Requests)
	}
}

func TestQuantiles(t *testing.T) {
	o, b := observer(t, Config{}), table()
	for i := range 1000 {
		o.did(request(o, b, func(r *exchange.Record) { r.Took = time.Duration(i+1) * time.Millisecond }))
	}
	s := o.Stats(b.Ports()[0])
	if s.P50MS < 500 || s.P50MS > 600 || s.P99MS < 990 || s.P99MS > 1190 || s.Sample != 1000 {
		t.Errorf("p50 %v, p99 %v of %d", s.P50MS, s.P99MS, s.Sample)
	}
	for took := time.Microsecond; took < time.Hour; took = took*5/4 + time.Microsecond {
		at, us := bucket(took), float64(took/time.Microsecond)
		if at < buckets-1 && (us >= bound(at) || at > 0 && us < bound(at-1)) {
			t.Fatalf("%v is in the bucket up to %v µs", took, bound(at))
		}
	}
}

func TestAccessLog(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&out, nil))
	none, half, b := observer(t, Config{Log: log}), observer(t, Config{Log: log, AccessLog: 50}), table()
	none.did(request(none, b, nil))
	if out.Len() > 0 {
		t.Errorf("without a percentage there is %s", out.String())
	}
	for range 1000 {
		half.did(request(half, b, nil))
	}
	if n := strings.Count(out.String(), "\n"); n < 400 || n > 600 {
		t.Errorf("%d of 1000 requests are logged at 50 %%", n)
	}
	if s := out.String(); !strings.Contains(s, `"path":"/a"`) || strings.Contains(s, "secret") {
		t.Errorf("the path is not without its query: %.300s", s)
	}
}

func TestTapDropsWhatIsNotRead(t *testing.T) {
	o, b := observer(t, Config{}), table()
	tap, other := o.Tap(key.Service, 100), o.Tap(lb.Name{Name: "x"}, 100)
	for range tapQueue + 10 {
		o.did(request(o, b, nil))
	}
	if tap.Dropped() != 10 || len(tap.Records) != tapQueue || len(other.Records) != 0 {
		t.Errorf("%d dropped, %d and %d there", tap.Dropped(), len(tap.Records), len(other.Records))
	}
	o.Untap(tap)
	o.Untap(other)
	if o.taps.Load() != nil {
		t.Error("taps are left")
	}
}

func TestSpans(t *testing.T) {
	o, b := observer(t, Config{}), table()
	spans := tracetest.NewInMemoryExporter()
	o.tracing = tracingTo(sdk.WithSyncer(spans), Config{})
	o.did(request(o, b, nil)) // Of those without a parent 0 % are traced.
	o.did(request(o, b, func(r *exchange.Record) { r.TraceParent = []byte(sampledParent) }))
	list := spans.GetSpans()
	if len(list) != 1 {
		t.Fatalf("there are %d spans", len(list))
	}
	s := list[0]
	if s.Parent.SpanID().String() != "00f067aa0ba902b7" || s.SpanContext.TraceID().String() != "4bf92f3577b34da6a3ce929d0e0e4736" || s.EndTime.Sub(s.StartTime) != 3*time.Millisecond {
		t.Errorf("the span is %+v", s)
	}
	if text := fmt.Sprint(s.Attributes); strings.Contains(text, "secret") || !strings.Contains(text, "/a") {
		t.Errorf("attributes: %s", text)
	}
}

func TestTraceID(t *testing.T) {
	for parent, want := range map[string]bool{
		sampledParent:                  true,
		sampledParent[:53] + "00":      false,
		sampledParent[:53] + "0b":      true,
		sampledParent[:53] + "0a":      false,
		"":                             false,
		strings.ToUpper(sampledParent): false,
		strings.Repeat("-", 55):        false,
		strings.Replace(sampledParent, "4b", "\"\n", 1): false,
	} {
		if _, sampled := traceID([]byte(parent)); sampled != want {
			t.Errorf("%q is sampled: %v", parent, sampled)
		}
	}
}

// TestHotPath: a request that nobody looks at costs no allocation.
func TestHotPath(t *testing.T) {
	o, b := observer(t, Config{}), table()
	r := request(o, b, nil)
	if n := testing.AllocsPerRun(1000, func() { o.did(r) }); n > 0 {
		t.Errorf("a request allocates %v times", n)
	}
}

func BenchmarkRequest(b *testing.B) {
	o, err := New(Config{})
	if err != nil {
		b.Fatal(err)
	}
	r := request(o, table(), nil)
	for b.Loop() {
		o.did(r)
	}
}
