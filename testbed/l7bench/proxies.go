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
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

var backends = []string{"127.0.0.11:18080", "127.0.0.12:18080"}

type proxy struct {
	name, address string
	pid           int
}

const haproxyConf = `global
  # It wants two descriptors for each connection that it may have, which may be above the hard limit here.
  no strict-limits
  nbthread 1
  maxconn 20000
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend f
  bind 127.0.0.1:18081
  default_backend b
backend b
  balance roundrobin
  server a 127.0.0.11:18080
  server b 127.0.0.12:18080
`

const nginxConf = `daemon off;
master_process off;
worker_processes 1;
pid DIR/nginx.pid;
error_log DIR/nginx.log;
events { worker_connections 20000; }
http {
  access_log off;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/temp;
  keepalive_requests 1000000000;
  upstream b { server 127.0.0.11:18080; server 127.0.0.12:18080; keepalive 128; keepalive_requests 1000000000; }
  server {
    listen 127.0.0.1:18082;
    location / { proxy_pass http://b; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
`

// start runs the backends and the proxies; stop ends and reaps them, and is to be called after an error too.
func start(ctx context.Context, dir, command string) (proxies []proxy, stop func(), err error) {
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
	haproxy, nginx := filepath.Join(dir, "haproxy.cfg"), filepath.Join(dir, "nginx.conf")
	err = errors.Join(os.WriteFile(haproxy, []byte(haproxyConf), 0o600),
		os.WriteFile(nginx, []byte(strings.ReplaceAll(nginxConf, "DIR", dir)), 0o600))
	if err != nil {
		return nil, stop, err
	}
	if _, err := run("1", self, "-role", "backend"); err != nil {
		return nil, stop, err
	}
	type wanted struct {
		name, address string
		args          []string
	}
	all := []wanted{
		{"haproxy", "127.0.0.1:18081", []string{"haproxy", "-db", "-f", haproxy}},
		{"nginx", "127.0.0.1:18082", []string{"nginx", "-c", nginx}},
		{"net/http", "127.0.0.1:18084", []string{self, "-role", "net-http"}},
	}
	if command != "" {
		all = append(all, wanted{"ours", "127.0.0.1:18083", strings.Fields(command)})
	}
	for _, w := range all {
		pid, err := run("0", w.args...)
		if err != nil {
			return nil, stop, err
		}
		proxies = append(proxies, proxy{w.name, w.address, pid})
	}
	for _, p := range append([]proxy{{name: "backend", address: backends[1]}}, proxies...) {
		if err := listening(ctx, p.address); err != nil {
			return nil, stop, fmt.Errorf("%s: %w", p.name, err)
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
			return fmt.Errorf("doesn't listen: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
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

// netHTTP is a reverse proxy of the standard library, for scale.
func netHTTP() error {
	var next atomic.Uint64
	return http.ListenAndServe("127.0.0.1:18084", &httputil.ReverseProxy{
		Transport: &http.Transport{MaxIdleConnsPerHost: 128, DisableCompression: true},
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: backends[next.Add(1)%2]})
		},
	})
}
