package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

func newStatusCommand(e *env) *cobra.Command {
	var wait time.Duration
	cmd := query[*api.Status]{
		use:   "status",
		short: "How a node is: its stores, peers, tables and data path, who else is alive, and what it refused",
		long: `How a node is: its stores, the clusters that it is connected with and how well, tables and data path, who else is alive and what
has changed in that lately, and what it refused.

With --wait it asks until all is well and every peer connected, or the time is up, and shows how it is then. Peers that have left are
not waited for.

Exit codes:
  0    all is well
  1    there are problems, listed first; or the agent could not answer
  2    wrong usage, or no agent there
  130  interrupted while waiting`,
		example: `  clustermesh status
  clustermesh status --wait 30s
  clustermesh status --node east/node1 --watch
  clustermesh status -o json | jq .stores`,
		get: func(c *api.Client, ctx context.Context) (*api.Status, error) {
			if wait > 0 {
				return e.waitWell(ctx, c, wait)
			}
			return c.Status(ctx)
		},
		watch: (*api.Client).WatchStatus,
		print: printStatus,
		verdict: func(s *api.Status) error {
			switch lacking := lacks(s); {
			case wait > 0 && len(lacking) > 0:
				return fmt.Errorf("not well within %s: %s", duration(wait), strings.Join(lacking, "; "))
			case !s.OK:
				return &exitError{code: exitFailed}
			}
			return nil
		},
	}.command(e)
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait so long for all to be well and every peer connected")
	cmd.MarkFlagsMutuallyExclusive("wait", "watch")
	return cmd
}

func printStatus(p *printer, s *api.Status) {
	verdict := p.paint(green, "ok")
	if !s.OK {
		verdict = p.paint(red, "problems")
	}
	p.printf("%s: %s\n", printable(s.Cluster+"/"+s.Node), verdict)
	for _, problem := range s.Problems {
		p.printf("  - %s\n", p.paint(red, printable(problem)))
	}
	p.printf("  cluster ID %d, address %s, pods %s\n", s.ClusterID, s.Address, s.PodCIDR)
	p.printf("  data path %s on %s, pod MTU %d, %d packets dropped\n", s.Datapath.Attach, s.Datapath.Device, s.Datapath.PodMTU, s.Datapath.Drops)
	if text := encryptionText(s.Encryption); text != "" {
		p.printf("  %s\n", text)
	}
	if text := l7Text(s.L7); text != "" {
		p.printf("  %s\n", text)
	}
	if s.Kubernetes != nil {
		p.printf("  %s\n", kubernetesText(s.Kubernetes))
	}
	if text := exporterText(p, s.Exporter); text != "" {
		p.printf("  %s\n", text)
	}
	p.printf("  version %s, up %s\n\n", printable(s.Version), p.age(s.Started))
	p.table(storeTable(s.Stores))
	p.printf("\n")
	for i := range s.Peers {
		p.printf("peer ")
		printPeer(p, &s.Peers[i])
		p.printf("\n")
	}
	if s.Gossip.Enabled {
		printMembers(p, &s.Gossip)
		p.printf("\n")
	}
	p.table(countTable(s.Tables))
	if len(s.Refusals) > 0 {
		p.printf("\n")
		p.table(refusalTable(p, s.Refusals))
	}
}

// kubernetesText says in a line how the node stands with Kubernetes.
func kubernetesText(k *api.Kubernetes) string {
	state := "connected"
	switch {
	case !k.Connected:
		state = strings.TrimSuffix("away: "+k.LastError, ": ")
	case !k.Synced:
		state = "not read in full yet"
	}
	return printable(strings.TrimSpace("Kubernetes "+k.Version) + " at " + k.Server + ", " + state)
}

// exporterText says who publishes what a cluster of Kubernetes has for others; empty without Kubernetes.
func exporterText(p *printer, e *api.Exporter) string {
	switch {
	case e == nil:
		return ""
	case e.Leader == "":
		return "services for other clusters: no node publishes them"
	case e.Self:
		return fmt.Sprintf("services for other clusters: this node publishes them, for %s now, in %d entries", p.age(e.Since), e.Keys)
	}
	return fmt.Sprintf("services for other clusters: %s publishes them, for %s now", printable(e.Leader), p.age(e.Since))
}

func storeTable(stores []api.Store) *table {
	t := newTable("STORE", "ENDPOINTS", "ENTRIES", "REFUSED", "RECONNECTS", "HEARTBEAT", "STATUS")
	for _, s := range stores {
		name := s.Cluster
		if s.Local {
			name += " (own)"
		}
		t.add(name, strings.Join(s.Endpoints, ","), s.Entries, s.Refused, s.Reconnects, heartbeat(s), storeStatus(s))
	}
	return t
}

func heartbeat(s api.Store) string {
	if s.HeartbeatAge < 0 {
		return "none"
	}
	return duration(time.Duration(s.HeartbeatAge)*time.Millisecond) + " ago"
}

func storeStatus(s api.Store) string {
	switch {
	case !s.Connected:
		return strings.TrimSuffix("away: "+s.LastError, ": ")
	case !s.Synced:
		return "syncing"
	}
	return "synced"
}

func countTable(tables map[string]api.Table) *table {
	t := newTable("TABLE", "ROWS", "PENDING", "ERRORS")
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		t.add(name, tables[name].Rows, tables[name].Pending, tables[name].Errors)
	}
	return t
}

func refusalTable(p *printer, refusals []api.Refusal) *table {
	t := newTable("REFUSED FROM", "TIMES", "LAST", "KEY", "REASON")
	for _, r := range refusals {
		t.add(r.Cluster, r.Count, p.age(r.Last)+" ago", r.Key, r.Reason)
	}
	return t
}
