package testbed

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"causeway/agent/api"
	"causeway/identity"
)

// condition is something that may hold of a bed or not.
type condition struct {
	text  string
	needs looks
	// problem says what is otherwise; empty if it holds. It is a function of the sight alone.
	problem func(*sight) string
}

// conditions of the language; docs/scenarios.md says what each means.
var conditions = []phrase[condition]{
	{"N backends in every kernel [of PLACE]", makeCount},
	{"every backend [of PLACE] in every kernel [of PLACE]", makeEvery},
	{"no backend of PLACE in any kernel [of PLACE]", makeNone},
	{"exactly the running servers in every kernel [of PLACE]", makeExactly},
	{"server SERVER in every kernel [of PLACE]", makeServer(true)},
	{"server SERVER in no kernel [of PLACE]", makeServer(false)},
	{"node NODE is STATES in every view [of PLACE]", makeNodeState},
	{"every node is STATES in every view [of PLACE]", makeNodeStates},
	{"cluster CLUSTER is STATES in every view [of PLACE]", makeClusterState},
	{"nothing is quarantined in any view [of PLACE]", makeNothingQuarantined},
	{"no transitions [but of PLACE] in any view [of PLACE]", makeNoTransitions},
	{"all is well", makeWell},
	{"node NODE says TEXT", makeNodeSays},
	{"some node says TEXT", makeSomeSays(true)},
	{"no node says TEXT", makeSomeSays(false)},
	{"no request failed", makeNoFailures},
	{"requests failed only within DURATION after a fault", makeFailuresOnly},
	{"server SERVER answered requests from CLUSTER", makeAnswered},
}

func makeCount(a arguments, s *Setup) (condition, error) {
	n, err := strconv.Atoi(a[0])
	if err != nil || n < 0 {
		return condition{}, fmt.Errorf("%q is no number of backends", a[0])
	}
	return aboutKernels(a[1], s, func(s *sight, f frontend) string {
		if got := len(distinct(f.backends)); got != n {
			return fmt.Sprintf("has %d backends%s", got, s.difference(f))
		}
		return ""
	})
}

// difference says what a frontend has beyond the servers that run, and lacks of them.
func (s *sight) difference(f frontend) (text string) {
	var extra []string
	for _, b := range distinct(f.backends) {
		if !slices.ContainsFunc(s.servers, func(sv server) bool { return sv.runs && sv.address == b }) {
			extra = append(extra, s.nameOf(b))
		}
	}
	if lacks := s.lacking(f, func(sv server) bool { return sv.runs }); len(lacks) > 0 {
		text += ", lacks " + strings.Join(lacks, ", ")
	}
	if len(extra) > 0 {
		text += ", has " + strings.Join(extra, ", ") + " which does not run"
	}
	return text
}

func makeEvery(a arguments, s *Setup) (condition, error) {
	of, err := s.scope(a[0])
	if err != nil {
		return condition{}, err
	}
	return aboutKernels(a[1], s, func(s *sight, f frontend) string {
		if lacks := s.lacking(f, func(sv server) bool { return of.has(sv.node) }); len(lacks) > 0 {
			return "lacks " + strings.Join(lacks, ", ")
		}
		return ""
	})
}

func makeNone(a arguments, s *Setup) (condition, error) {
	of, err := s.podCIDR(a[0])
	if err != nil {
		return condition{}, err
	}
	return aboutKernels(a[1], s, func(s *sight, f frontend) string {
		for _, b := range f.backends {
			if of.Contains(b.Addr()) {
				return "has " + s.nameOf(b)
			}
		}
		return ""
	})
}

// podCIDR returns the range of the pods of a place: also of pods that nobody knows any more.
func (s *Setup) podCIDR(place string) (netip.Prefix, error) {
	at, err := s.scope(place)
	if err != nil {
		return netip.Prefix{}, err
	}
	id := identity.ClusterID(slices.Index(s.clusters(), at.cluster) + 1)
	for n := 1; n <= s.Nodes; n++ {
		if at.node == nodeName(n) {
			return nodePodCIDRs(id, n)[0], nil
		}
	}
	return clusterPodCIDRs(id)[0], nil
}

func makeExactly(a arguments, s *Setup) (condition, error) {
	return aboutKernels(a[0], s, func(s *sight, f frontend) string {
		if d := s.difference(f); d != "" {
			return "has not exactly the running servers" + d
		}
		if n := len(f.backends) - len(distinct(f.backends)); n > 0 {
			return fmt.Sprintf("has %d backends twice", n)
		}
		return ""
	})
}

func makeServer(in bool) func(arguments, *Setup) (condition, error) {
	return func(a arguments, s *Setup) (condition, error) {
		if err := s.checkServer(a[0]); err != nil {
			return condition{}, err
		}
		return aboutKernels(a[1], s, func(s *sight, f frontend) string {
			has := slices.ContainsFunc(f.backends, func(b netip.AddrPort) bool { return s.nameOf(b) == a[0] })
			switch {
			case in && !has:
				return "lacks " + a[0]
			case !in && has:
				return "has " + a[0]
			}
			return ""
		})
	}
}

// checkServer checks CLUSTER/NAME.
func (s *Setup) checkServer(text string) error {
	n, err := ParseNode(text)
	if err != nil {
		return fmt.Errorf("%q is no server; write CLUSTER/NAME", text)
	}
	return cmp.Or(s.checkCluster(n.Cluster), validateName("server", n.Node, maxPodName))
}

// aboutKernels is a condition on each of the service's addresses in the kernels of a place.
func aboutKernels(place string, s *Setup, problem func(*sight, frontend) string) (condition, error) {
	in, err := s.scope(place)
	return condition{needs: lookKernels, problem: func(s *sight) string {
		return s.frontendsIn(in, func(f frontend) string { return problem(s, f) })
	}}, err
}

// aboutViews is a condition on what the agents of a place tell.
func aboutViews(place string, s *Setup, problem func(*sight, *api.Members) string) (condition, error) {
	in, err := s.scope(place)
	return condition{needs: lookViews, problem: func(s *sight) string {
		return s.viewsIn(in, func(m *api.Members) string { return problem(s, m) })
	}}, err
}

// parseStates reads "dead" or "dead or suspect".
func parseStates(text string, known ...string) ([]string, error) {
	states := strings.Split(text, " or ")
	for _, state := range states {
		if !slices.Contains(known, state) {
			return nil, fmt.Errorf("%q is no state; there is %s", state, strings.Join(known, ", "))
		}
	}
	return states, nil
}

func parseNodeStates(text string) ([]string, error) {
	return parseStates(text, string(identity.NodeAlive), string(identity.NodeAgentDown), string(identity.NodeSuspect), string(identity.NodeDead), string(identity.NodeLeft))
}

func makeNodeState(a arguments, s *Setup) (condition, error) {
	node, err := s.node(a[0])
	if err != nil {
		return condition{}, err
	}
	states, err := parseNodeStates(a[1])
	if err != nil {
		return condition{}, err
	}
	return aboutViews(a[2], s, func(_ *sight, m *api.Members) string { return nodeState(m, node, states) })
}

// nodeState says which other state a view has a node in.
func nodeState(m *api.Members, node identity.NodeName, states []string) string {
	for _, n := range m.Nodes {
		if n.NodeName() != node {
			continue
		}
		if slices.Contains(states, string(n.State)) {
			return ""
		}
		return fmt.Sprintf("has %v as %s%s", node, n.State, because(n.Reason))
	}
	return fmt.Sprintf("does not know %v", node)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return fmt.Sprintf(" (%s)", reason)
}

func makeNodeStates(a arguments, s *Setup) (condition, error) {
	states, err := parseNodeStates(a[0])
	if err != nil {
		return condition{}, err
	}
	var nodes []identity.NodeName
	for _, c := range s.clusters() {
		for n := 1; n <= s.Nodes; n++ {
			nodes = append(nodes, identity.NodeName{Cluster: c, Node: nodeName(n)})
		}
	}
	return aboutViews(a[1], s, func(_ *sight, m *api.Members) string {
		for _, node := range nodes {
			if problem := nodeState(m, node, states); problem != "" {
				return problem
			}
		}
		return ""
	})
}

func makeClusterState(a arguments, s *Setup) (condition, error) {
	states, err := parseStates(a[1], string(identity.Reachable), string(identity.Unreachable), string(identity.ReachControlPlaneDown), string(identity.ReachUnknown))
	if err = cmp.Or(s.checkCluster(a[0]), err); err != nil {
		return condition{}, err
	}
	return aboutViews(a[2], s, func(_ *sight, m *api.Members) string { return clusterState(m, a[0], states) })
}

// clusterState says which other state a view has a cluster in. A cluster's own view of itself says nothing.
func clusterState(m *api.Members, cluster string, states []string) string {
	for _, c := range m.Clusters {
		if c.Cluster != cluster {
			continue
		}
		if c.State == identity.ReachSelf || slices.Contains(states, string(c.State)) {
			return ""
		}
		return fmt.Sprintf("has cluster %s as %s%s", cluster, c.State, because(c.Reason))
	}
	return "does not know cluster " + cluster
}

func makeNothingQuarantined(a arguments, s *Setup) (condition, error) {
	return aboutViews(a[0], s, func(_ *sight, m *api.Members) string {
		for _, n := range m.Nodes {
			if n.Quarantined {
				return fmt.Sprintf("has %v quarantined as %s%s", n.NodeName(), n.State, because(n.Reason))
			}
		}
		for _, c := range m.Clusters {
			if c.Quarantined {
				return fmt.Sprintf("has cluster %s quarantined as %s%s", c.Cluster, c.State, because(c.Reason))
			}
		}
		return ""
	})
}

func makeNoTransitions(a arguments, s *Setup) (condition, error) {
	var but func(string) bool
	if a[0] != "" {
		place, err := s.scope(a[0])
		if err != nil {
			return condition{}, err
		}
		but = func(subject string) bool {
			return subject == place.String() || strings.HasPrefix(subject, place.String()+"/")
		}
	}
	return aboutViews(a[1], s, func(s *sight, m *api.Members) string {
		for _, t := range m.Transitions {
			// What was not known before has not changed: an agent that is started learns everything anew.
			if t.At.Before(s.since) || t.From == string(identity.ReachUnknown) || but != nil && but(t.Subject) {
				continue
			}
			return fmt.Sprintf("tells that %s went from %s to %s %v after that%s", t.Subject, t.From, t.To, t.At.Sub(s.since).Round(time.Millisecond), because(t.Reason))
		}
		return ""
	})
}

func makeWell(arguments, *Setup) (condition, error) {
	return condition{needs: lookStatus, problem: func(s *sight) string { return strings.Join(s.unwell, "; ") }}, nil
}

func parseText(s string) (string, error) {
	text, err := strconv.Unquote(s)
	if err != nil || text == "" {
		return "", fmt.Errorf("%s must be a text in double quotes", s)
	}
	return text, nil
}

func makeNodeSays(a arguments, s *Setup) (condition, error) {
	node, err := s.node(a[0])
	if err != nil {
		return condition{}, err
	}
	text, err := parseText(a[1])
	return condition{needs: lookStatus, problem: func(s *sight) string {
		if said := strings.Join(s.problems[node], "; "); !strings.Contains(said, text) {
			return fmt.Sprintf("%v says %q", node, said)
		}
		return ""
	}}, err
}

func makeSomeSays(want bool) func(arguments, *Setup) (condition, error) {
	return func(a arguments, _ *Setup) (condition, error) {
		text, err := parseText(a[0])
		return condition{needs: lookStatus, problem: func(s *sight) string {
			for _, node := range sortedNodes(s.problems) {
				said := strings.Join(s.problems[node], "; ")
				if !strings.Contains(said, text) {
					continue
				}
				if want {
					return ""
				}
				return fmt.Sprintf("%v says %q", node, said)
			}
			if want {
				return fmt.Sprintf("the nodes say %q", s.unwell)
			}
			return ""
		}}, err
	}
}

func makeNoFailures(arguments, *Setup) (condition, error) {
	return aboutTraffic(func(_ *sight, cluster string, r *LoadResult) string {
		if r.Failed > 0 {
			return fmt.Sprintf("%d of %d from %s failed: %s", r.Failed, r.Requests, cluster, answers(r.Errors))
		}
		return ""
	})
}

// beforeFault is how long before a fault a request may have been sent that fails by it: a request takes so long.
const beforeFault = 250 * time.Millisecond

func makeFailuresOnly(a arguments, _ *Setup) (condition, error) {
	d, err := parseDuration(a[0])
	if err != nil {
		return condition{}, err
	}
	return aboutTraffic(func(s *sight, cluster string, r *LoadResult) string {
		for _, f := range r.Failures {
			if !s.excused(f.Sent, d) {
				return fmt.Sprintf("one from %s failed (%s) that was sent at %s, %s", cluster, f.Error, f.Sent.Format("15:04:05.000"), s.sinceFault(f.Sent))
			}
		}
		return ""
	})
}

// excused tells whether a fault explains that a request which was sent at a time failed.
func (s *sight) excused(sent time.Time, after time.Duration) bool {
	return slices.ContainsFunc(s.faults, func(f interval) bool {
		return sent.After(f.from.Add(-beforeFault)) && sent.Before(f.to.Add(after))
	})
}

func (s *sight) sinceFault(sent time.Time) string {
	for _, f := range slices.Backward(s.faults) {
		if f.from.Before(sent) {
			return fmt.Sprintf("%v after a fault", sent.Sub(f.to).Round(time.Millisecond))
		}
	}
	return "before any fault"
}

func makeAnswered(a arguments, s *Setup) (condition, error) {
	if err := cmp.Or(s.checkServer(a[0]), s.checkCluster(a[1])); err != nil {
		return condition{}, err
	}
	return condition{needs: lookTraffic, problem: func(s *sight) string {
		if r := s.traffic[a[1]]; r == nil {
			return fmt.Sprintf("no traffic from %s has ended", a[1])
		} else if r.Servers[a[0]] == 0 {
			return fmt.Sprintf("%d requests were answered by %s", r.Requests-r.Failed, answers(r.Servers))
		}
		return ""
	}}, nil
}

// aboutTraffic is a condition on the traffic of each cluster that has ended.
func aboutTraffic(problem func(*sight, string, *LoadResult) string) (condition, error) {
	return condition{needs: lookTraffic, problem: func(s *sight) string {
		if len(s.traffic) == 0 {
			return "no traffic has ended"
		}
		for cluster, r := range s.traffic {
			if p := problem(s, cluster, r); p != "" {
				return p
			}
		}
		return ""
	}}, nil
}

func distinct(list []netip.AddrPort) []netip.AddrPort {
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, netip.AddrPort.Compare)
	return slices.Compact(sorted)
}
