package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "What is in the test-bed, and how it is",
		Example: `  clustermesh testbed status
  clustermesh testbed status -o json | jq '.clusters[].nodes[].problems'`,
		Args: cobra.NoArgs,
	}
	return withOutput(cmd, func(cmd *cobra.Command, _ []string) (*testbed.Status, error) {
		bed, err := openBed(cmd)
		if err != nil {
			return nil, err
		}
		return bed.Status(cmd.Context())
	}, printTestbedStatus)
}

func printTestbedStatus(p *printer, s *testbed.Status) {
	verdict := p.paint(green, "ok")
	if !s.OK {
		verdict = p.paint(red, "problems")
	}
	p.printf("test-bed in %s: %s, up %s\n", s.Dir, verdict, p.age(s.Created))
	p.printf("underlay: %s; encrypted between nodes: %s\n\n", s.UnderlayFamily, modesText(s.Clusters))
	t := newTable("PLACE", "ADDRESS", "PODS", "PID", "NAMESPACE", "STATUS")
	for _, c := range s.Clusters {
		t.add(c.Name+"/kvstore", c.KVStore.Address, "", pid(c.KVStore.PID), c.KVStore.NetNS, aliveWord(c.KVStore))
		if c.Kubernetes != nil {
			t.add(c.Name+"/kubernetes", c.Kubernetes.Server, "", pid(c.Kubernetes.Parts["apiserver"].PID), c.KVStore.NetNS, kubernetesWord(c.Kubernetes))
		}
		for _, n := range c.Nodes {
			status := "ok"
			if !n.OK {
				status = "error: " + strings.Join(n.Problems, "; ")
			}
			t.add(c.Name+"/"+n.Name, n.Address, prefixText(n.PodCIDRs), pid(n.PID), n.NetNS, status)
		}
	}
	p.table(t)
	if len(s.Pods) > 0 {
		p.printf("\n")
		printPods(p, s.Pods)
	}
	printFaults(p, s)
	p.printf("\nEnter a place with: clustermesh testbed exec PLACE -- bash   (the network between them is %q)\n", "underlay")
}

func printFaults(p *printer, s *testbed.Status) {
	var faults []string
	for _, part := range s.Partitions {
		faults = append(faults, fmt.Sprintf("partition: %v (%d so far)", part, part.Lost))
	}
	for _, mtu := range s.PathMTUs {
		faults = append(faults, fmt.Sprintf("MTU: %v (%d so far)", mtu, mtu.Lost))
	}
	if s.Loss.Percent > 0 {
		faults = append(faults, fmt.Sprintf("every link loses %g %% (%d so far)", s.Loss.Percent, s.Loss.Lost))
	}
	for _, c := range s.Clusters {
		for _, n := range c.Nodes {
			if n.ClockOffset != 0 {
				faults = append(faults, fmt.Sprintf("clock of agent %s/%s: wrong by %v", c.Name, n.Name, n.ClockOffset))
			}
		}
	}
	for _, f := range faults {
		p.printf("\n%s", p.paint(yellow, f))
	}
	if len(faults) > 0 {
		p.printf("\n")
	}
}

// modesText is the mode of all clusters, or that of each if they differ.
func modesText(clusters []testbed.ClusterStatus) string {
	var parts []string
	for _, c := range clusters {
		parts = append(parts, c.Name+"="+string(c.Encryption))
	}
	for _, c := range clusters {
		if c.Encryption != clusters[0].Encryption {
			return strings.Join(parts, " ")
		}
	}
	return string(clusters[0].Encryption)
}

func prefixText(prefixes []netip.Prefix) string {
	var parts []string
	for _, p := range prefixes {
		parts = append(parts, p.String())
	}
	return strings.Join(parts, " ")
}

func pid(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func aliveWord(s testbed.ProcessStatus) string {
	if s.Alive {
		return "ok"
	}
	return "error: it does not run"
}

func kubernetesWord(k *testbed.KubernetesStatus) string {
	if len(k.Problems) > 0 {
		return "error: " + strings.Join(k.Problems, "; ")
	}
	return "ok, " + k.Version
}

func printPods(p *printer, pods []testbed.PodStatus) {
	t := newTable("POD", "NODE", "ADDRESS", "LABELS", "PID", "STATUS")
	for _, pod := range pods {
		status := pod.State
		if pod.ExitCode != nil {
			status = fmt.Sprintf("%s with %d", status, *pod.ExitCode)
		}
		var address []string // none while it is being made
		for _, a := range []netip.Addr{pod.Address, pod.Address6} {
			if a.IsValid() {
				address = append(address, a.String())
			}
		}
		t.add(pod.Cluster+"/"+pod.Name, pod.Node, strings.Join(address, " "), labelText(pod.Labels), pid(pod.PID), status)
	}
	p.table(t)
}

func labelText(labels map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		parts = append(parts, k+"="+labels[k])
	}
	return strings.Join(parts, ",")
}
