package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedKillCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kill agent|kvstore|node|cluster|wireguard|proxy|kubelet|apiserver|controller-manager|scheduler CLUSTER[/NODE]",
		Short: "Kill an agent, a store, a node or a cluster, as kill -9 or a power cut would",
		Long: `Kill an agent or a store with kill -9, or cut the power of a whole node: it loses its link to the underlay and all
of its processes, the pods' included, at once. A cluster loses all of its nodes and its store.

Where the kernel has no WireGuard, a process on each node is it. It outlives its agent, so that killing an agent touches
no packet; "wireguard" kills that process alone, and the agent starts another. So it is with "proxy", the L7 proxy of a node.

In a test-bed with Kubernetes "kubelet", "apiserver", "controller-manager" and "scheduler" are killed too; containers outlive their kubelet.`,
		Example: `  clustermesh testbed kill agent east/node1
  clustermesh testbed kill kvstore west
  clustermesh testbed kill node west/node2
  clustermesh testbed kill cluster west
  clustermesh testbed kill wireguard east/node1
  clustermesh testbed kill proxy east/node1
  clustermesh testbed kill apiserver west`,
		Args: victimArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			bed, victim, err := openVictim(cmd, args)
			if err != nil {
				return err
			}
			return bed.Kill(cmd.Context(), victim)
		},
	}
}

func newTestbedStartCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "start agent|kvstore|node|cluster|kubelet|apiserver|controller-manager|scheduler CLUSTER[/NODE]",
		Short: "Start again what was killed, and wait until it is well",
		Long: `Start an agent, a store, a node or a cluster again, and wait until it is well. A node comes back with the
commands of its pods. Of a cluster everything is started that does not run. An agent that cannot
reach a store, because that is down or cut off, only has to answer.`,
		Example: `  clustermesh testbed start agent east/node1
  clustermesh testbed start kvstore west
  clustermesh testbed start node west/node2
  clustermesh testbed start cluster west
  clustermesh testbed start apiserver west`,
		Args: victimArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			bed, victim, err := openVictim(cmd, args)
			if err != nil {
				return err
			}
			began := time.Now()
			if err := bed.Start(cmd.Context(), victim); err != nil {
				return showLog(cmd, err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%v is up (%.2fs)\n", victim, time.Since(began).Seconds())
			return nil
		},
	}
}

func victimArgs(cmd *cobra.Command, args []string) error {
	if len(args) != 2 {
		return usageError("say what and where: %s", cmd.UseLine())
	}
	return nil
}

func openVictim(cmd *cobra.Command, args []string) (*testbed.Bed, testbed.Victim, error) {
	victim, err := testbed.ParseVictim(args[0], args[1])
	if err != nil {
		return nil, victim, usageError("%w", err)
	}
	bed, err := openBed(cmd)
	return bed, victim, err
}

func newTestbedPartitionCommand() *cobra.Command {
	p := testbed.Partition{}
	cmd := &cobra.Command{
		Use:   "partition A B",
		Short: "Lose packets between two places of the underlay",
		Long: `Lose packets between A and B, each a cluster (its nodes and its store) or CLUSTER/NODE, until they are
healed. Everything else goes on. With --port only packets are lost that go to this port of the underlay or come from
it; what pods send each other travels in WireGuard, udp/51871 and, while keys are changed, udp/51872, and where that is off
in VXLAN, udp/4789.`,
		Example: `  clustermesh testbed partition east west
  clustermesh testbed partition east/node1 west --one-way      only packets from east/node1 to west
  clustermesh testbed partition east west --loss 30
  clustermesh testbed partition east/node1 east/node2 --port udp/7956     gossip over UDP alone`,
		Args: placesArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			p.A, p.B = args[0], args[1]
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			return bed.Partition(cmd.Context(), p)
		},
	}
	cmd.Flags().Var(&p.Port, "port", "lose only packets to or from this port of A or B")
	cmd.Flags().BoolVar(&p.OneWay, "one-way", false, "lose only packets from A to B")
	cmd.Flags().Float64Var(&p.Loss, "loss", 100, "how many packets are lost, in `percent`")
	return cmd
}

func placesArgs(cmd *cobra.Command, args []string) error {
	if len(args) != 2 {
		return usageError("name two places, each CLUSTER or CLUSTER/NODE: %s", cmd.UseLine())
	}
	return nil
}

func newTestbedHealCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "heal A B",
		Short: "End partitions, MTUs and other faults",
		Long: `End every partition and MTU between A and B, named as when it was made, in either order. All includes the loss on every
link and wrong clocks, whose agents are started again.`,
		Example: "  clustermesh testbed heal east west\n  clustermesh testbed heal --all",
		Args: func(cmd *cobra.Command, args []string) error {
			if all && len(args) == 0 {
				return nil
			}
			return placesArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			if all {
				return bed.HealAll(cmd.Context())
			}
			return bed.Heal(cmd.Context(), args[0], args[1])
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "end every partition and MTU, the loss on all links, and wrong clocks")
	return cmd
}

func newTestbedLossCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "loss PERCENT",
		Short: "Lose packets on every link of the underlay",
		Long: `Lose so many percent of the packets between any two nodes or stores, until it is set to 0 or healed. Each direction
loses by itself: at 5 a question and its answer both arrive in 90 % of the cases. Where a partition loses more, that counts.`,
		Example: "  clustermesh testbed loss 5\n  clustermesh testbed loss 0     none any more",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("say how many percent are lost: %s", cmd.UseLine())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			percent, err := strconv.ParseFloat(strings.TrimSuffix(args[0], "%"), 64)
			if err != nil {
				return usageError("%q is no number of percent", args[0])
			}
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			return bed.LoseEverywhere(cmd.Context(), percent)
		},
	}
}

func newTestbedMTUCommand() *cobra.Command {
	p := testbed.PathMTU{}
	cmd := &cobra.Command{
		Use:   "mtu A B SIZE",
		Short: "Lose large packets between two places of the underlay",
		Long: `Lose the packets between A and B, each a cluster (its nodes and its store) or CLUSTER/NODE, that are larger than SIZE bytes, until
they are healed. Nobody is told, as where ICMP is filtered: small packets pass, and connections that send more hang. SIZE is that of
IP packets on the underlay, which carries 1500; those of pods have 110 bytes more there than in the pod, rounded up to the
blocks of WireGuard: 1390 become 1500. Where nothing is encrypted it is 50, and on an IPv6 underlay 20 more.`,
		Example: `  clustermesh testbed mtu east west 1400
  clustermesh testbed mtu east/node1 west 1400 --one-way      only packets from east/node1 to west`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 3 {
				return usageError("name two places, each CLUSTER or CLUSTER/NODE, and a size: %s", cmd.UseLine())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			p.A, p.B = args[0], args[1]
			if p.Size, err = strconv.Atoi(args[2]); err != nil {
				return usageError("%q is no size in bytes; write it like 1400", args[2])
			}
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			return bed.SetPathMTU(cmd.Context(), p)
		},
	}
	cmd.Flags().BoolVar(&p.OneWay, "one-way", false, "lose only packets from A to B")
	return cmd
}

func newTestbedExpireCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "expire CLUSTER PEER",
		Short: "Let a cluster's certificate at a peer be one that has expired",
		Long: `Let the certificate that CLUSTER has for PEER's store and agents be one that has expired a minute ago, as if the two had been apart for
so long that it was not renewed. Connections that are open stay; joining again with a token mends it.`,
		Example: `  clustermesh testbed expire east west
  clustermesh token create --node west/node1 | clustermesh connect --node east/node1`,
		Args: placesArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			return bed.Expire(cmd.Context(), args[0], args[1])
		},
	}
}

func newTestbedClockCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "clock CLUSTER[/NODE] OFFSET",
		Short: "Let agents have a wrong clock",
		Long: `Let the agents of a cluster or a node take the time for OFFSET later than it is, or earlier, until it is set to 0 or all is
healed. They are killed and started again for it; an agent that does not run has it when it is started. Only agents
have another time: stores, pods and commands have the machine's. Flags go before CLUSTER, since OFFSET may begin with "-".`,
		Example: `  clustermesh testbed clock east +5m
  clustermesh testbed clock west/node1 -1h
  clustermesh testbed clock east 0             the right time again`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError("say whose clock, and by how much it is wrong; flags go before: %s", cmd.UseLine())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			offset, err := testbed.ParseClockOffset(args[1])
			if err != nil {
				return usageError("%w", err)
			}
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			return showLog(cmd, bed.SetClock(cmd.Context(), args[0], offset))
		},
	}
	// An offset like -1h is no flag.
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func newTestbedFlapCommand() *cobra.Command {
	o := testbed.FlapOptions{}
	cmd := &cobra.Command{
		Use:   "flap CLUSTER/NODE",
		Short: "Take a node's link to the underlay down and up again, several times",
		Long: `Take a node's link to the underlay down and up again, --times or for --duration, whichever ends first. At the
end the link is up, also after Ctrl-C; a node that is killed meanwhile ends it.`,
		Example: `  clustermesh testbed flap east/node1 --down 300ms --up 700ms --times 10
  clustermesh testbed flap east/node1 --duration 1m`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("name the node: %s", cmd.UseLine())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			node, err := testbed.ParseNode(args[0])
			if err != nil {
				return usageError("%w", err)
			}
			if o.Duration > 0 && !cmd.Flags().Changed("times") {
				o.Times = 0
			}
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			times, err := bed.Flap(cmd.Context(), node, o)
			if err != nil {
				return fmt.Errorf("after %d times down and up: %w", times, err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "the link of %v went down and up %d times, and is up\n", node, times)
			return nil
		},
	}
	cmd.Flags().DurationVar(&o.Down, "down", 300*time.Millisecond, "how long it is down each time")
	cmd.Flags().DurationVar(&o.Up, "up", 700*time.Millisecond, "how long it is up each time")
	cmd.Flags().IntVar(&o.Times, "times", 10, "how many `times` it goes down")
	cmd.Flags().DurationVar(&o.Duration, "duration", 0, "for how long it goes down, instead of so many times")
	return cmd
}
