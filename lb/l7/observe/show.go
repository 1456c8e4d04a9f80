package observe

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"sync/atomic"

	"causeway/lb"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

// tapQueue bounds the records that one reader has not read yet.
const tapQueue = 1024

// Tap shows one service's requests to one reader.
type Tap struct {
	// Records of requests. What comes while it is full is dropped.
	Records chan state.TapRecord
	service lb.Name
	percent float64
	dropped atomic.Uint64
}

// Dropped counts the records that did not fit into the queue.
func (t *Tap) Dropped() uint64 { return t.dropped.Load() }

// Tap begins to show a service's requests, so many percent of them. Whoever has it ends it by Untap.
func (o *Observer) Tap(service lb.Name, percent float64) *Tap {
	tap := &Tap{Records: make(chan state.TapRecord, tapQueue), service: service, percent: percent}
	o.tapMu.Lock()
	defer o.tapMu.Unlock()
	taps := []*Tap{tap}
	if old := o.taps.Load(); old != nil {
		taps = append(taps, *old...)
	}
	o.taps.Store(&taps)
	return tap
}

// Untap ends a tap.
func (o *Observer) Untap(tap *Tap) {
	o.tapMu.Lock()
	defer o.tapMu.Unlock()
	left := slices.Clone(*o.taps.Load())
	left = slices.DeleteFunc(left, func(t *Tap) bool { return t == tap })
	if len(left) == 0 {
		o.taps.Store(nil)
	} else {
		o.taps.Store(&left)
	}
}

func show(taps []*Tap, r *exchange.Record) {
	for _, t := range taps {
		if t.service != r.Client.Port.Key().Service || t.percent < 100 && rand.Float64()*100 >= t.percent {
			continue
		}
		select {
		case t.Records <- record(r):
		default:
			t.dropped.Add(1)
		}
	}
}

// record is what is shown of a request. Headers are not, nor what is behind the path's "?": they may hold secrets.
func record(r *exchange.Record) state.TapRecord {
	key := r.Client.Port.Key()
	t := state.TapRecord{
		Time: r.Began, Service: key.Service.String() + ":" + key.Port, Protocol: r.Protocol.String(),
		Client: r.Client.Pod.Endpoint, Method: string(r.Method), Host: string(r.Host), Path: path(r.Path), Status: r.Status, Local: r.Local,
		Retries: r.Retries, In: r.In, Out: r.Out, Took: float64(r.Took.Nanoseconds()) / 1e6,
	}
	if t.Client == "" {
		t.Client = r.Client.Address.String()
	}
	if r.GRPC >= 0 {
		t.GRPC = new(r.GRPC)
	}
	if r.Endpoint != nil {
		t.Backend, t.Cluster = r.Endpoint.Address().String(), r.Endpoint.Target().Cluster
	}
	trace, _ := traceID(r.TraceParent)
	t.Trace = string(trace)
	return t
}

func path(p []byte) string {
	p, _, _ = bytes.Cut(p, []byte("?"))
	return string(p)
}

func (o *Observer) log(r *exchange.Record) {
	t := record(r)
	attrs := []any{"service", t.Service, "protocol", t.Protocol, "client", t.Client, "method", t.Method, "host", t.Host, "path", t.Path, "status", t.Status}
	if t.GRPC != nil {
		attrs = append(attrs, "grpc", *t.GRPC)
	}
	attrs = append(attrs, "local", t.Local, "backend", t.Backend, "cluster", t.Cluster, "retries", t.Retries, "bytesIn", t.In, "bytesOut", t.Out, "tookMs", t.Took, "trace", t.Trace)
	o.cfg.Log.Info("request", attrs...)
}

// traceID of a traceparent, and whether it is sampled (W3C Trace Context, 3.2: VERSION-TRACE-PARENT-FLAGS). Empty, if it is none.
func traceID(parent []byte) (trace []byte, sampled bool) {
	if len(parent) < 55 || parent[2] != '-' || parent[35] != '-' || parent[52] != '-' {
		return nil, false
	}
	for _, c := range parent[3:35] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return nil, false
		}
	}
	flags := parent[54]
	odd := flags&1 == 1
	if flags >= 'a' {
		odd = !odd // 'b', 'd' and 'f' are even as characters.
	}
	return parent[3:35], odd
}
