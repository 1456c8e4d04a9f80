package state

import (
	"net/netip"
	"time"

	"causeway/lb"
)

// What a proxy answers at its admin socket, as JSON. The calls are
//
//	GET  /v1/proxy           ProxyStatus
//	GET  /v1/ports           []PortStatus
//	GET  /v1/tap?service=NAMESPACE/NAME[&sample=PERCENT]   TapRecord, one a line, until the caller goes
//	GET  /metrics            for Prometheus
//	POST /v1/drain           it takes no more connections, finishes what it has, and ends
//
// Who connects to the socket's path with ".fds" behind it is given the listeners (SCM_RIGHTS), one message with all.

// ProxyStatus is how a proxy is.
type ProxyStatus struct {
	PID     int       `json:"pid"`
	Version string    `json:"version"` // of its program: see BuildID
	Started time.Time `json:"started"`
	// Synced: it has read a whole state, so that it may be given connections.
	Synced   bool `json:"synced"`
	Draining bool `json:"draining,omitempty"`
	// Connections of clients, and requests under way.
	Connections int `json:"connections"`
	InFlight    int `json:"inFlight"`
	// Problems, in sentences.
	Problems []string `json:"problems,omitempty"`
}

// PortStatus is a port that is balanced at L7, as one proxy sees it.
type PortStatus struct {
	Route     lb.Route         `json:"route"`
	Frontends []netip.AddrPort `json:"frontends,omitempty"`
	Backends  []BackendStatus  `json:"backends"`
	Stats     PortStats        `json:"stats"`
}

// BackendStatus is one backend of a port.
type BackendStatus struct {
	lb.Target
	Unhealthy bool   `json:"unhealthy,omitempty"`
	Reason    string `json:"reason,omitempty"`
	Ejected   bool   `json:"ejected,omitempty"`
	InFlight  int    `json:"inFlight"`
	Requests  uint64 `json:"requests"`
	Failures  uint64 `json:"failures"`
	Ejections uint64 `json:"ejections"`
}

// PortStats are counts since the proxy's start, and latencies since then.
type PortStats struct {
	Requests uint64 `json:"requests"`
	InFlight int    `json:"inFlight"`
	Retries  uint64 `json:"retries"`
	// Codes counts answers by status ("200"; "grpc:14" for a gRPC status that is not 0; "cut" for requests without an answer).
	Codes map[string]uint64 `json:"codes,omitempty"`
	// Clusters counts them by the backend's cluster.
	Clusters map[string]uint64 `json:"clusters,omitempty"`
	// Local counts answers that were the proxy's own, by reason.
	Local map[string]uint64 `json:"local,omitempty"`
	// TCP counts connections that were passed on unread.
	TCP    uint64  `json:"tcp"`
	In     uint64  `json:"bytesIn"`
	Out    uint64  `json:"bytesOut"`
	P50MS  float64 `json:"p50Ms"`
	P99MS  float64 `json:"p99Ms"`
	Sample int     `json:"sample"` // requests that the latencies are of
}

// TapRecord is one request, as the access log and tap show it.
type TapRecord struct {
	Time     time.Time `json:"time"`
	Service  string    `json:"service"` // NAMESPACE/NAME:PORT
	Protocol string    `json:"protocol"`
	Client   string    `json:"client"` // the address, or NAMESPACE/NAME of a pod
	Method   string    `json:"method,omitempty"`
	Host     string    `json:"host,omitempty"`
	Path     string    `json:"path,omitempty"` // without its query, which may hold secrets
	Status   int       `json:"status,omitempty"`
	GRPC     *int      `json:"grpc,omitempty"`
	Local    string    `json:"local,omitempty"`
	Backend  string    `json:"backend,omitempty"`
	Cluster  string    `json:"cluster,omitempty"`
	Retries  int       `json:"retries,omitempty"`
	In       int64     `json:"bytesIn"`
	Out      int64     `json:"bytesOut"`
	Took     float64   `json:"tookMs"`
	Trace    string    `json:"trace,omitempty"` // the trace's ID
}
