package l7

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"causeway/lb"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/http2"
	"causeway/lb/l7/state"
)

var webKey = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "80", Protocol: lb.TCP, Family: lb.IPv4}

func addr(t *testing.T, s string) netip.AddrPort {
	t.Helper()
	return netip.MustParseAddrPort(s)
}

// updates have one service behind a frontend.
func updates(frontend netip.AddrPort, app lb.AppProtocol, backends ...netip.AddrPort) []state.Update {
	list := []state.Update{
		{Reset: true}, {Self: &state.Self{Cluster: "east", Node: "n1"}},
		{Route: &lb.Route{Port: webKey, Number: frontend.Port(), App: app, Options: lb.DefaultL7Options()}},
		{Frontend: &lb.Frontend{FrontendKey: lb.FrontendKey{Address: frontend.Addr(), Port: frontend.Port(), Protocol: lb.TCP}, Target: webKey, L7: true}},
	}
	for _, b := range backends {
		list = append(list, state.Update{Target: &lb.Target{TargetKey: lb.TargetKey{Port: webKey, Address: b.Addr(), Number: b.Port()}, Cluster: "east"}})
	}
	return append(list, state.Update{Synced: true})
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// backend serves each connection by f.
func backend(t *testing.T, f func(*net.TCPConn)) netip.AddrPort {
	l := listen(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c.(*net.TCPConn))
			}()
		}
	}()
	return addr(t, l.Addr().String())
}

func echo(c *net.TCPConn) { io.Copy(c, c) }

// stub is an engine that answers what was read, with its name before it, and ends.
func stub(name string) engine {
	return func(_ context.Context, _ *exchange.Env, c *exchange.Client) {
		fmt.Fprintf(c.Conn, "%s:%s", name, c.Read)
		c.Conn.Close()
	}
}

type running struct {
	*proxy
	stop context.CancelFunc
	done chan error
}

func start(t *testing.T, cfg Config) *running {
	t.Helper()
	cfg.defaults()
	p, err := newProxy(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.engines = engines{stub("http1"), stub("http2")}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{p, cancel, make(chan error, 1)}
	go func() { r.done <- p.run(ctx); close(r.done) }()
	t.Cleanup(func() {
		cancel()
		p.cut()
		if err := <-r.done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func stateFile(t *testing.T, list []state.Update) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "state")
	line, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, line, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// serve runs a proxy with one service.
func serve(t *testing.T, app lb.AppProtocol, change func(*Config), backends ...netip.AddrPort) (*running, string) {
	l := listen(t)
	cfg := Config{Listeners: []net.Listener{l}, Limits: exchange.DefaultLimits(), File: stateFile(t, updates(addr(t, l.Addr().String()), app, backends...))}
	if change != nil {
		change(&cfg)
	}
	return start(t, cfg), l.Addr().String()
}

func dial(t *testing.T, to string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", to, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func say(t *testing.T, c *net.TCPConn, what string) string {
	t.Helper()
	if _, err := io.WriteString(c, what); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	all, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(all)
}

func TestWhatAClientSpeaks(t *testing.T) {
	back := backend(t, echo)
	for _, tc := range []struct {
		app        lb.AppProtocol
		says, want string
	}{
		{lb.AppUnknown, "GET / HTTP/1.1\r\n\r\n", "http1:GET / HTTP/1.1\r\n\r\n"},
		{lb.AppUnknown, http2.Preface, "http2:" + http2.Preface},
		{lb.AppUnknown, "SET a b\r\n", "SET a b\r\n"},
		{lb.AppUnknown, "\x16\x03\x01tls", "\x16\x03\x01tls"},
		{lb.AppUnknown, "GE", "GE"},
		{lb.AppTCP, "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"},
		{lb.AppHTTP, "nonsense", "http1:nonsense"},
		{lb.AppHTTP, http2.Preface, "http2:" + http2.Preface},
		{lb.AppHTTP2, "", "http2:"},
	} {
		t.Run(fmt.Sprintf("%s %.12q", tc.app, tc.says), func(t *testing.T) {
			_, at := serve(t, tc.app, nil, back)
			if got := say(t, dial(t, at), tc.says); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	back := backend(t, func(c *net.TCPConn) {
		io.WriteString(c, "220 hello\r\n")
		line, _ := bufio.NewReader(c).ReadString('\n')
		io.WriteString(c, "250 "+line)
	})
	_, at := serve(t, lb.AppUnknown, nil, back)
	c := dial(t, at)
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); line != "220 hello\r\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	io.WriteString(c, "EHLO me\r\n")
	if line, err := r.ReadString('\n'); line != "250 EHLO me\r\n" {
		t.Fatalf("got %q, %v", line, err)
	}
}

func TestLateHTTPIsServedAtL7(t *testing.T) {
	opened, closed := make(chan struct{}), make(chan string, 1)
	back := backend(t, func(c *net.TCPConn) {
		close(opened)
		all, _ := io.ReadAll(c)
		closed <- string(all)
	})
	_, at := serve(t, lb.AppUnknown, nil, back)
	c := dial(t, at)
	<-opened // The proxy has waited, and asks a backend.
	if got, want := say(t, c, "GET / HTTP/1.1\r\n\r\n"), "http1:GET / HTTP/1.1\r\n\r\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := <-closed; got != "" {
		t.Errorf("the backend was told %q", got)
	}
}

func TestUnreachableBackendIsPassedOver(t *testing.T) {
	dead := listen(t)
	deadAt := addr(t, dead.Addr().String())
	dead.Close()
	_, at := serve(t, lb.AppTCP, nil, deadAt, backend(t, echo))
	for range 4 {
		if got := say(t, dial(t, at), "hi"); got != "hi" {
			t.Errorf("got %q", got)
		}
	}
}

func TestUnknownFrontendIsReset(t *testing.T) {
	l := listen(t)
	start(t, Config{Listeners: []net.Listener{l}, File: stateFile(t, updates(addr(t, "127.0.0.1:1"), lb.AppTCP))})
	began := time.Now()
	_, err := dial(t, l.Addr().String()).Read(make([]byte, 1))
	if err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("the connection ended with %v", err)
	}
	if took := time.Since(began); took < frontendWait {
		t.Errorf("it was reset after %v, before its frontend could become known", took)
	}
}

func TestLimitOfConnections(t *testing.T) {
	_, at := serve(t, lb.AppTCP, func(c *Config) { c.Limits.Connections = 1 }, backend(t, echo))
	first := dial(t, at)
	io.WriteString(first, "x")
	io.ReadFull(first, make([]byte, 1))
	second := dial(t, at)
	io.WriteString(second, "y")
	second.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, _ := second.Read(make([]byte, 1)); n != 0 {
		t.Error("a connection over the limit was served")
	}
	first.Close()
	second.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := second.Read(make([]byte, 1)); err != nil {
		t.Errorf("the next connection was not served when there was room: %v", err)
	}
}

func unixClient(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
}

// TestHandOver has a second proxy take the listeners from the first, which drains, while clients come all the time.
func TestHandOver(t *testing.T) {
	back := backend(t, echo)
	adminSocket := filepath.Join(t.TempDir(), "a")
	old, at := serve(t, lb.AppTCP, func(c *Config) { c.Admin = adminSocket }, back)
	<-old.accepted
	long := dial(t, at)
	io.WriteString(long, "x")
	io.ReadFull(long, make([]byte, 1))

	stop, failed, served := make(chan struct{}), make(chan error, 1), atomic.Int64{}
	go func() {
		defer close(failed)
		for {
			select {
			case <-stop:
				return
			default:
			}
			c, err := net.Dial("tcp", at)
			if err == nil {
				c.SetDeadline(time.Now().Add(10 * time.Second))
				io.WriteString(c, "x")
				_, err = io.ReadFull(c, make([]byte, 1))
				c.Close()
			}
			if err != nil {
				failed <- err
				return
			}
			served.Add(1)
		}
	}()

	conn, err := net.Dial("unix", adminSocket+".fds")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	buffer, oob := make([]byte, 16), make([]byte, 256)
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(buffer, oob)
	if err != nil || buffer[0] != 1 {
		t.Fatalf("%d listeners, %v", buffer[0], err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "listener")
	l, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	next := start(t, Config{Listeners: []net.Listener{l}, Limits: exchange.DefaultLimits(), File: stateFile(t, updates(addr(t, at), lb.AppTCP, back))})
	<-next.accepted
	before := served.Load()
	response, err := unixClient(adminSocket).Post("http://proxy/v1/drain", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	old.accepts.Wait()
	for deadline := time.Now().Add(5 * time.Second); served.Load() < before+200 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Errorf("a connection failed while the listeners were handed over: %v", err)
	}
	io.WriteString(long, "y") // What is long goes on, and the old proxy ends with it.
	if _, err := io.ReadFull(long, make([]byte, 1)); err != nil {
		t.Errorf("a long connection was cut: %v", err)
	}
	long.Close()
	select {
	case err := <-old.done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the old proxy does not end")
	}
}

func TestStopCutsWhatDoesNotEnd(t *testing.T) {
	r, at := serve(t, lb.AppTCP, func(c *Config) { c.StopTime = 50 * time.Millisecond }, backend(t, echo))
	c := dial(t, at)
	io.WriteString(c, "x")
	io.ReadFull(c, make([]byte, 1))
	r.stop()
	if err := <-r.done; err != nil {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	}
}

func TestStateFromTheAgent(t *testing.T) {
	first, second := backend(t, func(c *net.TCPConn) { io.WriteString(c, "first") }), backend(t, func(c *net.TCPConn) { io.WriteString(c, "second") })
	l := listen(t)
	at := addr(t, l.Addr().String())
	var calls atomic.Int64
	cut, again := make(chan struct{}), make(chan struct{})
	socket := filepath.Join(t.TempDir(), "agent")
	agentListener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	agent := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		call := calls.Add(1)
		if knows := r.URL.Query().Has(state.Knows); knows != (call > 1) {
			t.Errorf("call %d: the proxy says that it knows a state: %v", call, knows)
		}
		if call == 1 {
			json.NewEncoder(w).Encode(updates(at, lb.AppTCP, first))
			http.NewResponseController(w).Flush()
			<-cut
			return
		}
		<-again
		json.NewEncoder(w).Encode(updates(at, lb.AppTCP, second))
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})}
	go agent.Serve(agentListener)
	defer agent.Close()
	p := start(t, Config{Listeners: []net.Listener{l}, Agent: socket})
	if got := say(t, dial(t, at.String()), ""); got != "first" {
		t.Errorf("got %q", got)
	}
	close(cut)
	if got := say(t, dial(t, at.String()), ""); got != "first" {
		t.Errorf("without its agent the proxy's backend says %q", got)
	}
	_, changed := p.feed.all()
	close(again)
	<-changed
	if got := say(t, dial(t, at.String()), ""); got != "second" {
		t.Errorf("after a new state: %q", got)
	}
}

func TestAdmin(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "a")
	r, at := serve(t, lb.AppTCP, func(c *Config) { c.Admin, c.Version = socket, "v9" }, backend(t, echo))
	<-r.accepted
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	client := unixClient(socket)
	tap, err := client.Get("http://proxy/v1/tap?service=shop/web")
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Body.Close()
	say(t, dial(t, at), "12345")
	var record state.TapRecord
	if err := json.NewDecoder(tap.Body).Decode(&record); err != nil || record.In != 5 || record.Out != 5 || record.Service != "shop/web:80" || record.Protocol != "tcp" {
		t.Errorf("%+v, %v", record, err)
	}
	var ports []state.PortStatus
	get(t, client, "/v1/ports", &ports)
	if len(ports) != 1 || ports[0].Stats.TCP != 1 || len(ports[0].Frontends) != 1 || ports[0].Frontends[0].String() != at || ports[0].Backends[0].Requests != 1 {
		t.Errorf("%+v", ports)
	}
	var status state.ProxyStatus
	get(t, client, "/v1/proxy", &status)
	if !status.Synced || status.Version != "v9" || status.Draining {
		t.Errorf("%+v", status)
	}
	response, err := client.Get("http://proxy/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	if n := families["causeway_l7_tcp_connections_total"].GetMetric()[0].GetCounter().GetValue(); n != 1 {
		t.Errorf("%v TCP connections are counted", n)
	}
}

func get(t *testing.T, c *http.Client, path string, to any) {
	t.Helper()
	response, err := c.Get("http://proxy" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(to); err != nil {
		t.Fatal(err)
	}
}

func TestStandaloneListensItself(t *testing.T) {
	l := listen(t)
	at := l.Addr().String()
	l.Close()
	p := start(t, Config{Standalone: true, File: stateFile(t, updates(addr(t, at), lb.AppTCP, backend(t, echo)))})
	<-p.accepted
	var c net.Conn
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var err error
		if c, err = net.Dial("tcp", at); err == nil {
			break
		}
	}
	if c == nil {
		t.Fatal("nobody listens")
	}
	if got := say(t, c.(*net.TCPConn), "hi"); got != "hi" {
		t.Errorf("got %q", got)
	}
}
