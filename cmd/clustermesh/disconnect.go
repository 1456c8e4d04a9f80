package main

import (
	"fmt"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

func newDisconnectCommand(e *env) *cobra.Command {
	var force bool
	f := formatTable
	cmd := &cobra.Command{
		Use:   "disconnect NAME",
		Short: "End the connection with a cluster, whether it can be reached or not",
		Long: `End the connection with a cluster. Its access to this cluster's store is taken away, and nothing of it stays in force here: no
address, service or route. It takes less than a second, also if the other cluster is gone for good; that one, if it is not, shows
this one as "left" as soon as it knows. This cluster's own store is needed for it.

That there is no such peer is no failure, so it can be done again.

Exit codes:
  0  the cluster is no peer now
  1  it failed; the error says at what
  2  wrong usage, or no agent there`,
		Example: `  clustermesh disconnect west
  clustermesh disconnect west --force --node east/node1`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completePeers(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			r, err := c.Disconnect(cmd.Context(), args[0], force)
			if err != nil {
				return err
			}
			if f != formatTable {
				return encode(e.out, f, r, false)
			}
			fmt.Fprintln(e.out, printable(disconnectText(args[0], r)))
			return nil
		},
	}
	outputFlag(cmd, &f)
	cmd.Flags().BoolVar(&force, "force", false, "don't even try to tell the other cluster")
	return cmd
}

// disconnectText says what came of it.
func disconnectText(name string, r *api.DisconnectResult) string {
	if !r.Known {
		return fmt.Sprintf("there is no peer %s: nothing to do", name)
	}
	text := fmt.Sprintf("disconnected from %s in %.2fs; ", name, r.Took/1000)
	switch {
	case r.Told:
		return text + "it has been told"
	case r.Reason != "":
		return text + fmt.Sprintf("it could not be told (%s): it finds out when it asks next", r.Reason)
	}
	return text + "it was not told: it finds out when it asks next"
}
