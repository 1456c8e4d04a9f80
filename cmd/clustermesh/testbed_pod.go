package main

import (
	"fmt"
	"strings"
	"time"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedPodCommand() *cobra.Command {
	return family("pod", "Pods of the test-bed: namespaces with a process, connected to a node",
		"  clustermesh testbed pod list", newPodRunCommand(), newPodDeleteCommand(), newPodListCommand())
}

func newPodRunCommand() *cobra.Command {
	var spec testbed.PodSpec
	var labels string
	cmd := &cobra.Command{
		Use:   "run CLUSTER/NODE NAME -- COMMAND…",
		Short: "Run a command as a pod, and print its address",
		Long: `Run a command as a pod: in a network namespace of its own, with one link to its node's data path.
Its labels decide which services it is a backend of. COMMAND may be any program of
this machine; "clustermesh" is the test-bed's. The command goes on after this one ends; its
output is in a log that "pod list -o json" names.

With --ready-port the pod is a backend only once something listens there, and this
command returns then. Without, it is one at once.`,
		Example: `  clustermesh testbed pod run east/node1 shop-1 --labels app=shop --ready-port 8080 -- clustermesh testbed serve --name east/shop-1
  clustermesh testbed pod run west/node2 client --labels app=client -- sleep infinity
  clustermesh testbed pod run west/node1 files --labels app=files --ready-port 8000 -- python3 -m http.server 8000`,
		Args: placesAndCommand(2, "CLUSTER/NODE and NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			node, err := testbed.ParseNode(args[0])
			if err != nil {
				return usageError("%w", err)
			}
			spec.Cluster, spec.Node, spec.Name, spec.Command = node.Cluster, node.Node, args[1], args[2:]
			if spec.Labels, err = testbed.ParseLabels(labels); err != nil {
				return usageError("--labels: %w", err)
			}
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			pod, err := bed.RunPod(cmd.Context(), spec)
			if err != nil {
				return showLog(cmd, err)
			}
			fmt.Fprintln(cmd.OutOrStdout(), pod.Address)
			return nil
		},
	}
	cmd.SetFlagErrorFunc(commandFlagError)
	cmd.Flags().StringVar(&labels, "labels", "", "`KEY=VALUE,…` of the pod")
	cmd.Flags().StringVar(&spec.Namespace, "ns", "default", "`namespace` of the pod")
	cmd.Flags().Uint16Var(&spec.ReadyPort, "ready-port", 0, "TCP `port` that the pod listens on when it is ready")
	cmd.Flags().StringArrayVar(&spec.Env, "env", nil, "`KEY=VALUE` for the command's environment; may be repeated")
	return cmd
}

func newPodDeleteCommand() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "delete CLUSTER/NAME",
		Short: "Withdraw a pod from its services, end it, and remove it",
		Long: `Delete a pod so that no request is lost: it is first withdrawn as a backend, then gets SIGTERM, and
after --grace SIGKILL. It works without the node's agent too, which then notices when it starts.`,
		Example: "  clustermesh testbed pod delete east/shop-1\n  clustermesh testbed pod delete east/shop-1 --grace 0s",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cluster, name, err := splitPod(args[0])
			if err != nil {
				return err
			}
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			warning, err := bed.DeletePod(cmd.Context(), cluster, name, grace)
			if warning != "" {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning:", warning)
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&grace, "grace", testbed.DefaultGrace, "`time` between SIGTERM and SIGKILL")
	return cmd
}

// splitPod reads CLUSTER/NAME, and CLUSTER/pod:NAME as exec has it.
func splitPod(s string) (cluster, name string, err error) {
	n, err := testbed.ParseNode(s)
	if err != nil {
		return "", "", usageError("%q is not a pod: write CLUSTER/NAME, like east/web", s)
	}
	return n.Cluster, strings.TrimPrefix(n.Node, "pod:"), nil
}

func newPodListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the pods, and whether their commands still run",
		Example: "  clustermesh testbed pod list\n  clustermesh testbed pod list -o json | jq -r '.[].log'",
		Args:    cobra.NoArgs,
	}
	return withOutput(cmd, func(cmd *cobra.Command, _ []string) ([]testbed.PodStatus, error) {
		bed, err := openBed(cmd)
		if err != nil {
			return nil, err
		}
		return bed.Pods()
	}, printPods)
}

// placesAndCommand wants n arguments, named what, and a command after them; the -- between is only
// needed if the command has flags.
func placesAndCommand(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		dash := cmd.ArgsLenAtDash()
		switch {
		case dash >= 0 && dash != n, dash < 0 && len(args) < n:
			return usageError("name %s, then the command after --: see %s --help", what, cmd.CommandPath())
		case len(args) <= n:
			return usageError("no command given: write it after --")
		}
		return nil
	}
}

// commandFlagError reminds of the -- before a command that has flags of its own.
func commandFlagError(cmd *cobra.Command, err error) error {
	return usageError("%w; the command to run, with its own flags, goes after --", err)
}
