package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// result is what a client process prints. Times are in microseconds.
type result struct {
	Requests int
	P50, P99 float64
}

// report prints a result for the process that started the client.
func report(took []time.Duration) error {
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Nanoseconds()) / 1000 }
	return json.NewEncoder(os.Stdout).Encode(result{len(took), at(0.5), at(0.99)})
}

// speaking returns the proxies that a load can be sent through. It says so of ours if it is not among them.
func speaking(l load, proxies []proxy) (able []proxy, err error) {
	for _, p := range proxies {
		if l.address(p) == "" {
			continue
		}
		if err := l.probe(l.address(p), l.path); err != nil {
			if p.name != "ours" {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
			fmt.Printf("ours: no %s: %v\n", l.protocol, err)
			continue
		}
		able = append(able, p)
	}
	return able, nil
}

// child is this program in another role, on the processor of clients and backends.
func child(ctx context.Context, args ...string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := exec.CommandContext(ctx, "taskset", append([]string{"-c", "1", self}, args...)...)
	c.Stderr = os.Stderr
	return c, nil
}

// measure runs a client against a proxy.
func measure(ctx context.Context, l load, p proxy, o options) (sample, error) {
	c, err := child(ctx, "-role", l.role, "-target", l.address(p), "-path", l.path, "-connections", strconv.Itoa(o.conns), "-time", o.length.String())
	if err != nil {
		return sample{}, err
	}
	before, err := cpu(p.pid)
	if err != nil {
		return sample{}, err
	}
	out, err := c.Output()
	if err != nil {
		return sample{}, err
	}
	after, err := cpu(p.pid)
	if err != nil {
		return sample{}, err
	}
	var r result
	if err := json.Unmarshal(out, &r); err != nil {
		return sample{}, fmt.Errorf("the client printed %q: %w", out, err)
	}
	return sample{float64(r.Requests) / o.length.Seconds(), r.P50, r.P99, float64(after-before) / 1000 / float64(r.Requests)}, nil
}

// cpu is the processor time of a process, all its threads, in nanoseconds: the first field of each schedstat.
func cpu(pid int) (total int64, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err == nil && len(files) == 0 {
		err = errors.New("the proxy has ended")
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // a thread that has ended
		}
		ns, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseInt(ns, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("reading %s: %w", f, err)
		}
		total += n
	}
	return total, err
}
