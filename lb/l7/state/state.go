// Package state is what an L7 proxy is told: the desired state of an agent, as far as it concerns requests, as a stream of updates.
//
// The agent serves the stream to any number of proxies (the one in service, and those that finish what they have), as
// lines of JSON; a proxy that has lost its agent goes on with what it knows.
package state

import (
	"net/netip"
	"time"

	"causeway/lb"
)

// Knows is the query parameter of a proxy that has read a whole state before.
const Knows = "knows"

// Update is one change; one of its fields is set. A stream begins with Reset; what comes from then on replaces all that was, when Synced comes.
type Update struct {
	Reset  bool `json:"reset,omitempty"`
	Synced bool `json:"synced,omitempty"`

	Self *Self `json:"self,omitempty"`

	Frontend     *lb.Frontend    `json:"frontend,omitempty"`
	FrontendGone *lb.FrontendKey `json:"frontendGone,omitempty"`

	Route     *lb.Route   `json:"route,omitempty"`
	RouteGone *lb.PortKey `json:"routeGone,omitempty"`

	Target     *lb.Target    `json:"target,omitempty"`
	TargetGone *lb.TargetKey `json:"targetGone,omitempty"`

	Client     *Client     `json:"client,omitempty"`
	ClientGone *netip.Addr `json:"clientGone,omitempty"`

	Cluster *Cluster `json:"cluster,omitempty"`
}

// Self is the node that the proxy is on.
type Self struct {
	Cluster string `json:"cluster"`
	Node    string `json:"node"`
	// Sources are the addresses, at most one of each family, that connections to backends come from.
	Sources []netip.Addr `json:"sources,omitempty"`
	// Mark is the SO_MARK of a connection to a backend, less the client's identity; 0: connections are not marked.
	Mark uint32 `json:"mark,omitempty"`
	// HostIdentity is that of clients which are no pods of this node.
	HostIdentity uint32 `json:"hostIdentity,omitempty"`
}

// Client is a pod of this node.
type Client struct {
	Address  netip.Addr `json:"address"`
	Identity uint32     `json:"identity"`
	// Endpoint is "namespace/name".
	Endpoint string `json:"endpoint,omitempty"`
}

// Cluster is what is known of the way to a cluster.
type Cluster struct {
	Name string `json:"name"`
	// RTT is the round trip to it; 0: not known. Nanoseconds.
	RTT time.Duration `json:"rtt,omitempty"`
}
