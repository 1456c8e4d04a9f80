package agent

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"causeway/clustermesh"
	"causeway/lb"
)

// checkPorts are the ports of a machine, each of which is really one of loopback.
type checkPorts struct {
	mu      sync.Mutex
	taken   map[uint16]bool
	at      map[uint16]string
	changed chan struct{}
}

func (p *checkPorts) listen(port uint16) (net.Listener, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken[port] || p.at[port] != "" {
		return nil, errors.New("address already in use")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p.at[port] = l.Addr().String()
	p.tell()
	return checkListener{l, p, port}, nil
}

// tell lets a test look again.
func (p *checkPorts) tell() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

type checkListener struct {
	net.Listener
	ports *checkPorts
	port  uint16
}

func (l checkListener) Close() error {
	l.ports.mu.Lock()
	delete(l.ports.at, l.port)
	l.ports.mu.Unlock()
	l.ports.tell()
	return l.Listener.Close()
}

// await waits until the port is open, or not, and returns where.
func (p *checkPorts) await(t *testing.T, port uint16, open bool) string {
	t.Helper()
	deadline := time.After(patience)
	for {
		p.mu.Lock()
		at := p.at[port]
		p.mu.Unlock()
		if (at != "") == open {
			return at
		}
		select {
		case <-p.changed:
		case <-deadline:
			t.Fatalf("port %d: open is not %v after %s", port, open, patience)
		}
	}
}

func checkedService(name string, port uint16) lb.Service {
	return lb.Service{
		Cluster: "east", ClusterID: 1, Name: lb.Name{Namespace: "default", Name: name}, HealthCheckNodePort: port, ExternalLocal: true,
		Ports: []lb.ServicePort{{Protocol: lb.TCP, Port: 80, TargetPort: 8080}},
	}
}

func checkedBackend(cluster, node, address, endpoint string, terminating bool) lb.Backend {
	return lb.Backend{
		Cluster: cluster, Service: lb.Name{Namespace: "default", Name: "shop"}, Node: node, Address: netip.MustParseAddr(address), Endpoint: endpoint,
		Terminating: terminating,
	}
}

func runHealthChecks(t *testing.T) (*clustermesh.Tables, *checkPorts) {
	t.Helper()
	tables := newTables(t)
	ports := &checkPorts{taken: map[uint16]bool{}, at: map[uint16]string{}, changed: make(chan struct{}, 1)}
	h := newHealthChecks(&agent{tables: tables, log: slog.New(slog.DiscardHandler), cfg: Config{Cluster: ClusterConfig{Name: "east"}, Node: NodeConfig{Name: "node1"}}})
	h.listen = ports.listen
	run(t, h.Run)
	return tables, ports
}

func askHealth(t *testing.T, at string) (status int, answer healthCheckAnswer, weight string) {
	t.Helper()
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + at + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil {
		err = json.Unmarshal(body, &answer)
	}
	if err != nil {
		t.Fatalf("the answer is %q: %v", body, err)
	}
	return resp.StatusCode, answer, resp.Header.Get("X-Load-Balancing-Endpoint-Weight")
}

// TestHealthCheckCountsTheNodesPods: those that take new connections, each once, of the own cluster's node alone.
func TestHealthCheckCountsTheNodesPods(t *testing.T) {
	tables, ports := runHealthChecks(t)
	put(t, tables, tables.Services, checkedService("shop", 30300))
	at := ports.await(t, 30300, true)
	for _, step := range []struct {
		name    string
		backend lb.Backend
		want    int
	}{
		{"on another node", checkedBackend("east", "node2", "10.1.2.5", "default/a", false), 0},
		{"on a node of that name in another cluster", checkedBackend("west", "node1", "10.2.1.5", "default/a", false), 0},
		{"terminating", checkedBackend("east", "node1", "10.1.1.9", "default/z", true), 0},
		{"here", checkedBackend("east", "node1", "10.1.1.5", "default/b", false), 1},
		{"the same pod's other address", checkedBackend("east", "node1", "fd00::5", "default/b", false), 1},
		{"another one", checkedBackend("east", "node1", "10.1.1.6", "default/c", false), 2},
		{"without a pod", checkedBackend("east", "node1", "10.1.1.7", "", false), 3},
		{"it begins to terminate", checkedBackend("east", "node1", "10.1.1.7", "", true), 2},
	} {
		put(t, tables, tables.Backends, step.backend)
		status, got, weight := askHealth(t, at)
		wantStatus := http.StatusOK
		if step.want == 0 {
			wantStatus = http.StatusServiceUnavailable
		}
		want := healthCheckAnswer{Service: lb.Name{Namespace: "default", Name: "shop"}, LocalEndpoints: step.want, ServiceProxyHealthy: true}
		if status != wantStatus || got != want || weight != string(rune('0'+step.want)) {
			t.Errorf("%s: the answer is %d %+v, weight %s; want %d %+v", step.name, status, got, weight, wantStatus, want)
		}
	}
}

// TestHealthCheckPorts come, move and go with the own cluster's services, and one that is taken waits until it is free.
func TestHealthCheckPorts(t *testing.T) {
	tables, ports := runHealthChecks(t)
	ports.taken[30301] = true
	foreign := checkedService("shop", 30309)
	foreign.Cluster = "west"
	put(t, tables, tables.Services, foreign, checkedService("taken", 30301), checkedService("plain", 0), checkedService("shop", 30300))
	ports.await(t, 30300, true)
	put(t, tables, tables.Services, checkedService("shop", 30302))
	ports.await(t, 30300, false)
	ports.await(t, 30302, true)
	ports.await(t, 30301, false)
	ports.await(t, 30309, false)
	ports.mu.Lock()
	ports.taken[30301] = false
	ports.mu.Unlock()
	put(t, tables, tables.Services, checkedService("plain", 0)) // It looks again at any change, and else after some time.
	ports.await(t, 30301, true)
	remove(t, tables, tables.Services, "east/default/shop")
	ports.await(t, 30302, false)
	if status, got, _ := askHealth(t, ports.await(t, 30301, true)); status != http.StatusServiceUnavailable || got.Service.Name != "taken" {
		t.Errorf("the other service answers %d %+v", status, got)
	}
}
