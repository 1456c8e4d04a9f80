package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// spareFiles are those that a process needs besides its clients' connections: to backends, logs, and the like.
const spareFiles = 500

// measureIdle prints the memory of each proxy, new, and with many connections that have made one request each.
func measureIdle(ctx context.Context, dir string, o options) error {
	n, err := openable(o.idle)
	if err != nil {
		return err
	}
	proxies, stop, err := start(ctx, dir, o)
	defer stop()
	if err != nil {
		return err
	}
	fmt.Printf("Memory (RSS) with %d idle connections that have made one request of HTTP/1.1 each\n", n)
	fmt.Printf("%-10s %8s %9s %17s\n", "proxy", "new MiB", "idle MiB", "KiB a connection")
	for _, p := range proxies {
		before, err := rss(p.pid)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		after, err := withIdle(ctx, p, n)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Printf("%-10s %8.1f %9.1f %17.1f\n", p.name, before/1024, after/1024, (after-before)/float64(n))
	}
	return nil
}

// openable raises the limit of open files, which children inherit, and returns how many of want connections it allows.
func openable(want int) (int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("reading the limit of open files: %w", err)
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("raising the limit of open files to %d: %w", limit.Max, err)
	}
	if limit.Max >= uint64(want)+spareFiles {
		return want, nil
	}
	if limit.Max <= spareFiles {
		return 0, fmt.Errorf("a process may have only %d files open, too few to look at memory: raise it (ulimit -Hn %d), or give -idle 0", limit.Max, want+spareFiles)
	}
	got := int(limit.Max) - spareFiles
	fmt.Printf("A process may have only %d files open: %d idle connections instead of %d (ulimit -Hn %d allows them)\n", limit.Max, got, want, want+spareFiles)
	return got, nil
}

// withIdle returns the memory of a proxy that has n idle connections, in KiB.
func withIdle(ctx context.Context, p proxy, n int) (kib float64, err error) {
	c, err := child(ctx, "-role", "idle-client", "-target", p.http1, "-idle", strconv.Itoa(n))
	if err != nil {
		return 0, err
	}
	release, err := c.StdinPipe()
	if err != nil {
		return 0, err
	}
	ready, err := c.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := c.Start(); err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, release.Close(), c.Wait())
	}()
	if _, err := bufio.NewReader(ready).ReadString('\n'); err != nil {
		return 0, fmt.Errorf("its idle connections are not all there: %w", err)
	}
	return rss(p.pid)
}

// rss is the memory of a process that is resident, in KiB.
func rss(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	number, _, _ := strings.Cut(strings.TrimSpace(after), " ")
	return strconv.ParseFloat(number, 64)
}

// idleClient opens n connections, asks once on each, says that it is ready, and keeps them until its standard input ends.
func idleClient(target string, n int) error {
	request := http1Request("/small")
	conns := make(chan net.Conn, n)
	errs := make(chan error, n)
	var todo sync.WaitGroup
	slots := make(chan *bufio.Reader, 16) // so many at a time
	for range cap(slots) {
		slots <- bufio.NewReader(nil)
	}
	for range n {
		r := <-slots
		todo.Go(func() {
			defer func() { slots <- r }()
			c, err := net.Dial("tcp", target)
			if err != nil {
				errs <- err
				return
			}
			conns <- c
			r.Reset(c)
			if err := ask(c, r, request); err != nil {
				errs <- err
			}
		})
	}
	todo.Wait()
	defer func() {
		close(conns)
		for c := range conns {
			c.Close()
		}
	}()
	select {
	case err := <-errs:
		return fmt.Errorf("opening %d connections to %s: %w", n, target, err)
	default:
	}
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
