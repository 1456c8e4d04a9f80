package main

import (
	"errors"
	"log/slog"
	"os"

	"causeway/agent"

	"github.com/spf13/cobra"
)

func newAgentCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "agent --config FILE",
		Short: "Run the agent of this node",
		Long: `Run the agent of this node until SIGINT or SIGTERM. What it has put into the kernel stays
when it ends, and goes on forwarding.`,
		Example: "  clustermesh agent --config /etc/causeway/agent.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return usageError("no configuration given: name a file with --config FILE")
			}
			cfg, err := agent.LoadConfig(file)
			if err != nil {
				return err
			}
			log, err := newLogger(cfg.LogLevel)
			if err != nil {
				return err
			}
			for err = agent.ErrRenumbered; errors.Is(err, agent.ErrRenumbered) && cmd.Context().Err() == nil; {
				err = agent.Run(cmd.Context(), cfg, log)
			}
			if err != nil && cmd.Context().Err() == nil {
				return err
			}
			return nil // told to end, which is the only way that it ends well
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "the agent's configuration, a YAML `FILE`")
	return cmd
}

// newLogger writes to stderr, for whoever runs the agent to keep.
func newLogger(level string) (*slog.Logger, error) {
	var l slog.Level
	if level != "" {
		if err := l.UnmarshalText([]byte(level)); err != nil {
			return nil, usageError("logLevel %q: must be debug, info, warn or error", level)
		}
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}
