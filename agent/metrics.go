package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"causeway/agent/api"
	"causeway/clustermesh/peering"
	"causeway/identity"
)

// metricsTimeout bounds how long who asks for metrics may take to say so, and to read them.
const metricsTimeout = 10 * time.Second

// Metrics. Labels are bounded: nodes and clusters are those of the mesh, all else is a fixed set of words.
var (
	metricInfo         = describe("info", "What runs: always 1.", "cluster", "node", "version", "encryption", "device_kind")
	metricProblems     = describe("problems", "Problems that clustermesh status shows; 0 if all is well.")
	metricDrops        = describe("dropped_packets_total", "Packets that the kernel's programs dropped, since their maps were made.", "reason", "direction")
	metricDropBytes    = describe("dropped_bytes_total", "Bytes of those.", "reason", "direction")
	metricRows         = describe("table_rows", "Rows of a table by how far they have got.", "table", "status")
	metricAlive        = describe("nodes", "Nodes of a cluster by what is known of their life.", "cluster", "state")
	metricPeers        = describe("peer_connected", "1 if the cluster is connected: packets pass both ways.", "cluster")
	metricPathMTU      = describe("path_mtu_bytes", "Largest packet of pods that was seen to get to a cluster, in bytes.", "cluster")
	metricTunnels      = describe("tunnel_mode", "How packets get to a node: 1 for the mode that it is, 0 for the others.", "cluster", "node", "mode")
	metricTunnelMTU    = describe("tunnel_mtu_bytes", "Largest packet of pods that is sent to a node, in bytes.", "cluster", "node")
	metricHandshake    = describe("wireguard_handshake_age_seconds", "Time since the last handshake with a node, in seconds; not there before the first.", "cluster", "node")
	metricSession      = describe("wireguard_session", "1 if there is a session with a node.", "cluster", "node")
	metricReceived     = describe("wireguard_received_bytes_total", "Bytes received of a node.", "cluster", "node")
	metricTransmitted  = describe("wireguard_transmitted_bytes_total", "Bytes sent to a node.", "cluster", "node")
	metricDevices      = describe("wireguard_device", "1 for each device there is: one, and two while the key is changed.", "device", "kind")
	metricDeviceDrops  = describe("wireguard_device_dropped_packets_total", "Packets that a device dropped.", "device", "direction")
	metricKeyAge       = describe("wireguard_key_age_seconds", "Age of a device's key, in seconds.", "device")
	metricRotations    = describe("wireguard_rotations_total", "Changes of this node's key that have ended, since the agent's start.")
	metricRotating     = describe("wireguard_rotating", "1 while this node's key is being changed.")
	metricFallbacks    = describe("l7_fallbacks_total", "Connections to L7 services that were balanced at L4 for want of a proxy.")
	metricRepairs      = describe("wireguard_repairs_total", "What was put back that somebody else had removed, since the agent's start.", "what")
	tunnelModes        = []identity.TunnelMode{identity.TunnelWireGuard, identity.TunnelPlain, identity.TunnelClosed}
	metricDescriptions = []*prometheus.Desc{
		metricInfo, metricProblems, metricDrops, metricDropBytes, metricRows, metricAlive, metricPeers, metricPathMTU, metricTunnels, metricTunnelMTU,
		metricHandshake, metricSession, metricReceived, metricTransmitted, metricDevices, metricDeviceDrops, metricKeyAge, metricRotations, metricRotating,
		metricRepairs, metricFallbacks,
	}
)

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("causeway_"+name, help, labels, nil)
}

// snapshot is what metrics are made of: what the API shows.
type snapshot struct {
	status     api.Status
	encryption api.Encryption
	drops      []api.BPFDrop
	now        time.Time
}

// collector makes metrics of a snapshot, whenever they are asked for.
type collector struct{ take func() (snapshot, error) }

// Describe implements prometheus.Collector.
func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range metricDescriptions {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	s, err := c.take()
	if err != nil {
		out <- prometheus.NewInvalidMetric(metricInfo, err)
		return
	}
	e := emitter(out)
	e.agent(s)
	e.encryption(s)
}

type emitter chan<- prometheus.Metric

func (e emitter) gauge(d *prometheus.Desc, value float64, labels ...string) {
	e <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
}

func (e emitter) counter(d *prometheus.Desc, value uint64, labels ...string) {
	e <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
}

// flag is a gauge of 0 or 1.
func (e emitter) flag(d *prometheus.Desc, value bool, labels ...string) {
	if value {
		e.gauge(d, 1, labels...)
	} else {
		e.gauge(d, 0, labels...)
	}
}

func (e emitter) agent(s snapshot) {
	e.gauge(metricInfo, 1, s.status.Cluster, s.status.Node, s.status.Version, string(s.encryption.Mode), s.status.Encryption.Kind)
	e.gauge(metricProblems, float64(len(s.status.Problems)))
	for _, d := range s.drops {
		e.counter(metricDrops, d.Packets, d.Reason, d.Direction)
		e.counter(metricDropBytes, d.Bytes, d.Reason, d.Direction)
	}
	for name, t := range s.status.Tables {
		e.gauge(metricRows, float64(t.Rows-t.Pending-t.Errors), name, "done")
		e.gauge(metricRows, float64(t.Pending), name, "pending")
		e.gauge(metricRows, float64(t.Errors), name, "error")
	}
	e.counter(metricFallbacks, s.status.L7.Fallbacks)
	states := map[[2]string]int{}
	for _, n := range s.status.Gossip.Nodes {
		states[[2]string{n.Cluster, string(n.State)}]++
	}
	for of, n := range states {
		e.gauge(metricAlive, float64(n), of[0], of[1])
	}
	for _, p := range s.status.Peers {
		e.flag(metricPeers, p.State == string(peering.Connected), p.Name)
		if p.Out.MTU > 0 {
			e.gauge(metricPathMTU, float64(p.Out.MTU), p.Name)
		}
	}
}

func (e emitter) encryption(s snapshot) {
	for _, n := range s.encryption.Nodes {
		for _, mode := range tunnelModes {
			e.flag(metricTunnels, n.Mode == mode, n.Cluster, n.Node, string(mode))
		}
		e.gauge(metricTunnelMTU, float64(n.MTU), n.Cluster, n.Node)
		if n.Mode != identity.TunnelWireGuard {
			continue
		}
		if !n.Handshake.IsZero() {
			e.gauge(metricHandshake, s.now.Sub(n.Handshake).Seconds(), n.Cluster, n.Node)
		}
		e.flag(metricSession, n.Session, n.Cluster, n.Node)
		e.counter(metricReceived, n.Received, n.Cluster, n.Node)
		e.counter(metricTransmitted, n.Transmitted, n.Cluster, n.Node)
	}
	for _, d := range s.encryption.Devices {
		e.gauge(metricDevices, 1, d.Name, d.Kind)
		e.counter(metricDeviceDrops, d.DroppedReceive, d.Name, "ingress")
		e.counter(metricDeviceDrops, d.DroppedTransmit, d.Name, "egress")
		if !d.Made.IsZero() {
			e.gauge(metricKeyAge, s.now.Sub(d.Made).Seconds(), d.Name)
		}
	}
	e.counter(metricRotations, s.encryption.Rotations)
	e.flag(metricRotating, s.encryption.Rotation != nil)
	for what, n := range s.encryption.Repairs {
		e.counter(metricRepairs, n, what)
	}
}

// metricsHandler answers with metrics in Prometheus' text format, those of the agent's process and of more processes among them.
func metricsHandler(take func() (snapshot, error), more ...func() []*dto.MetricFamily) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{take}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	all := prometheus.Gatherers{registry}
	for _, m := range more {
		all = append(all, prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return m(), nil }))
	}
	return promhttp.HandlerFor(all, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError, MaxRequestsInFlight: 4})
}

// snapshot takes what metrics are made of.
func (v *view) snapshot() (s snapshot, err error) {
	s.now = time.Now()
	if s.status, _, err = v.status(); err != nil {
		return s, err
	}
	if s.drops, _, err = v.bpfDrops(); err != nil {
		return s, err
	}
	s.encryption, _, err = v.encryption()
	return s, err
}

// listenMetrics opens the port that metrics are served at; nil if the configuration has none.
func listenMetrics(address string) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics.listen: %w: give it another port, or stop who listens there", err)
	}
	return l, nil
}

// serveMetrics answers at the port that the configuration names, until ctx ends.
func serveMetrics(ctx context.Context, l net.Listener, handler http.Handler) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", handler)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: metricsTimeout, ReadTimeout: metricsTimeout, WriteTimeout: metricsTimeout, IdleTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving metrics: %w", err)
	}
	return nil
}
