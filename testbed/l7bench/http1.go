package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

var small, large = http1Answer(13), http1Answer(64 << 10)

func http1Answer(size int) []byte {
	return append(fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", size), bytes.Repeat([]byte("x"), size)...)
}

// serveHTTP1 answers whatever is asked with fixed bytes: it costs as little as can be, so that the proxies are what is measured.
func serveHTTP1(c net.Conn) error {
	r := bufio.NewReader(c)
	for {
		out, first := small, true
		for {
			line, err := r.ReadSlice('\n')
			if err != nil {
				return err
			}
			if first && bytes.Contains(line, []byte("/large")) {
				out = large
			}
			if first = false; len(line) <= 2 {
				break
			}
		}
		if _, err := c.Write(out); err != nil {
			return err
		}
	}
}

// http1Client asks as fast as answers come, one request at a time on each of conns connections.
func http1Client(target, path string, conns int, length time.Duration) error {
	request, until := http1Request(path), time.Now().Add(length)
	return together(target+path, conns, func() (took []time.Duration, err error) {
		c, err := net.Dial("tcp", target)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		if err := c.SetDeadline(until.Add(patience)); err != nil {
			return nil, err
		}
		r := bufio.NewReaderSize(c, 32<<10)
		for sent := time.Now(); sent.Before(until); sent = time.Now() {
			if err := ask(c, r, request); err != nil {
				return took, err
			}
			took = append(took, time.Since(sent))
		}
		return took, nil
	})
}

// patience is how long a client waits for answers when its time is over.
const patience = 5 * time.Second

// probeHTTP1 makes one request on a connection of its own.
func probeHTTP1(target, path string) error {
	c, err := net.DialTimeout("tcp", target, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	return ask(c, bufio.NewReader(c), http1Request(path))
}

// together runs a client's connections at once, and reports what all their requests took.
func together(what string, conns int, one func() ([]time.Duration, error)) error {
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	var wg sync.WaitGroup
	for range conns {
		wg.Go(func() {
			mine, err := one()
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	if failed == nil && len(took) == 0 {
		failed = fmt.Errorf("no request ended in time: give it more with -time")
	}
	if failed != nil {
		return fmt.Errorf("asking %s: %w", what, failed)
	}
	return report(took)
}

func http1Request(path string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n", path)
}

// ask sends a request and reads its answer, which must be 200.
func ask(w io.Writer, r *bufio.Reader, request []byte) error {
	if _, err := w.Write(request); err != nil {
		return err
	}
	size := 0
	for first := true; ; first = false {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if first && !strings.HasPrefix(line, "HTTP/1.1 200") {
			return fmt.Errorf("answered %q", line)
		}
		if len(line) <= 2 {
			break
		}
		if k, v, _ := strings.Cut(line, ":"); strings.EqualFold(k, "Content-Length") {
			if size, err = strconv.Atoi(strings.TrimSpace(v)); err != nil {
				return err
			}
		}
	}
	_, err := io.CopyN(io.Discard, r, int64(size))
	return err
}
