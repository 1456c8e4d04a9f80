package main

import (
	"cmp"
	"fmt"
	"strings"
	"time"

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

func newDrainCommand(e *env) *cobra.Command {
	var undo bool
	cmd := &cobra.Command{
		Use:   "drain",
		Short: "Take this node's backends out of service everywhere, before it goes",
		Long: `Take this node's backends out of service in the whole mesh, before the node is stopped or worked on: they get no new
connections from anywhere, and keep those that they have. Pods, addresses and the agent stay. It lasts until it is
undone, also over restarts of the agent.

A service whose backends are all drained or dead keeps them in service.

To stop an agent for an upgrade needs no drain: it takes nothing out of service.`,
		Example: `  clustermesh drain --node east/node1
  clustermesh drain --undo --node east/node1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			began := time.Now()
			call, done := c.Drain, "out of service"
			if undo {
				call, done = c.Undrain, "back in service"
			}
			r, err := call(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintf(e.out, "%d backends of this node are %s; %d nodes have acknowledged it in %.2fs, the others get it by gossip\n", r.Backends, done, r.Told, time.Since(began).Seconds())
			if !undo {
				fmt.Fprintln(e.out, "connections that exist stay; take the node back with: clustermesh drain --undo")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&undo, "undo", false, "take them back into service")
	return cmd
}

func newKeyringCommand(e *env) *cobra.Command {
	cmd := family("keyring", "The keys that gossip is encrypted with", `  clustermesh keyring list
  clustermesh keyring add                     a new key, accepted by all nodes
  clustermesh keyring use 1f0c2a9e            all nodes encrypt with it
  clustermesh keyring remove 41d75f0c         and forget the old one`,
		keyringCommand(e, "list", "List the keys by their fingerprints, and how many nodes have them", 0),
		keyringAddCommand(e),
		keyringCommand(e, "use", "Have all nodes encrypt with a key that all of them have", 1),
		keyringCommand(e, "remove", "Have all nodes forget a key that none encrypts with any more", 1))
	cmd.Long = `The keys that gossip is encrypted with, in the whole mesh. To change them without interruption: add a new one, use it
once all nodes have it, remove the old one once none uses it; each step refuses to be too early. Keys have names,
their fingerprints, and are never shown.`
	return cmd
}

func keyringCommand(e *env, action, short string, args int) *cobra.Command {
	use, example := action, "  clustermesh keyring "+action
	if args > 0 {
		use, example = action+" FINGERPRINT", example+" 1f0c2a9e"
	}
	cmd := &cobra.Command{Use: use, Short: short, Example: example, Args: cobra.ExactArgs(args)}
	return withKeyring(e, cmd, func(cmd *cobra.Command, args []string) (api.KeyringRequest, error) {
		return api.KeyringRequest{Action: action, Fingerprint: strings.Join(args, "")}, nil
	})
}

func keyringAddCommand(e *env) *cobra.Command {
	var given bool
	cmd := &cobra.Command{
		Use:   "add",
		Short: "Have all nodes accept a new key too",
		Long:  "Have all nodes accept what is encrypted with a new key too. It is made by the agent, or read from standard input.",
		Example: `  clustermesh keyring add
  head -c 32 /dev/urandom | base64 | clustermesh keyring add --stdin`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().BoolVar(&given, "stdin", false, "read the key, base64 of 32 bytes, from standard input")
	return withKeyring(e, cmd, func(*cobra.Command, []string) (api.KeyringRequest, error) {
		req := api.KeyringRequest{Action: "add"}
		if given {
			if _, err := fmt.Fscan(e.in, &req.Key); err != nil {
				return req, fmt.Errorf("reading the key from standard input: %w", err)
			}
		}
		return req, nil
	})
}

// withKeyring gives a command what all of the keyring's have: -o, and the ring as it is then.
func withKeyring(e *env, cmd *cobra.Command, request func(*cobra.Command, []string) (api.KeyringRequest, error)) *cobra.Command {
	f := formatTable
	cmd.Flags().VarP(&f, "output", "o", "how to print it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req, err := request(cmd, args)
		if err != nil {
			return err
		}
		c, err := e.client(cmd)
		if err != nil {
			return err
		}
		defer c.Close()
		ring, err := c.Keyring(cmd.Context(), req)
		if err != nil {
			return err
		}
		if f != formatTable {
			return encode(e.out, f, ring, false)
		}
		t := newTable("KEY", "HELD BY", "USED BY", "STATUS")
		for _, k := range ring.Keys {
			status := "accepted"
			if k.Primary {
				status = "encrypts"
			}
			t.add(k.Fingerprint, fmt.Sprintf("%d of %d", k.Held, k.Alive), fmt.Sprintf("%d of %d", k.Used, k.Alive), status)
		}
		e.printer().table(t)
		return nil
	}
	return cmd
}
