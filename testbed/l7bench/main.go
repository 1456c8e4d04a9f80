// L7bench measures HTTP proxies beside each other on loopback: requests a second, latency, and processor time a request, for small answers and
// for 64 KiB. Each proxy has one worker and keeps its connections; the rounds are interleaved, so that what else the machine does meets all.
//
//	go run ./testbed/l7bench -rounds 5 -time 3s
//	go run ./testbed/l7bench -proxy 'clustermesh proxy --standalone state.json'
//
// A command given with -proxy must listen on 127.0.0.1:18083 and balance over the backends 127.0.0.11:18080 and 127.0.0.12:18080, which
// answer /small with 13 bytes and /large with 64 KiB. It runs with GOMAXPROCS=1 on the first processor, as the other proxies do; the client
// and the backends run on the others.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"
)

func main() {
	rounds := flag.Int("rounds", 5, "interleaved rounds")
	length := flag.Duration("time", 2*time.Second, "of one measurement")
	conns := flag.Int("connections", 64, "of the client, each with one request at a time")
	command := flag.String("proxy", "", "command of one more proxy, which listens on 127.0.0.1:18083")
	role := flag.String("role", "", "of a child process: client, backend or net-http")
	target := flag.String("target", "", "address of the client's proxy")
	path := flag.String("path", "/small", "that the client asks for")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var err error
	switch *role {
	case "backend":
		err = backend()
	case "net-http":
		err = netHTTP()
	case "client":
		err = client(*target, *path, *conns, *length)
	case "":
		err = bench(ctx, *command, *rounds, *conns, *length)
	default:
		err = fmt.Errorf("-role %s is none of client, backend and net-http", *role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// maxRatio of our processor time for a small request to that of the better of haproxy and nginx.
const maxRatio = 1.3

func bench(ctx context.Context, command string, rounds, conns int, length time.Duration) error {
	dir, err := os.MkdirTemp("", "causeway-l7bench.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	proxies, stop, err := start(ctx, dir, command)
	defer stop()
	if err != nil {
		return err
	}
	for _, path := range []string{"/small", "/large"} {
		fmt.Printf("HTTP/1.1 %s, %d connections\n%5s  %-10s %9s %8s %8s %9s\n", path, conns, "round", "proxy", "req/s", "p50 µs", "p99 µs", "CPU µs")
		all := map[string][]sample{}
		for round := range rounds {
			for i := range proxies {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				p := proxies[(i+round)%len(proxies)] // who is first changes
				s, err := measure(ctx, p, path, conns, length)
				if err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
				all[p.name] = append(all[p.name], s)
				s.print(fmt.Sprint(round+1), p.name)
			}
		}
		for _, p := range proxies {
			median(all[p.name]).print("median", p.name)
		}
		best := min(median(all["haproxy"]).CPU, median(all["nginx"]).CPU)
		for _, p := range proxies {
			fmt.Printf("%s takes %.2f of the better of haproxy and nginx\n", p.name, median(all[p.name]).CPU/best)
		}
		if ours := all["ours"]; path == "/small" && len(ours) > 0 && median(ours).CPU/best > maxRatio {
			return errors.New("more processor time a request than 1.3 of the better one")
		}
	}
	return nil
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
