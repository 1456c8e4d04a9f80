package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// backend answers whatever is asked with fixed bytes: it costs as little as can be, so that the proxies are what is measured.
func backend() error {
	answer := func(size int) []byte {
		return append(fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", size), bytes.Repeat([]byte("x"), size)...)
	}
	small, large := answer(13), answer(64<<10)
	failed := make(chan error, len(backends))
	for _, address := range backends {
		ln, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					failed <- err
					return
				}
				go func() {
					defer c.Close()
					r := bufio.NewReader(c)
					for {
						out, first := small, true
						for {
							line, err := r.ReadSlice('\n')
							if err != nil {
								return
							}
							if first && bytes.Contains(line, []byte("/large")) {
								out = large
							}
							if first = false; len(line) <= 2 {
								break
							}
						}
						if _, err := c.Write(out); err != nil {
							return
						}
					}
				}()
			}
		}()
	}
	return <-failed
}

// result is what a client process prints. Times are in microseconds.
type result struct {
	Requests int
	P50, P99 float64
}

// client asks as fast as answers come, one request at a time on each of conns connections.
func client(target, path string, conns int, length time.Duration) error {
	request := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n", path)
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	var wg sync.WaitGroup
	until := time.Now().Add(length)
	for range conns {
		wg.Go(func() {
			mine, err := ask(target, request, until)
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	if failed != nil || len(took) == 0 {
		return fmt.Errorf("asking %s%s: %w", target, path, failed)
	}
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Nanoseconds()) / 1000 }
	return json.NewEncoder(os.Stdout).Encode(result{len(took), at(0.5), at(0.99)})
}

func ask(target string, request []byte, until time.Time) (took []time.Duration, err error) {
	c, err := net.Dial("tcp", target)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	r := bufio.NewReaderSize(c, 32<<10)
	for sent := time.Now(); sent.Before(until); sent = time.Now() {
		if _, err := c.Write(request); err != nil {
			return took, err
		}
		size := 0
		for first := true; ; first = false {
			line, err := r.ReadString('\n')
			if err != nil {
				return took, err
			}
			if first && !strings.HasPrefix(line, "HTTP/1.1 200") {
				return took, fmt.Errorf("answered %q", line)
			}
			if len(line) <= 2 {
				break
			}
			if k, v, _ := strings.Cut(line, ":"); strings.EqualFold(k, "Content-Length") {
				if size, err = strconv.Atoi(strings.TrimSpace(v)); err != nil {
					return took, err
				}
			}
		}
		if _, err := io.CopyN(io.Discard, r, int64(size)); err != nil {
			return took, err
		}
		took = append(took, time.Since(sent))
	}
	return took, nil
}

// measure runs a client against a proxy.
func measure(ctx context.Context, p proxy, path string, conns int, length time.Duration) (sample, error) {
	self, err := os.Executable()
	if err != nil {
		return sample{}, err
	}
	before, err := cpu(p.pid)
	if err != nil {
		return sample{}, err
	}
	c := exec.CommandContext(ctx, "taskset", "-c", "1", self, "-role", "client", "-target", p.address, "-path", path,
		"-connections", strconv.Itoa(conns), "-time", length.String())
	c.Stderr = os.Stderr
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
	return sample{float64(r.Requests) / length.Seconds(), r.P50, r.P99, float64(after-before) / 1000 / float64(r.Requests)}, nil
}
