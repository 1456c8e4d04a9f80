package agent

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"causeway/clustermesh"
	"causeway/lb"
)

const (
	// healthCheckRetry is after how long a port is tried again that could not be listened on.
	healthCheckRetry = 5 * time.Second
	// healthCheckTimeout bounds a request, which has nothing to say.
	healthCheckTimeout = 5 * time.Second
)

// healthChecks tell load balancers which nodes to send a service's clients to, where only backends of the node that is asked serve them: an HTTP server at
// the health check node port of each such service of the own cluster.
type healthChecks struct {
	tables  *clustermesh.Tables
	cluster string
	node    string
	// listen opens a TCP port of the node.
	listen func(port uint16) (net.Listener, error)
	log    *slog.Logger

	// wanted are the ports of services, open the servers there are.
	wanted map[lb.Name]uint16
	open   map[lb.Name]*healthCheck
	served sync.WaitGroup
}

// healthCheck is the server of one service.
type healthCheck struct {
	port   uint16
	server *http.Server
}

func newHealthChecks(a *agent) *healthChecks {
	return &healthChecks{
		tables: a.tables, cluster: a.cfg.Cluster.Name, node: a.cfg.Node.Name, log: a.log,
		listen: func(port uint16) (net.Listener, error) { return net.Listen("tcp", ":"+strconv.Itoa(int(port))) },
		wanted: map[lb.Name]uint16{}, open: map[lb.Name]*healthCheck{},
	}
}

// Run serves until ctx ends.
func (h *healthChecks) Run(ctx context.Context) error {
	t := h.tables
	txn := t.DB.WriteTxn(t.Services)
	changes, err := t.Services.Changes(txn)
	if err != nil {
		txn.Abort()
		return err
	}
	txn.Commit()
	defer changes.Close()
	defer h.served.Wait()
	defer func() {
		clear(h.wanted)
		h.step()
	}()
	for {
		changed, more := changes.Next(t.DB.ReadTxn())
		for change := range changed {
			if s := change.Object.Object; s.Cluster == h.cluster {
				h.want(s, change.Deleted)
			}
		}
		var retry <-chan time.Time
		if !h.step() {
			retry = time.After(healthCheckRetry)
		}
		select {
		case <-more:
		case <-retry:
		case <-ctx.Done():
			return nil
		}
	}
}

// want notes which port the service is to have.
func (h *healthChecks) want(s lb.Service, deleted bool) {
	delete(h.wanted, s.Name)
	if !deleted && s.HealthCheckNodePort != 0 {
		h.wanted[s.Name] = s.HealthCheckNodePort
	}
}

// step closes what is not wanted any more, and opens what is: a port may be another service's by now. It tells whether all are open.
func (h *healthChecks) step() bool {
	for name, check := range h.open {
		if h.wanted[name] != check.port {
			check.server.Close() // Who has a connection asks again.
			delete(h.open, name)
		}
	}
	all := true
	for name, port := range h.wanted {
		if h.open[name] != nil {
			continue
		}
		listener, err := h.listen(port)
		if err != nil {
			h.log.Error("load balancers can't ask whether this node has backends of a service, and will send it no clients: free the port", "service", name, "port", port, "error", err)
			all = false
			continue
		}
		h.serve(name, port, listener)
	}
	return all
}

func (h *healthChecks) serve(name lb.Name, port uint16, listener net.Listener) {
	check := &healthCheck{port: port, server: &http.Server{
		Handler:     http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { h.answer(w, name) }),
		ReadTimeout: healthCheckTimeout, WriteTimeout: healthCheckTimeout,
	}}
	h.open[name] = check
	h.served.Go(func() {
		if err := check.server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			h.log.Error("load balancers get no answer any more to whether this node has backends of a service: restart the agent", "service", name, "port", port, "error", err)
		}
	})
}

// healthCheckAnswer has the form that kube-proxy's has.
type healthCheckAnswer struct {
	Service             lb.Name `json:"service"`
	LocalEndpoints      int     `json:"localEndpoints"`
	ServiceProxyHealthy bool    `json:"serviceProxyHealthy"`
}

// answer says 200 to whatever is asked if the node has a backend that takes new connections, and else 503.
func (h *healthChecks) answer(w http.ResponseWriter, name lb.Name) {
	n := localBackends(h.tables.BackendsOf(h.tables.DB.ReadTxn(), name), h.cluster, h.node)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(n))
	if n == 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(healthCheckAnswer{Service: name, LocalEndpoints: n, ServiceProxyHealthy: true}) // Who has hung up gets none.
}

// localBackends counts the pods of a node among backends that take new connections. One with two addresses counts once.
func localBackends(backends []lb.Backend, cluster, node string) int {
	pods := make(map[string]struct{})
	for _, b := range backends {
		if b.Cluster != cluster || b.Node != node || b.Terminating {
			continue
		}
		if b.Endpoint != "" {
			pods[b.Endpoint] = struct{}{}
		} else {
			pods[b.Address.String()] = struct{}{}
		}
	}
	return len(pods)
}
