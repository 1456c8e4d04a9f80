package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedFailoverCommand(e *env) *cobra.Command {
	o := testbed.FailoverOptions{}
	f := failoverFormat("text")
	cmd := &cobra.Command{
		Use:   "failover",
		Short: "Measure how soon nothing new goes to a node or cluster that has died",
		Long: `Bring up clusters with a server of one global service on every node, send new connections from every cluster, and
kill a random node (link and processes). In the kernel of every node that is left it is measured how long it takes from the kill
until none of the dead node's backends is chosen from. The node is started again, and when all is as before the next
one is killed. Whole clusters are killed likewise, after the nodes. At the end there is a histogram.

Exit codes:
  0    99 % of the kernels were in time: 2 s for a node, 5 s for a cluster, and 2 s for a cluster to be back
  1    they were not, or it failed
  2    wrong usage
  130  interrupted`,
		Example: `  clustermesh testbed failover
  clustermesh testbed failover --kills 0 --cluster-kills 20
  clustermesh testbed failover --kills 200 -o csv >failover.csv`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("dir") {
				o.Dir = testbedDir(cmd)
			}
			return e.failover(cmd, o, f)
		},
	}
	cmd.Flags().VarP(&f, "output", "o", "an account and histograms as text, all rounds as json, or every kernel's times as csv")
	cmd.Flags().IntVar(&o.Clusters, "clusters", 3, "how `many` clusters")
	cmd.Flags().IntVar(&o.Nodes, "nodes", 3, "nodes per `cluster`")
	cmd.Flags().IntVar(&o.Kills, "kills", 50, "how `many` nodes are killed")
	cmd.Flags().IntVar(&o.ClusterKills, "cluster-kills", 0, "how `many` clusters are killed")
	cmd.Flags().Float64Var(&o.Rate, "rate", 300, "new connections per `second` from every cluster")
	return cmd
}

// failoverFormat is the value of --output.
type failoverFormat string

func (f *failoverFormat) String() string { return string(*f) }
func (f *failoverFormat) Type() string   { return "text|json|csv" }
func (f *failoverFormat) Set(s string) error {
	if s != "text" && s != "json" && s != "csv" {
		return fmt.Errorf("must be text, json or csv")
	}
	*f = failoverFormat(s)
	return nil
}

func (e *env) failover(cmd *cobra.Command, o testbed.FailoverOptions, f failoverFormat) error {
	p := e.printer()
	if f == "text" {
		o.Report = func(r testbed.FailoverRound, n, of int) { printFailoverRound(p, r, n, of) }
	}
	result, err := testbed.Failover(cmd.Context(), o)
	if result != nil {
		err = errors.Join(err, printFailover(p, result, f))
	}
	switch {
	case err != nil && cmd.Context().Err() != nil:
		return &exitError{exitInterrupted, fmt.Errorf("interrupted: %w", err)}
	case err == nil && !result.OK:
		return &exitError{code: exitFailed}
	}
	return showLog(cmd, err)
}

func printFailoverRound(p *printer, r testbed.FailoverRound, n, of int) {
	verdict := fmt.Sprintf("out of every kernel after %.0f ms", longest(r.OutMS))
	if len(r.Late) > 0 {
		verdict = p.paint(red, fmt.Sprintf("still in the kernels of %v", r.Late))
	}
	p.printf("%3d/%d  %s %s: %s, back in %.0f ms; %d of %d requests failed\n", n, of, r.Kind, r.Victim, verdict, longest(r.BackMS), r.Failed, r.Requests)
}

func longest(ms map[string]float64) (most float64) {
	for _, v := range ms {
		most = max(most, v)
	}
	return most
}

func printFailover(p *printer, r *testbed.FailoverResult, f failoverFormat) error {
	switch f {
	case "json":
		return json.NewEncoder(p.w).Encode(r)
	case "csv":
		return r.WriteCSV(p.w)
	}
	printFailoverSummary(p, "node", r.Node)
	printFailoverSummary(p, "cluster", r.Cluster)
	for _, b := range r.Broken {
		p.printf("\n%s\n", p.paint(red, "NOT AS PROMISED: "+b))
	}
	if r.OK {
		p.printf("\n%s\n", p.paint(green, "as promised"))
	}
	return nil
}

func printFailoverSummary(p *printer, kind string, s testbed.FailoverSummary) {
	if s.Kills == 0 {
		return
	}
	p.printf("\n%s\n", p.paint(bold, fmt.Sprintf("From the kill of a %s until nothing new goes there, in each kernel that is left (kills: %d)", kind, s.Kills)))
	p.printf("%s", s.Out.Histogram())
	t := newTable("MS", "SAMPLES", "P50", "P90", "P99", "MAX")
	t.add("out", s.Out.Samples, s.Out.P50, s.Out.P90, s.Out.P99, s.Out.Max)
	t.add("back", s.Back.Samples, s.Back.P50, s.Back.P90, s.Back.P99, s.Back.Max)
	p.table(t)
	if s.Late > 0 {
		p.printf("never out: %d\n", s.Late)
	}
	p.printf("%d of %d requests failed; %d of them were sent when the client's kernel had nothing of the dead %s\n", s.Failed, s.Requests, s.Stray, kind)
}
