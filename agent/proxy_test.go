package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"causeway/lb"
	"causeway/lb/l7"
	"causeway/lb/l7/state"
)

// Variables of the environment that have the test's binary be a proxy.
const (
	beProxy      = "CAUSEWAY_TEST_PROXY"         // its version
	beProxyBlock = "CAUSEWAY_TEST_PROXY_BLOCKED" // while there is this file, it fails to start
)

// runTestProxy is the real proxy with one service, behind whatever it listens on. Its backend says the process's number.
func runTestProxy(version string) error {
	if _, err := os.Stat(os.Getenv(beProxyBlock)); err == nil {
		return errors.New("there is no room")
	}
	flags := flag.NewFlagSet("proxy", flag.ContinueOnError)
	flags.String("agent", "", "")
	admin, n := flags.String("admin", "", ""), flags.Int("listeners", 0, "")
	if err := flags.Parse(os.Args[1:]); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := backend.Accept()
			if err != nil {
				return
			}
			go func() {
				fmt.Fprintln(c, os.Getpid())
				io.Copy(io.Discard, c)
				c.Close()
			}()
		}
	}()
	port := lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "80", Protocol: lb.TCP, Family: lb.IPv4}
	at := netip.MustParseAddrPort(backend.Addr().String())
	updates := []state.Update{
		{Reset: true}, {Self: &state.Self{Cluster: "east", Node: "node1"}}, {Route: &lb.Route{Port: port, Number: 80, App: lb.AppTCP, Options: lb.DefaultL7Options()}},
		{Target: &lb.Target{TargetKey: lb.TargetKey{Port: port, Address: at.Addr(), Number: at.Port()}, Cluster: "east"}},
	}
	var listeners []net.Listener
	for fd := range *n {
		l, err := listenerOf(3 + fd)
		if err != nil {
			return err
		}
		a := netip.MustParseAddrPort(l.Addr().String())
		updates = append(updates, state.Update{Frontend: &lb.Frontend{FrontendKey: lb.FrontendKey{Address: a.Addr(), Port: a.Port(), Protocol: lb.TCP}, Target: port, L7: true}})
		listeners = append(listeners, l)
	}
	line, err := json.Marshal(append(updates, state.Update{Synced: true}))
	if err != nil {
		return err
	}
	file := *admin + ".state"
	if err := os.WriteFile(file, line, 0o600); err != nil {
		return err
	}
	return l7.Run(ctx, l7.Config{Listeners: listeners, Admin: *admin, File: file, Version: version})
}

// fakeProxyPath notes what is done to the data path.
type fakeProxyPath struct {
	mu        sync.Mutex
	addresses []string // of the listeners that are set
	sets      int
}

func (f *fakeProxyPath) Set(listeners []*net.TCPListener) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sets++
	f.addresses = nil
	for _, l := range listeners {
		f.addresses = append(f.addresses, l.Addr().String())
	}
	return nil
}

func (f *fakeProxyPath) Clear() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.addresses = nil
	return nil
}

// address that connections are handed to; empty: they are balanced at L4.
func (f *fakeProxyPath) address() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.addresses) == 0 {
		return ""
	}
	return f.addresses[0]
}

// supervised is a supervisor that runs, and can be restarted.
type supervised struct {
	*proxies
	path  *fakeProxyPath
	block string
	stop  func()
}

func supervise(t *testing.T, dir, version string) *supervised {
	t.Helper()
	s := &supervised{path: &fakeProxyPath{}, block: filepath.Join(dir, "blocked")}
	var err error
	s.proxies, err = newProxies(proxyConfig{
		dir: dir, agent: "none", command: []string{os.Args[0]}, version: version, env: []string{beProxy + "=" + version, beProxyBlock + "=" + s.block},
	}, s.path, func() (bool, <-chan struct{}) { return true, nil }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		s.stop()
		for _, n := range s.sockets.list() {
			if pid, err := s.sockets.owner(n); err == nil && pid != 0 && s.isOurs(pid, n) {
				unix.Kill(pid, unix.SIGKILL)
				alive := func() bool { return unix.Kill(pid, 0) == nil }
				eventually(t, "a proxy ends", func() bool { unix.Wait4(pid, nil, unix.WNOHANG, nil); return !alive() })
			}
		}
	})
	return s
}

func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !so(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not so after %s", what, patience)
		}
	}
}

// current waits for a proxy in service that is none of some others.
func (s *supervised) serving(t *testing.T, not ...int) int {
	t.Helper()
	pid := 0
	eventually(t, "a proxy serves", func() bool {
		c := s.snapshot().current
		if c == nil || s.path.address() == "" {
			return false
		}
		pid = c.pid
		for _, n := range not {
			if pid == n {
				return false
			}
		}
		return true
	})
	return pid
}

// connect returns a connection to the proxy, and the number of the process that serves it.
func connect(t *testing.T, to string) (net.Conn, int, error) {
	t.Helper()
	c, err := net.DialTimeout("tcp", to, patience)
	if err != nil {
		return nil, 0, err
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	var pid int
	_, err = fmt.Fscanln(c, &pid)
	return c, pid, err
}

// TestFirstConnectionsWaitForTheProxy: a service's first connections after its annotation are as good as later ones.
func TestFirstConnectionsWaitForTheProxy(t *testing.T) {
	s := supervise(t, t.TempDir(), "v1")
	eventually(t, "connections are handed over", func() bool { return s.path.address() != "" })
	if s.snapshot().current != nil {
		t.Fatal("there is a proxy already: nothing is tested")
	}
	_, pid, err := connect(t, s.path.address())
	if err != nil || pid != s.serving(t) {
		t.Errorf("served by %d, %v", pid, err)
	}
}

func TestKilledProxyIsFollowedByAnother(t *testing.T) {
	s := supervise(t, t.TempDir(), "v1")
	first := s.serving(t)
	at := s.path.address()
	if _, pid, err := connect(t, at); err != nil || pid != first {
		t.Fatalf("served by %d, %v; want %d", pid, err, first)
	}
	began := time.Now()
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// These may come while there is no proxy: they wait for the next one.
	for range 3 {
		if _, pid, err := connect(t, at); err != nil || pid == first {
			t.Errorf("served by %d, %v", pid, err)
		}
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("it took %s until connections were served again", took)
	}
	s.path.mu.Lock()
	defer s.path.mu.Unlock()
	if s.path.sets != 1 {
		t.Errorf("connections were handed over %d times, the listeners are the same", s.path.sets)
	}
}

// waitStopped waits until every thread of a process has stopped.
func waitStopped(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(threads) == 0 {
			t.Fatalf("process %d has no threads: %v", pid, err)
		}
		running := slices.ContainsFunc(threads, func(file string) bool {
			stat, err := os.ReadFile(file)
			return err == nil && !bytes.Contains(stat, []byte(") T "))
		})
		if !running {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not stop", pid)
		}
	}
}

func TestStuckProxyIsKilled(t *testing.T) {
	s := supervise(t, t.TempDir(), "v1")
	first := s.serving(t)
	at := s.path.address()
	if err := unix.Kill(first, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitStopped(t, first)
	if _, pid, err := connect(t, at); err != nil || pid == first {
		t.Errorf("served by %d, %v", pid, err)
	}
	if second := s.serving(t, first); second == first {
		t.Error("the stuck proxy is still in service")
	}
}

func TestProxyThatCannotStart(t *testing.T) {
	s := supervise(t, t.TempDir(), "v1")
	first := s.serving(t)
	at := s.path.address()
	if err := os.WriteFile(s.block, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() {
		_, _, err := connect(t, at)
		waiting <- err
	}()
	eventually(t, "connections are balanced at L4", func() bool { return s.path.address() == "" })
	if err := <-waiting; err == nil {
		t.Error("who waited was served, by nobody")
	}
	eventually(t, "the problem is shown", func() bool { return strings.Contains(strings.Join(s.snapshot().problems, "\n"), "there is no room") })
	if err := os.Remove(s.block); err != nil {
		t.Fatal(err)
	}
	s.serving(t, first)
	if _, _, err := connect(t, s.path.address()); err != nil {
		t.Errorf("with a proxy again: %v", err)
	}
	eventually(t, "no problem is left", func() bool { return len(s.snapshot().problems) == 0 })
}

func TestLivingProxyIsTakenOver(t *testing.T) {
	dir := t.TempDir()
	s := supervise(t, dir, "v1")
	first := s.serving(t)
	at := s.path.address()
	long, _, err := connect(t, at)
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	if _, pid, err := connect(t, at); err != nil || pid != first {
		t.Errorf("without an agent: served by %d, %v", pid, err)
	}
	again := supervise(t, dir, "v1")
	if pid := again.serving(t); pid != first {
		t.Errorf("process %d serves, want %d as before", pid, first)
	}
	if again.path.address() != at {
		t.Errorf("connections are handed to %s, want %s", again.path.address(), at)
	}
	long.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := long.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a long connection ended: %v", err)
	}
	// The listeners that were taken over are as good as new ones.
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, pid, err := connect(t, at); err != nil || pid == first {
		t.Errorf("after its end: served by %d, %v", pid, err)
	}
}

// TestUpgrade has a new agent find a proxy of an older program, and then replaces the proxy by hand, while clients come all the time.
func TestUpgrade(t *testing.T) {
	dir := t.TempDir()
	s := supervise(t, dir, "v1")
	first := s.serving(t)
	at := s.path.address()
	long, _, err := connect(t, at)
	if err != nil {
		t.Fatal(err)
	}
	stop, failed, served := make(chan struct{}), make(chan error, 1), atomic.Int64{}
	go func() {
		defer close(failed)
		for {
			select {
			case <-stop:
				return
			default:
			}
			c, err := net.DialTimeout("tcp", at, patience)
			if err == nil {
				c.SetDeadline(time.Now().Add(patience))
				_, err = c.Read(make([]byte, 1))
				c.Close()
			}
			if err != nil {
				failed <- err
				return
			}
			served.Add(1)
		}
	}()
	s.stop()
	next := supervise(t, dir, "v2")
	second := next.serving(t, first)
	if err := next.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	third := next.snapshot().current.pid
	if third == first || third == second {
		t.Errorf("process %d serves after the upgrade by hand, as before", third)
	}
	if got := len(next.snapshot().retiring); got == 0 {
		t.Error("the first proxy is gone, with a connection that goes on")
	}
	eventually(t, "the second proxy ends", func() bool { return len(next.snapshot().retiring) == 1 })
	before := served.Load()
	eventually(t, "more are served", func() bool { return served.Load() > before+50 || len(failed) > 0 })
	close(stop)
	if err := <-failed; err != nil {
		t.Errorf("a connection failed: %v", err)
	}
	long.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := long.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a long connection ended: %v", err)
	}
	long.Close()
	eventually(t, "the first proxy ends, too", func() bool { return len(next.snapshot().retiring) == 0 })
	if got := next.sockets.list(); len(got) != 1 {
		t.Errorf("sockets that are left: %v", got)
	}
	// A new one that fails changes nothing.
	if err := os.WriteFile(next.block, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := next.Upgrade(t.Context()); err == nil || !strings.Contains(err.Error(), "there is no room") {
		t.Errorf("upgrade to what can't start: %v", err)
	}
	if pid := next.serving(t); pid != third {
		t.Errorf("process %d serves after a failed upgrade, want %d", pid, third)
	}
}
