package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"causeway/testbed"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// newTestbedCommand returns "clustermesh testbed" and all that is below it.
func newTestbedCommand(e *env) *cobra.Command {
	cmd := family("testbed", "Whole clusters on this machine, in network namespaces", `  clustermesh testbed up                                       east and west, two nodes each
  clustermesh testbed pod run east/node1 web --labels app=web -- clustermesh testbed serve --name east/web
  clustermesh testbed exec west/node1 -- clustermesh status    as on that machine
  clustermesh testbed down                                     and nothing is left`,
		newTestbedUpCommand(), newTestbedDownCommand(), newTestbedStatusCommand(),
		newTestbedPodCommand(), newTestbedExecCommand(),
		newTestbedKillCommand(), newTestbedStartCommand(), newTestbedPartitionCommand(), newTestbedLossCommand(), newTestbedMTUCommand(),
		newTestbedFlapCommand(), newTestbedClockCommand(), newTestbedExpireCommand(), newTestbedHealCommand(),
		newTestbedScenarioCommand(e), newTestbedFailoverCommand(e), newTestbedKubernetesCommand(), newTestbedForwardCommand(),
		newTestbedServeCommand(), newTestbedLoadCommand())
	cmd.Long = `Whole clusters on this machine: every node and pod is a network namespace, every cluster has its
own etcd, every node its own agent, and packets really go through VXLAN in WireGuard. Nodes and pods have IPv4 and
IPv6 addresses. It takes root, and puts nothing into the machine's own network namespace.

A test-bed stays up until it is taken down, across terminals and log-outs. Its namespaces are
seen by "ip netns list"; inside of them tcpdump, curl and the like work as on a machine.`
	cmd.PersistentFlags().String("dir", testbed.DefaultDir, "the test-bed's `directory`; another one is another test-bed")
	return cmd
}

func testbedDir(cmd *cobra.Command) string {
	dir, _ := cmd.Flags().GetString("dir")
	return dir
}

func openBed(cmd *cobra.Command) (*testbed.Bed, error) { return testbed.Open(testbedDir(cmd)) }

// testbedPrinter prints for people on the command's output.
func testbedPrinter(cmd *cobra.Command) *printer {
	colour := cmd.OutOrStdout() == os.Stdout && term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == ""
	return &printer{w: cmd.OutOrStdout(), colour: colour, now: time.Now()}
}

// withOutput gives a command -o, and prints what it returns.
func withOutput[T any](cmd *cobra.Command, get func(*cobra.Command, []string) (T, error), print func(*printer, T)) *cobra.Command {
	f := formatTable
	outputFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		v, err := get(cmd, args)
		if err != nil {
			return showLog(cmd, err)
		}
		if f == formatTable {
			print(testbedPrinter(cmd), v)
			return nil
		}
		return encode(cmd.OutOrStdout(), f, v, false)
	}
	return cmd
}

// showLog prints what a process that failed last said, ahead of the error itself.
func showLog(cmd *cobra.Command, err error) error {
	var failed *testbed.ProcessError
	if !errors.As(err, &failed) || len(failed.Tail) == 0 {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "The end of %s:\n", failed.Log)
	for _, line := range failed.Tail {
		fmt.Fprintf(cmd.ErrOrStderr(), "  %s\n", printable(line))
	}
	return err
}

func newTestbedUpCommand() *cobra.Command {
	o := testbed.Options{Underlay: testbed.UnderlayIPv4}
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Bring a test-bed up and leave it up",
		Long: `Bring a test-bed up and return when every store answers and every agent is well. It stays up
until it is taken down. If it fails or is interrupted, nothing is left; what an
earlier run left behind when it was killed is removed first.

With --kubernetes each cluster is a Kubernetes cluster: a real API server, controller-manager and scheduler beside the store, and on each node a
kubelet whose containers are plain processes, in network namespaces that the agent connects by CNI. It is built from
Causeway's source at first use, which takes some minutes once.`,
		Example: `  clustermesh testbed up
  clustermesh testbed up --clusters north,south,far --nodes 3
  clustermesh testbed up --unconnected                      to join them by hand
  clustermesh testbed up --underlay ipv6                    the network between the nodes is IPv6 alone
  clustermesh testbed up --encryption off                   to see the packets of pods on the underlay
  clustermesh testbed up --unconnected --encryption west=off    connect refuses it, and says why
  clustermesh testbed up --kubernetes                       each cluster with a real Kubernetes
  clustermesh testbed up --dir /run/mine --clusters a,b     a second one beside the first`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := testbedPrinter(cmd)
			o.Dir = testbedDir(cmd)
			o.Progress = func(e testbed.Event) { p.printf("%6.2fs  %s\n", e.Elapsed.Seconds(), e.Text) }
			bed, err := testbed.Up(cmd.Context(), o)
			if err != nil {
				return showLog(cmd, err)
			}
			printUp(p, bed, o)
			return nil
		},
	}
	cmd.Flags().StringSliceVar(&o.Clusters, "clusters", []string{"east", "west"}, "`names` of the clusters; their IDs are 1, 2, …")
	cmd.Flags().IntVar(&o.Nodes, "nodes", 2, fmt.Sprintf("nodes per `cluster`, 1 to %d", testbed.MaxNodes))
	cmd.Flags().Var((*underlayFlag)(&o.Underlay), "underlay", "address family of the network between the nodes")
	cmd.Flags().Var(encryptionsFlag{&o}, "encryption", "what is encrypted between nodes, for all clusters or for one; may be repeated")
	cmd.Flags().BoolVar(&o.Unconnected, "unconnected", false, "don't join the clusters: token create and connect do")
	cmd.Flags().BoolVar(&o.Kubernetes, "kubernetes", false, "give every cluster a real Kubernetes")
	cmd.Flags().StringVar(&o.KubernetesProgram, "kubernetes-program", "", "a `file` that testbed/kubernetes was built to, instead of building it")
	cmd.Flags().DurationVar(&o.Timeout, "timeout", 0, "how long it may take (default 30s, and 0.5s more per node; with Kubernetes 90s more; building it does not count)")
	cmd.Flags().StringVar(&o.LogLevel, "log-level", "", "of the agents: debug, info, warn or error")
	return cmd
}

func printUp(p *printer, bed *testbed.Bed, o testbed.Options) {
	first, dir := o.Clusters[0]+"/node1", ""
	if bed.Dir() != testbed.DefaultDir {
		dir = " --dir " + bed.Dir()
	}
	p.printf("\nThe test-bed is up in %s. Try:\n", bed.Dir())
	if o.Kubernetes {
		p.printf("  export KUBECONFIG=%s PATH=%s:$PATH\n", bed.Kubeconfig(), bed.BinDir())
		p.printf("  kubectl --context %s get nodes\n", o.Clusters[0])
		p.printf("  kubectl --context %s create deployment shop --replicas 3 --port 8080 --image agnhost -- agnhost netexec\n", o.Clusters[0])
	}
	if o.Unconnected && len(o.Clusters) > 1 {
		p.printf("  clustermesh token create%s --node %s | clustermesh connect%s --node %s/node1\n", dir, first, dir, o.Clusters[1])
	}
	for _, line := range []string{
		fmt.Sprintf("testbed status%s", dir),
		fmt.Sprintf("testbed pod run%s %s web --labels app=web --ready-port 8080 -- clustermesh testbed serve --name %s/web", dir, first, o.Clusters[0]),
		fmt.Sprintf("testbed exec%s %s -- clustermesh status", dir, first),
		fmt.Sprintf("testbed down%s", dir),
	} {
		p.printf("  clustermesh %s\n", line)
	}
}

func newTestbedDownCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Take a test-bed down, or remove what one left behind",
		Long: `Take a test-bed down: its processes, namespaces, BPF programs, mounts, cgroups and files. It does
the same for one that was cut off in the middle or whose files are damaged. Where there is
none it does nothing.

Exit codes:
  0  nothing is left
  1  something could not be removed; the error names it`,
		Example: "  clustermesh testbed down\n  clustermesh testbed down --dir /run/mine",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, dir := testbedPrinter(cmd), testbedDir(cmd)
			there, err := testbed.Leftovers(dir)
			if err != nil {
				return err
			}
			if len(there) == 0 {
				p.printf("There is no test-bed in %s, and nothing left of one.\n", dir)
				return nil
			}
			began := time.Now()
			if err := testbed.Clean(cmd.Context(), dir); err != nil {
				return err
			}
			left, err := testbed.Leftovers(dir)
			if err != nil {
				return err
			}
			if len(left) > 0 {
				return fmt.Errorf("not removed: %s", strings.Join(left, ", "))
			}
			p.printf("The test-bed in %s is down, nothing is left (%.2fs).\n", dir, time.Since(began).Seconds())
			return nil
		},
	}
}
