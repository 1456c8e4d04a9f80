package main

import (
	"fmt"
	"net/netip"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedKubernetesCommand() *cobra.Command {
	cluster := func(use, short, long, example string, run func(*cobra.Command, *testbed.Bed, string, string) error) *cobra.Command {
		return &cobra.Command{
			Use: use, Short: short, Long: long, Example: example,
			Args: func(cmd *cobra.Command, args []string) error {
				if len(args) != 2 {
					return usageError("name a cluster and a file: %s", cmd.UseLine())
				}
				return nil
			},
			RunE: func(cmd *cobra.Command, args []string) error {
				bed, err := openBed(cmd)
				if err != nil {
					return err
				}
				return showLog(cmd, run(cmd, bed, args[0], args[1]))
			},
		}
	}
	snapshot := cluster("snapshot CLUSTER FILE", "Save what a cluster's Kubernetes knows",
		"Save what the Kubernetes of a cluster has in its etcd in a file, which is etcd's own form of a snapshot.",
		"  clustermesh testbed kubernetes snapshot west /tmp/west.db",
		func(cmd *cobra.Command, bed *testbed.Bed, cluster, file string) error {
			return bed.SnapshotKubernetes(cmd.Context(), cluster, file)
		})
	restore := cluster("restore CLUSTER FILE", "Wipe a cluster's Kubernetes and fill it from a snapshot",
		`Stop a cluster's API server, wipe its etcd, fill that from a snapshot, and start both again. What came after the snapshot is lost; clients
are told that what they have watched is gone, and list anew. A file that is no snapshot changes nothing.`,
		"  clustermesh testbed kubernetes restore west /tmp/west.db",
		func(cmd *cobra.Command, bed *testbed.Bed, cluster, file string) error {
			return bed.RestoreKubernetes(cmd.Context(), cluster, file)
		})
	build := &cobra.Command{
		Use:   "build",
		Short: "Build the Kubernetes of test-beds, as the first one does that needs it",
		Long: `Build the Kubernetes of test-beds from Causeway's source, if it is not in the user's cache yet, and print the program's path. It takes
some minutes, and needs Go and a checkout of Causeway around the working directory.`,
		Example: "  clustermesh testbed kubernetes build",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			program, err := testbed.BuildKubernetes(cmd.Context(), func(e testbed.Event) {
				fmt.Fprintf(cmd.ErrOrStderr(), "%6.2fs  %s\n", e.Elapsed.Seconds(), e.Text)
			})
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), program)
			}
			return err
		},
	}
	return family("kubernetes", "Build the Kubernetes of test-beds, save and restore what a cluster's knows", snapshot.Example+"\n"+restore.Example, build, snapshot, restore)
}

// newTestbedForwardCommand is what a test-bed starts to make a cluster's API server reachable, and not for people.
func newTestbedForwardCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "forward NAMESPACE ADDRESS",
		Short:   "Copy the connections of an inherited listener to an address in a network namespace",
		Example: "  clustermesh testbed forward cw-east-kvstore 172.29.1.2:6443",
		Hidden:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError("want a network namespace, and the address and port in it")
			}
			if _, err := netip.ParseAddrPort(args[1]); err != nil {
				return usageError("%q is no address with a port", args[1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return testbed.Forward(cmd.Context(), args[0], args[1])
		},
	}
}
