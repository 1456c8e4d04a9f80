package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

type options struct {
	rounds, conns, idle int
	length              time.Duration
	program, command    string
}

// load is one kind of request.
type load struct {
	protocol, title, role, path string

	address func(proxy) string               // empty if the proxy doesn't speak it
	probe   func(address, path string) error // makes one request
	// maxRatio of our processor time for a request to that of the better of haproxy and nginx; 0: any.
	maxRatio float64
}

func byHTTP1(p proxy) string { return p.http1 }
func byGRPC(p proxy) string  { return p.grpc }

func bench(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "causeway-l7bench.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	loads := []load{
		{"HTTP/1.1", fmt.Sprintf("13 bytes, %d connections", o.conns), "http1-client", "/small", byHTTP1, probeHTTP1, 1.3},
		{"HTTP/1.1", fmt.Sprintf("64 KiB, %d connections", o.conns), "http1-client", "/large", byHTTP1, probeHTTP1, 0},
		{"HTTP/2", fmt.Sprintf("unary calls of gRPC, %d connections with %d streams each", grpcConns, grpcStreams), "grpc-client", grpcMethod, byGRPC, probeGRPC, 1.5},
	}
	missed, err := measureLoads(ctx, dir, o, loads)
	if err == nil && o.idle > 0 {
		err = measureIdle(ctx, dir, o)
	}
	return errors.Join(err, missed)
}

// measureLoads runs each load through all proxies. missed says which of our ratios are too high.
func measureLoads(ctx context.Context, dir string, o options, loads []load) (missed, err error) {
	proxies, stop, err := start(ctx, dir, o)
	defer stop()
	if err != nil {
		return nil, err
	}
	for _, l := range loads {
		able, err := speaking(l, proxies)
		if err != nil {
			return missed, err
		}
		fmt.Printf("%s, %s\n%6s %-10s %9s %8s %8s %9s\n", l.protocol, l.title, "round", "proxy", "req/s", "p50 µs", "p99 µs", "CPU µs")
		all := map[string][]sample{}
		for round := range o.rounds {
			for i := range able {
				if ctx.Err() != nil {
					return missed, context.Cause(ctx)
				}
				p := able[(i+round)%len(able)] // who is first changes
				s, err := measure(ctx, l, p, o)
				if err != nil {
					return missed, fmt.Errorf("%s: %w", p.name, err)
				}
				all[p.name] = append(all[p.name], s)
				s.print(fmt.Sprint(round+1), p.name)
			}
		}
		for _, p := range able {
			median(all[p.name]).print("median", p.name)
		}
		missed = errors.Join(missed, compare(l, able, all))
	}
	return missed, nil
}

// compare prints each proxy's processor time beside the better of haproxy and nginx. It fails if ours is too much.
func compare(l load, proxies []proxy, all map[string][]sample) (missed error) {
	best := min(median(all["haproxy"]).CPU, median(all["nginx"]).CPU)
	for _, p := range proxies {
		ratio := median(all[p.name]).CPU / best
		fmt.Printf("%s takes %.2f of the processor time of the better of haproxy and nginx\n", p.name, ratio)
		if p.name == "ours" && l.maxRatio > 0 && ratio > l.maxRatio {
			missed = fmt.Errorf("%s, %s: ours takes %.2f of the processor time of the better one, at most %.1f is wanted", l.protocol, l.title, ratio, l.maxRatio)
		}
	}
	fmt.Println()
	return missed
}

// sample is one measurement; times are in microseconds.
type sample struct {
	Rate, P50, P99, CPU float64
}

func (s sample) print(round, name string) {
	fmt.Printf("%6s %-10s %9.0f %8.0f %8.0f %9.1f\n", round, name, s.Rate, s.P50, s.P99, s.CPU)
}

func median(all []sample) sample {
	of := func(field func(sample) float64) float64 {
		if len(all) == 0 {
			return 0
		}
		v := make([]float64, len(all))
		for i, s := range all {
			v[i] = field(s)
		}
		slices.Sort(v)
		return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
	}
	return sample{
		of(func(s sample) float64 { return s.Rate }), of(func(s sample) float64 { return s.P50 }),
		of(func(s sample) float64 { return s.P99 }), of(func(s sample) float64 { return s.CPU }),
	}
}
