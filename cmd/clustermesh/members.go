package main

import (
	"cmp"
	"fmt"
	"strings"

	"causeway/agent/api"
	"causeway/identity"

	"github.com/spf13/cobra"
)

func newMembersCommand(e *env) *cobra.Command {
	return query[*api.Members]{
		use:   "members",
		short: "Who is alive in the mesh, as this node knows it by gossip",
		long: `Who is alive in the mesh, as this node knows it by gossip: the pools that it is in, the nodes with their state and
the reason for it, the clusters, and the last 20 changes.

States of a node:
  alive               all is well
  agent-down          its agent does not answer, its data path does: its backends stay in service
  suspect, dead       neither answers: its backends get no new connections
  left                it was drained, and its agent stopped then
States of a cluster:
  reachable
  control-plane-down  none of its agents answers, its data path does: its backends stay in service
  unreachable         nothing of it answers most of this cluster's speakers: its backends get no new connections`,
		example: `  clustermesh members
  clustermesh members --node east/node1 --watch
  clustermesh members -o json | jq '.nodes[] | select(.state != "alive")'`,
		get:   (*api.Client).Members,
		watch: (*api.Client).WatchMembers,
		print: printMembers,
	}.command(e)
}

func printMembers(p *printer, m *api.Members) {
	if !m.Enabled {
		p.printf("gossip is off: this node has no gossip.keyFile\n")
		return
	}
	p.table(poolTable(m.Pools))
	p.printf("\n")
	p.table(lifeTable(p, m))
	if len(m.Clusters) > 1 {
		p.printf("\n")
		p.table(clusterTable(p, m))
	}
	if len(m.Transitions) > 0 {
		p.printf("\n")
		p.table(transitionTable(m.Transitions))
	}
}

func poolTable(pools []api.Pool) *table {
	t := newTable("POOL", "MEMBERS", "PROBES", "HEALTH", "UDP")
	for _, pool := range pools {
		udp := "passes"
		for _, member := range pool.Members {
			if member.UDPBlocked {
				udp = "blocked to " + member.Node
			}
		}
		t.add(pool.Name, len(pool.Members), fmt.Sprintf("every %d ms, for %d ms", pool.ProbeInterval, pool.ProbeTimeout), pool.Health, udp)
	}
	return t
}

func lifeTable(p *printer, m *api.Members) *table {
	t := newTable("NODE", "ADDRESS", "ROLE", "RTT", "SINCE", "IN SERVICE", "STATE")
	for _, n := range m.Nodes {
		role := ""
		switch {
		case n.Speaker && n.Here:
			role = "speaker, here"
		case n.Speaker:
			role = "speaker"
		case n.Here:
			role = "here"
		}
		since := ""
		if !n.Since.IsZero() {
			since = p.age(n.Since) + " ago"
		}
		t.add(n.Cluster+"/"+n.Node, n.Address, role, rtt(n.RTT), since, yes(!n.Quarantined), lifeState(n))
	}
	return t
}

// lifeState is a node's state with what there is to say of it.
func lifeState(n api.NodeLiveness) string {
	state := string(n.State)
	if n.Draining && n.State != identity.NodeLeft {
		state += ", draining"
	}
	if why := cmp.Or(n.Reason, n.Suspicion); why != "" {
		state += ": " + why
	}
	return state
}

func rtt(ms float64) string {
	if ms == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f ms", ms)
}

func clusterTable(p *printer, m *api.Members) *table {
	t := newTable("CLUSTER", "SPEAKERS", "RTT", "VOTES", "SINCE", "STATE")
	for _, c := range m.Clusters {
		state := string(c.State)
		if c.Reason != "" {
			state += ": " + c.Reason
		}
		t.add(c.Cluster, strings.Join(m.Speakers[c.Cluster], ","), rtt(c.RTT), votes(c.Votes), p.age(c.Since)+" ago", state)
	}
	return t
}

// votes says how many of the own speakers can reach a cluster.
func votes(by map[string]bool) string {
	if len(by) == 0 {
		return ""
	}
	reached := 0
	for _, ok := range by {
		if ok {
			reached++
		}
	}
	return fmt.Sprintf("%d of %d", reached, len(by))
}

func transitionTable(transitions []api.Transition) *table {
	t := newTable("AT", "WHO", "FROM", "TO", "BY", "REASON")
	for _, x := range transitions {
		t.add(x.At.Local().Format("15:04:05.000"), x.Subject, x.From, x.To, x.By, x.Reason)
	}
	return t
}
