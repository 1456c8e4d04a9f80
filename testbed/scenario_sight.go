package testbed

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"causeway/agent/api"
	"causeway/identity"
)

// looks says what has to be looked at for a condition.
type looks uint8

const (
	lookKernels looks = 1 << iota
	lookViews
	lookStatus
	lookTraffic
	// lookAgain asks for a new sight, and not for one that somebody else has just taken.
	lookAgain
)

// sight is what was seen of a bed in one moment.
type sight struct {
	at time.Time
	// since is when the last action took effect, or when the conditions began that are to last.
	since time.Time
	// servers of the service, those on nodes that are down included.
	servers []server
	// kernels of the nodes whose agent runs, what members each of these agents tells, and what is wrong with each.
	kernels  map[identity.NodeName][]frontend
	views    map[identity.NodeName]*api.Members
	problems map[identity.NodeName][]string
	// silent are the agents that run but did not answer, each with the reason.
	silent []string
	// unwell says in a sentence each what is not well in the bed as a whole.
	unwell []string
	// traffic that has ended, by the cluster that it came from, and the times of faults.
	traffic map[string]*LoadResult
	faults  []interval
}

// server is a backend of the scenario's service.
type server struct {
	name    string // CLUSTER/POD
	node    identity.NodeName
	address netip.AddrPort
	// runs is false while its node is down.
	runs bool
}

// frontend is one of the service's addresses as a kernel has it.
type frontend struct {
	address netip.Addr
	// known is false if the kernel does not have it, or could not be read, because of unread.
	known  bool
	unread error
	// backends that new connections choose from, one entry a slot.
	backends []netip.AddrPort
}

// interval is how long something was being done.
type interval struct{ from, to time.Time }

// frontendsIn calls fn with the service's addresses in the kernels of a part of the bed, until it returns a problem. Nothing to
// look at is a problem too.
func (s *sight) frontendsIn(in scope, fn func(frontend) string) string {
	seen := false
	for _, node := range sortedNodes(s.kernels) {
		if !in.has(node) {
			continue
		}
		for _, f := range s.kernels[node] {
			seen = true
			problem := "does not know the service's address"
			if f.known {
				problem = fn(f)
			} else if f.unread != nil {
				problem = fmt.Sprintf("could not be read (%v)", f.unread)
			}
			if problem != "" {
				return fmt.Sprintf("the kernel of %v %s, at %v", node, problem, f.address)
			}
		}
	}
	if !seen {
		return "no agent runs whose kernel could be looked at"
	}
	return ""
}

// viewsIn calls fn with what the agents of a part of the bed tell, until it returns a problem.
func (s *sight) viewsIn(in scope, fn func(*api.Members) string) string {
	seen := false
	for _, node := range sortedNodes(s.views) {
		if !in.has(node) {
			continue
		}
		seen = true
		problem := "has no gossip"
		if s.views[node].Enabled {
			problem = fn(s.views[node])
		}
		if problem != "" {
			return fmt.Sprintf("%v %s", node, problem)
		}
	}
	if !seen {
		return fmt.Sprintf("no agent tells its view%s", because(strings.Join(s.silent, "; ")))
	}
	return ""
}

func sortedNodes[V any](m map[identity.NodeName]V) []identity.NodeName {
	var nodes []identity.NodeName
	for n := range m {
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b identity.NodeName) int { return strings.Compare(a.String(), b.String()) })
	return nodes
}

// nameOf says who has an address, for people.
func (s *sight) nameOf(a netip.AddrPort) string {
	for _, server := range s.servers {
		if server.address == a {
			return server.name
		}
	}
	return a.String()
}

// lacking returns the servers that a frontend has not.
func (s *sight) lacking(f frontend, wanted func(server) bool) (names []string) {
	for _, server := range s.servers {
		if wanted(server) && !slices.Contains(f.backends, server.address) {
			names = append(names, server.name)
		}
	}
	return names
}
