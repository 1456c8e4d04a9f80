// Package balance chooses the backend of each request: by the algorithm, the clusters' order and weights, and who is well.
//
// It is told the desired state ([Table.Apply]) and what became of requests ([Endpoint.End]); it has no I/O. Choosing takes no lock: each change makes
// the port's plan anew, which says what part of the requests each endpoint gets.
//
// Clusters stand on levels (shares.go): with an affinity or a failover order the preferred ones come first, and the next level gets what those before it cannot take,
// which begins when less than 72 % of a level's endpoints are well, and ends when they are again. With weights all stand side by side, and a cluster that cannot take
// its part leaves it to the others. An endpoint is well if gossip has not quarantined its node, the active check does not say otherwise, and it is
// not ejected for failing again and again (eject.go). If none is well anywhere, all get requests.
package balance

import (
	"errors"
	"net/netip"
	"time"

	"causeway/lb"
	"causeway/lb/l7/state"
)

// ErrNoBackend: the port has none at all, or all were tried.
var ErrNoBackend = errors.New("no backend")

// Table has all ports that are balanced at L7. It is safe for concurrent use.
type Table struct{ table }

// Port is a port of a service: what a connection's frontend leads to. It stays the same object as long as the route is there.
type Port struct{ port }

// Endpoint is a backend of a port. It stays the same object as long as the backend is there, whatever is known of its health.
type Endpoint struct{ endpoint }

// NewTable returns an empty table.
func NewTable() *Table { return newTable() }

// Apply takes updates in their order.
func (t *Table) Apply(updates []state.Update) { t.apply(updates) }

// Tick has time pass: ejections end, new backends get more, retries are allowed anew. It is to be called about ten times a second.
func (t *Table) Tick(now time.Time) { t.tick(now) }

// Frontend returns the port behind an address that clients connect to.
func (t *Table) Frontend(a netip.AddrPort) (*Port, bool) { return t.frontend(a) }

// Ports lists all ports in the order of their names.
func (t *Table) Ports() []*Port { return t.ports() }

// Changed returns a channel that is closed at the next change of frontends or ports.
func (t *Table) Changed() <-chan struct{} { return t.changed() }

// Self is the node that this is, as the state has it.
func (t *Table) Self() state.Self { return t.self() }

// Client returns the pod of this node with the address, or a client with the host's identity.
func (t *Table) Client(a netip.Addr) state.Client { return t.client(a) }

// Key names the port.
func (p *Port) Key() lb.PortKey { return p.key }

// Route is the port's as it is now. It must not be changed.
func (p *Port) Route() *lb.Route { return p.route() }

// Gone is closed when the port is no longer balanced at L7: connections to it end when their requests have.
func (p *Port) Gone() <-chan struct{} { return p.gone }

// Endpoints lists all, in the order of their addresses.
func (p *Port) Endpoints() []*Endpoint { return p.list() }

// Query is what a choice depends on besides the port. Its zero value is good.
type Query struct {
	// Hash of what the route has hashed, if Hashed. Without it a hashing port chooses at random.
	Hash   uint64
	Hashed bool
	// Tried are the endpoints that this request was sent to in vain; others are preferred, and with none left it is ErrNoBackend.
	Tried []*Endpoint
}

// HashKey returns how the route wants requests hashed: the name of a header, in lower case, or that of a cookie, or neither.
func (p *Port) HashKey() (header, cookie string) { return p.hashKey() }

// Hash of a header's or cookie's value, for Query.
func Hash(value []byte) uint64 { return hash(value) }

// Pick chooses a backend for one request (or one connection, of what is not HTTP). The caller owes the endpoint one Begin and End.
func (p *Port) Pick(q *Query) (*Endpoint, error) { return p.pick(q) }

// Arrived counts a request for the retry budget. Retry asks whether one more try, the attempt-th retry from 1, is within the route's Retries and the budget,
// and if so takes it from the budget.
func (p *Port) Arrived()               { p.arrived() }
func (p *Port) Retry(attempt int) bool { return p.retry(attempt) }

// Address to connect to.
func (e *Endpoint) Address() netip.AddrPort { return e.address }

// Target is the endpoint's row as it is now. It must not be changed.
func (e *Endpoint) Target() *lb.Target { return e.target() }

// Port that it is an endpoint of.
func (e *Endpoint) Port() *Port { return e.of }

// Begin counts a request (or a try of one) that is under way, End takes it out and says how it went.
func (e *Endpoint) Begin()        { e.begin() }
func (e *Endpoint) End(r Outcome) { e.end(r) }

// Outcome of a try, for passive ejection.
type Outcome uint8

const (
	// Neutral says nothing of the backend: the client went away, or the try was cut off by the proxy itself.
	Neutral Outcome = iota
	// Success: it answered, whatever (also with 4xx).
	Success
	// Failure: it could not be connected to, closed early, broke the protocol, timed out, or answered 502, 503, 504 or gRPC's UNAVAILABLE.
	Failure
)

// Counts are all tries of it, and those that failed.
func (e *Endpoint) Counts() (requests, failures uint64) { return e.requests.Load(), e.failures.Load() }

// InFlight is the number of tries under way.
func (e *Endpoint) InFlight() int { return e.inFlight() }

// Health of an endpoint, for display and for the active health checks.
type Health struct {
	// Quarantined by gossip: its node is not reachable.
	Quarantined bool `json:"quarantined,omitempty"`
	// Unhealthy says the active health check; Reason why.
	Unhealthy bool   `json:"unhealthy,omitempty"`
	Reason    string `json:"reason,omitempty"`
	// Ejected by outlier detection.
	Ejected bool `json:"ejected,omitempty"`
	// Ejections counts how often.
	Ejections uint64 `json:"ejections,omitempty"`
}

// Health is as it is now.
func (e *Endpoint) Health() Health { return e.health() }

// SetHealthy is what the active health check says.
func (e *Endpoint) SetHealthy(healthy bool, reason string) { e.setHealthy(healthy, reason) }

// Removed is closed when the backend is gone or terminating: what is under way goes on, nothing new is sent there, idle connections end.
func (e *Endpoint) Removed() <-chan struct{} { return e.removed }

// Kinds of what engines keep at an endpoint.
const (
	KeepHTTP1 = iota
	KeepHTTP2
	KeepCounts
	kinds
)

// Keep returns what was kept at the endpoint under the kind, which is the caller's to define, or makes and keeps it. It takes no lock once it is made.
func (e *Endpoint) Keep(kind int, make func() any) any { return e.keep(kind, make) }
