package lb

import "time"

// L7Algorithm says how requests are spread over the backends of a service that is balanced at L7.
type L7Algorithm string

const (
	RoundRobin   L7Algorithm = "round_robin"
	LeastRequest L7Algorithm = "least_request"
	Random       L7Algorithm = "random"
	// Hashed is what L7Options.HashHeader or HashCookie ask for: Maglev.
	Hashed L7Algorithm = "hash"
)

// AffinityNearest prefers the cluster with the shortest round trip; at L7 only.
const AffinityNearest Affinity = "nearest"

// HealthKind is how backends are asked whether they are well.
type HealthKind string

const (
	HealthNone HealthKind = ""
	HealthHTTP HealthKind = "http" // GET HealthCheck.Path is answered with 2xx or 3xx
	HealthGRPC HealthKind = "grpc" // grpc.health.v1.Health/Check of HealthCheck.Service says SERVING
	HealthTCP  HealthKind = "tcp"  // a connection is accepted
)

// HealthCheck asks each backend whether it is well.
type HealthCheck struct {
	Kind     HealthKind    `json:"kind,omitempty"`
	Path     string        `json:"path,omitempty"`
	Service  string        `json:"service,omitempty"`
	Interval time.Duration `json:"interval,omitempty"` // nanoseconds
	Timeout  time.Duration `json:"timeout,omitempty"`  // nanoseconds
}

// ClusterWeight is a cluster's part of a service's requests.
type ClusterWeight struct {
	Cluster string `json:"cluster"`
	Weight  int    `json:"weight"`
}

// L7Options say how one service is balanced at L7, as its annotations have it, with defaults filled in.
type L7Options struct {
	Algorithm L7Algorithm `json:"algorithm"`
	// HashHeader or HashCookie is what is hashed, if Algorithm is Hashed.
	HashHeader string   `json:"hashHeader,omitempty"`
	HashCookie string   `json:"hashCookie,omitempty"`
	Affinity   Affinity `json:"affinity"`
	// Weights of clusters, ordered by name; those that it does not name get nothing unless none of the named has a healthy backend.
	Weights []ClusterWeight `json:"weights,omitempty"`
	// Failover is the order in which clusters are used; those that it does not name come last. Not with Weights.
	Failover []string    `json:"failover,omitempty"`
	Health   HealthCheck `json:"health,omitzero"`
	// Retries of one request at most, after the first try, and the budget: how many requests may be retries, in percent of all.
	Retries     int `json:"retries"`
	RetryBudget int `json:"retryBudget"`
	// TryTimeout bounds the wait for one backend's answer to begin, Timeout a request as a whole; nanoseconds, 0: not at all.
	TryTimeout time.Duration `json:"tryTimeout,omitempty"`
	Timeout    time.Duration `json:"timeout,omitempty"`
	// MaxConnections to one backend, and MaxPending requests that wait for one of those, of one proxy.
	MaxConnections int `json:"maxConnections"`
	MaxPending     int `json:"maxPending"`
	// OutlierFailures in a row eject a backend for EjectFor, longer each time; 0: never. MaxEjected percent of all backends at most.
	OutlierFailures int           `json:"outlierFailures"`
	EjectFor        time.Duration `json:"ejectFor"` // nanoseconds
	MaxEjected      int           `json:"maxEjected"`
	// SlowStart is the time in which a new backend gets from a tenth to its whole part; nanoseconds, 0: at once.
	SlowStart time.Duration `json:"slowStart,omitempty"`
}

// DefaultL7Options is what a service has that says nothing but lb-l7: enabled.
func DefaultL7Options() L7Options {
	return L7Options{
		Algorithm: RoundRobin, Affinity: AffinityNone,
		Retries: 2, RetryBudget: 20,
		MaxConnections: 1024, MaxPending: 1024,
		OutlierFailures: 5, EjectFor: 10 * time.Second, MaxEjected: 50,
	}
}

// AppProtocol says what a port speaks, as Service.spec.ports[].appProtocol has it.
type AppProtocol string

const (
	AppUnknown AppProtocol = ""     // it is found out by what the client sends first
	AppHTTP    AppProtocol = "http" // HTTP/1 or HTTP/2 with prior knowledge, as the client begins
	AppHTTP2   AppProtocol = "h2c"  // kubernetes.io/h2c, grpc, http2
	AppTCP     AppProtocol = "tcp"  // what is not to be looked into: tcp, https, tls, kubernetes.io/wss, …
)

// Route is a desired row of the routes table: a port of a service that is balanced at L7, and how.
type Route struct {
	Port PortKey `json:"port"`
	// Number of the service's port, for display.
	Number  uint16      `json:"number"`
	App     AppProtocol `json:"appProtocol,omitempty"`
	Options L7Options   `json:"options"`
}
