package main

import (
	"fmt"
	"time"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedKillCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "kill agent|kvstore|node|cluster CLUSTER[/NODE]",
		Short: "Kill an agent, a store, a node or a cluster, as kill -9 or a power cut would",
		Long: `Kill an agent or a store with kill -9, or cut the power of a whole node: it loses its link to the underlay and all
of its processes, the pods' included, at once. A cluster loses all of its nodes and its store.`,
		Example: `  clustermesh testbed kill agent east/node1
  clustermesh testbed kill kvstore west
  clustermesh testbed kill node west/node2
  clustermesh testbed kill cluster west`,
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
		Use:   "start agent|kvstore|node|cluster CLUSTER[/NODE]",
		Short: "Start again what was killed, and wait until it is well",
		Long: `Start an agent, a store, a node or a cluster again, and wait until it is well. A node comes back with the
commands of its pods. Of a cluster everything is started that does not run. An agent that cannot
reach a store, because that is down or cut off, only has to answer.`,
		Example: `  clustermesh testbed start agent east/node1
  clustermesh testbed start kvstore west
  clustermesh testbed start node west/node2
  clustermesh testbed start cluster west`,
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
healed. Everything else goes on.`,
		Example: `  clustermesh testbed partition east west
  clustermesh testbed partition east/node1 west --one-way      only packets from east/node1 to west
  clustermesh testbed partition east west --loss 30`,
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
		Use:     "heal A B",
		Short:   "End a partition",
		Long:    "End the partition between A and B, named as when it was made, in either order.",
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
	cmd.Flags().BoolVar(&all, "all", false, "end every partition")
	return cmd
}
