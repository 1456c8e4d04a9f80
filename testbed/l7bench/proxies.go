package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// proxy is one that runs; an address is empty if it doesn't speak that.
type proxy struct {
	name, http1, grpc string
	pid               int
}

// start runs the backends and the proxies; stop ends and reaps them, and is to be called after an error too.
func start(ctx context.Context, dir string, o options) (proxies []proxy, stop func(), err error) {
	var running []*exec.Cmd
	stop = func() {
		for _, c := range running {
			_ = c.Process.Kill() // it may have ended by itself
			_ = c.Wait()
		}
	}
	run := func(cpu string, args ...string) (int, error) {
		c := exec.CommandContext(ctx, "taskset", append([]string{"-c", cpu}, args...)...)
		c.Env = append(os.Environ(), "GOMAXPROCS=1")
		c.Stderr = os.Stderr
		if err := c.Start(); err != nil {
			return 0, err
		}
		running = append(running, c)
		return c.Process.Pid, nil // taskset becomes the command
	}
	for _, tool := range []string{"haproxy", "nginx"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, stop, fmt.Errorf("%s is missing: apt-get install --no-install-recommends haproxy nginx-light", tool)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, stop, err
	}
	haproxy, nginx, ours := filepath.Join(dir, "haproxy.cfg"), filepath.Join(dir, "nginx.conf"), filepath.Join(dir, "ours.ndjson")
	err = errors.Join(os.WriteFile(haproxy, []byte(haproxyConf), 0o600),
		os.WriteFile(nginx, []byte(strings.ReplaceAll(nginxConf, "DIR", dir)), 0o600), os.WriteFile(ours, []byte(oursConf()), 0o600))
	if err != nil {
		return nil, stop, err
	}
	if said, err := exec.CommandContext(ctx, "haproxy", "-c", "-f", haproxy).CombinedOutput(); err != nil { // it is started with -q, and would say nothing
		return nil, stop, fmt.Errorf("haproxy -c: %w\n%s", err, said)
	}
	if _, err := run("1", self, "-role", "backend"); err != nil {
		return nil, stop, err
	}
	type wanted struct {
		proxy
		args []string
	}
	all := []wanted{
		{proxy{"haproxy", haproxyHTTP1, haproxyGRPC, 0}, []string{"haproxy", "-q", "-db", "-f", haproxy}},
		{proxy{"nginx", nginxHTTP1, nginxGRPC, 0}, []string{"nginx", "-c", nginx}},
		{proxy{"net/http", netHTTPHTTP1, "", 0}, []string{self, "-role", "net-http"}},
	}
	if o.program != "" {
		all = append(all, wanted{proxy{"ours", oursHTTP1, oursGRPC, 0}, []string{o.program, "proxy", "--standalone", ours, "--log-level", "warn"}})
	}
	if o.command != "" {
		all = append(all, wanted{proxy{"other", otherHTTP1, "", 0}, strings.Fields(o.command)})
	}
	ends := []string{http1Backends[1], grpcBackends[1]}
	for _, w := range all {
		if w.pid, err = run("0", w.args...); err != nil {
			return nil, stop, fmt.Errorf("%s: %w", w.name, err)
		}
		proxies, ends = append(proxies, w.proxy), append(ends, w.http1)
		if w.grpc != "" {
			ends = append(ends, w.grpc)
		}
	}
	for _, address := range ends {
		if err := listening(ctx, address); err != nil {
			return nil, stop, err
		}
	}
	return proxies, stop, nil
}

// listening waits until address takes connections.
func listening(ctx context.Context, address string) error {
	for until := time.Now().Add(10 * time.Second); ; {
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(until) || ctx.Err() != nil {
			return fmt.Errorf("nothing listens at %s, or something else has its port: %w", address, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// netHTTP is a reverse proxy of the standard library, for scale.
func netHTTP() error {
	var next atomic.Uint64
	return http.ListenAndServe(netHTTPHTTP1, &httputil.ReverseProxy{
		Transport: &http.Transport{MaxIdleConnsPerHost: 128, DisableCompression: true},
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: http1Backends[next.Add(1)%2]})
		},
	})
}
