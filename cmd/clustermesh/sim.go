package main

import (
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"causeway/clustermesh/gossip"
	"causeway/clustermesh/gossip/sim"

	"github.com/spf13/cobra"
)

func newSimCommand(e *env) *cobra.Command {
	return family("sim", "Ask how it would behave, without any network", "  clustermesh sim gossip", newSimGossipCommand(e))
}

// simResult is what sim gossip prints as JSON or YAML.
type simResult struct {
	Rows []sim.Row      `json:"rows"`
	Real []sim.Measured `json:"real,omitempty"`
}

func newSimGossipCommand(e *env) *cobra.Command {
	o := sim.Defaults()
	f := formatTable
	percent := []float64{0, 1, 5}
	most := 0
	cmd := &cobra.Command{
		Use:   "gossip",
		Short: "How soon a dead node is known, what that costs, and how often it is wrong",
		Long: `Simulate deaths of nodes and of clusters, for meshes of all sizes that are given: how soon there is a verdict, and the last
node of the mesh knows it; what every node sends meanwhile and for each change; and how often one that lives is taken for
dead. It takes no network and no privileges; the defaults take about a minute.

With --real, memberlist's real members run as well, in one process and in real time, and what they did is printed beside
what the model says of them. docs/gossip.md explains the columns and what the model leaves out.

Exit codes:
  0    done
  2    wrong usage
  130  interrupted`,
		Example: `  clustermesh sim gossip
  clustermesh sim gossip --nodes 5000 --clusters 1,3 --loss 0,1 --trials 1000
  clustermesh sim gossip --nodes 5000 --clusters 1 --probe-interval 200ms --retransmit-mult 4
  clustermesh sim gossip --nodes 10,100 --clusters 1 --real 100
  clustermesh sim gossip -o json | jq '.rows[] | select(.everywhereMs.p99 > 2000)'`,
		Args: cobra.NoArgs,
	}
	flags := cmd.Flags()
	flags.VarP(&f, "output", "o", "how to print it")
	flags.IntSliceVar(&o.Nodes, "nodes", o.Nodes, "`numbers` of nodes of the whole mesh")
	flags.IntSliceVar(&o.Clusters, "clusters", o.Clusters, "`numbers` of clusters; combinations with less than 3 nodes in each are left out")
	flags.Float64SliceVar(&percent, "loss", percent, "`percentages` of packets that get lost")
	flags.IntVar(&o.Trials, "trials", o.Trials, "`number` of deaths for each combination")
	flags.Uint64Var(&o.Seed, "seed", o.Seed, "`number` that random numbers follow from: the same one gives the same result")
	flags.DurationVar(&o.RTT, "rtt", o.RTT, "round `trip` within a cluster")
	flags.DurationVar(&o.MeshRTT, "mesh-rtt", o.MeshRTT, "round `trip` between clusters")
	flags.DurationVar(&o.Cluster.ProbeInterval, "probe-interval", o.Cluster.ProbeInterval, "`time` between two probes of a member of a cluster's pool")
	flags.IntVar(&o.Cluster.SuspicionMult, "suspicion-mult", o.Cluster.SuspicionMult, "`multiplier` of how long a suspect of a cluster's pool has to refute: 1 or 2")
	flags.IntVar(&o.Cluster.RetransmitMult, "retransmit-mult", o.Cluster.RetransmitMult, "`multiplier` of how often a member of any pool sends news on")
	flags.IntVar(&most, "real", most, fmt.Sprintf("also run real members for sizes up to this `number`, at most %d", sim.MaxReal))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		o.Loss = nil
		for _, p := range percent {
			o.Loss = append(o.Loss, p/100)
		}
		o.Mesh = gossip.MeshProfile(o.MeshRTT)
		o.Mesh.RetransmitMult = o.Cluster.RetransmitMult
		// More than half of the interval is for the indirect probes; memberlist does not look whether that is left.
		o.Cluster.ProbeTimeout = min(o.Cluster.ProbeTimeout, o.Cluster.ProbeInterval*2/5)
		if most < 0 || most > sim.MaxReal {
			return usageError("--real %d: it must be 0 to %d", most, sim.MaxReal)
		}
		if err := o.Check(); err != nil {
			return usageError("%w", err)
		}
		return e.simGossip(cmd, o, most, f)
	}
	return cmd
}

func (e *env) simGossip(cmd *cobra.Command, o sim.Options, most int, f format) error {
	progress := &simProgress{w: e.err, show: e.terminal, now: e.now, began: e.now()}
	defer progress.clear()
	o.Progress = progress.rows
	var result simResult
	var err error
	if result.Rows, err = sim.Run(cmd.Context(), o); err != nil {
		return err
	}
	if most > 0 {
		progress.say("running real members …")
		if result.Real, err = sim.Compare(cmd.Context(), o, most); err != nil {
			return err
		}
	}
	progress.clear()
	if f != formatTable {
		return encode(e.out, f, result, false)
	}
	p := e.printer()
	p.table(simTable(result.Rows))
	if most > 0 {
		p.printf("\n")
		p.table(realTable(result.Real))
	}
	return nil
}

// simTable has times in seconds.
func simTable(rows []sim.Row) *table {
	t := newTable("NODES", "CLUSTERS", "LOSS", "VERDICT P50", "P99", "EVERYWHERE P50", "P99", "MISSED", "CLUSTER P99",
		"MSG/S", "B/S", "SPEAKER B/S", "B/CHANGE", "FALSE ACCUSED/H", "FALSE DEAD/DAY")
	for _, r := range rows {
		cluster := "-"
		if r.ClusterEverywhere != nil {
			cluster = seconds(r.ClusterEverywhere.P99)
		}
		t.add(r.Nodes, r.Clusters, share(r.Loss), seconds(r.Detected.P50), seconds(r.Detected.P99), seconds(r.Everywhere.P50),
			seconds(r.Everywhere.P99), share(r.Missed), cluster, tenths(r.PacketsPerSecond), whole(r.BytesPerSecond),
			whole(r.SpeakerBytesPerSecond), whole(r.BytesPerChange), rare(r.FalseAccusationsPerHour), rare(r.FalseQuarantinesPerDay))
	}
	return t
}

func realTable(rows []sim.Measured) *table {
	t := newTable("POOL", "LOSS", "ENGINE", "DEATHS", "ACCUSED P50", "P99", "BY ALL P50", "P99", "MSG/S", "B/S", "FALSE ACCUSED/H")
	for _, r := range rows {
		t.add(r.Members, share(r.Loss), r.Engine, r.Deaths, seconds(r.Accused.P50), seconds(r.Accused.P99), seconds(r.AccusedByAll.P50),
			seconds(r.AccusedByAll.P99), tenths(r.PacketsPerSecond), whole(r.BytesPerSecond), rare(r.FalseAccusationsPerHour))
	}
	return t
}

func seconds(ms float64) string { return fmt.Sprintf("%.2f s", ms/1000) }
func share(x float64) string    { return strconv.FormatFloat(100*x, 'g', 3, 64) + " %" }
func tenths(x float64) string   { return fmt.Sprintf("%.1f", x) }
func whole(x float64) string    { return fmt.Sprintf("%.0f", x) }

func rare(x float64) string {
	if x == 0 {
		return "0"
	}
	return fmt.Sprintf("%.0e", x)
}

// simProgress tells on a terminal how far a simulation is that takes longer than a second.
type simProgress struct {
	mu      sync.Mutex
	w       io.Writer
	show    bool
	now     func() time.Time
	began   time.Time
	written bool
}

func (p *simProgress) rows(done, all int) { p.say(fmt.Sprintf("%d of %d rows …", done, all)) }

func (p *simProgress) say(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.show && p.now().Sub(p.began) > time.Second {
		fmt.Fprintf(p.w, "\r\x1b[K%s", text)
		p.written = true
	}
}

// clear takes the line away again.
func (p *simProgress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.written {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.written = false
	}
}
