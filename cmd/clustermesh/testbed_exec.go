package main

import (
	"errors"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

// What a shell answers for a program that it cannot run.
const (
	exitNotFound = 127
	exitNotRun   = 126
)

func newTestbedExecCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec PLACE -- COMMAND…",
		Short: "Run a command in a node, a pod, a store or on the underlay",
		Long: `Run a command at a place of the test-bed, with this terminal and with its exit status. PLACE is one of

  CLUSTER/NODE       a node; "clustermesh status" and the like ask its agent
  CLUSTER/pod:NAME   a pod; connections to services are translated as the pod's own
  CLUSTER/kvstore    a cluster's etcd
  underlay           the network between them, with a port per node

Exit codes are the command's own; 127 if there is no such command.`,
		Example: `  clustermesh testbed exec east/node1 -- clustermesh service list
  clustermesh testbed exec west/pod:client -- curl -s http://100.64.64.1/
  clustermesh testbed exec underlay -- tcpdump -n -i br0 udp port 4789
  clustermesh testbed exec east/node2 -- bash`,
		Args: placesAndCommand(1, "a place"),
		RunE: func(cmd *cobra.Command, args []string) error {
			target, err := testbed.ParseTarget(args[0])
			if err != nil {
				return usageError("%w", err)
			}
			bed, err := openBed(cmd)
			if err != nil {
				return err
			}
			err = bed.Become(target, args[1:])
			switch {
			case errors.Is(err, testbed.ErrNoCommand):
				return &exitError{exitNotFound, err}
			case errors.Is(err, testbed.ErrCannotRun):
				return &exitError{exitNotRun, err}
			}
			return err
		},
	}
	cmd.SetFlagErrorFunc(commandFlagError)
	return cmd
}
