package observe

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"causeway/lb/l7/exchange"
)

// tracing makes spans of requests that have ended, and sends them in batches; what is too much for its queue is dropped.
type tracing struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer
}

// closeTime bounds how long the last spans are tried to be sent.
const closeTime = 3 * time.Second

func newTracing(cfg Config) (*tracing, error) {
	to := []otlptracegrpc.Option{otlptracegrpc.WithEndpoint(cfg.OTLP), otlptracegrpc.WithInsecure()}
	if strings.Contains(cfg.OTLP, "://") {
		to = []otlptracegrpc.Option{otlptracegrpc.WithEndpointURL(cfg.OTLP)}
	}
	exporter, err := otlptracegrpc.New(context.Background(), to...) // It connects by and by.
	if err != nil {
		return nil, fmt.Errorf("spans can't be sent to %s: %w", cfg.OTLP, err)
	}
	return tracingTo(sdk.WithBatcher(exporter), cfg), nil
}

func tracingTo(processor sdk.TracerProviderOption, cfg Config) *tracing {
	provider := sdk.NewTracerProvider(processor,
		sdk.WithSampler(sdk.ParentBased(sdk.TraceIDRatioBased(cfg.TracePercent/100))),
		sdk.WithResource(resource.NewSchemaless(attribute.String("service.name", "causeway-l7-proxy"), attribute.String("service.version", cfg.Version))))
	return &tracing{provider, provider.Tracer("causeway/lb/l7")}
}

func (t *tracing) close() {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	t.provider.Shutdown(ctx)
}

// span of a request, as a child of the client's.
func (t *tracing) span(r *exchange.Record) {
	if r.Protocol == exchange.TCP {
		return
	}
	ctx := trace.ContextWithRemoteSpanContext(context.Background(), parent(r.TraceParent))
	name := string(r.Method)
	if r.Protocol == exchange.GRPC {
		name = strings.TrimPrefix(path(r.Path), "/")
	}
	_, span := t.tracer.Start(ctx, name, trace.WithTimestamp(r.Began), trace.WithSpanKind(trace.SpanKindServer))
	if span.IsRecording() {
		span.SetAttributes(attributes(r)...)
		if r.Status >= 500 || r.Status == 0 || r.GRPC > 0 {
			span.SetStatus(otelcodes.Error, r.Local)
		}
	}
	span.End(trace.WithTimestamp(r.Began.Add(r.Took)))
}

// attributes by the names of OpenTelemetry's semantic conventions.
func attributes(r *exchange.Record) []attribute.KeyValue {
	key := r.Client.Port.Key()
	list := []attribute.KeyValue{
		attribute.String("http.request.method", string(r.Method)), attribute.String("url.path", path(r.Path)), attribute.String("server.address", string(r.Host)),
		attribute.Int("http.response.status_code", r.Status), attribute.String("client.address", r.Client.Address.Addr().String()),
		attribute.String("causeway.service", key.Service.String()), attribute.String("causeway.port", key.Port), attribute.Int("http.request.resend_count", r.Retries),
	}
	if r.Protocol == exchange.GRPC {
		service, method, _ := strings.Cut(strings.TrimPrefix(path(r.Path), "/"), "/")
		list = append(list, attribute.String("rpc.system", "grpc"), attribute.String("rpc.service", service), attribute.String("rpc.method", method), attribute.Int("rpc.grpc.status_code", r.GRPC))
	}
	if r.Endpoint != nil {
		list = append(list, attribute.String("network.peer.address", r.Endpoint.Address().String()), attribute.String("causeway.cluster", r.Endpoint.Target().Cluster))
	}
	if r.Local != "" {
		list = append(list, attribute.String("causeway.local", r.Local))
	}
	return list
}

// parent that a traceparent names; one that is not valid is none.
func parent(header []byte) trace.SpanContext {
	id, sampled := traceID(header)
	if id == nil {
		return trace.SpanContext{}
	}
	var cfg trace.SpanContextConfig
	if _, err := hex.Decode(cfg.TraceID[:], id); err != nil {
		return trace.SpanContext{}
	}
	if _, err := hex.Decode(cfg.SpanID[:], header[36:52]); err != nil {
		return trace.SpanContext{}
	}
	cfg.Remote = true
	if sampled {
		cfg.TraceFlags = trace.FlagsSampled
	}
	return trace.NewSpanContext(cfg)
}
