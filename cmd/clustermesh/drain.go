package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

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
