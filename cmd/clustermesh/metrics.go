package main

import "github.com/spf13/cobra"

func newMetricsCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "metrics",
		Short: "Print the node's metrics in Prometheus' text format",
		Long: `Print the node's metrics in Prometheus' text format. To have a Prometheus collect them, set metrics.listen in the agent's configuration: then
they are at /metrics there.`,
		Example: `  clustermesh metrics
  clustermesh metrics --node east/node1 | grep wireguard`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			return c.Metrics(cmd.Context(), e.out)
		},
	}
}
