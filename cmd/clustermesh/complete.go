package main

import (
	"context"
	"time"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

// completeTimeout bounds what a shell waits for after a tab.
const completeTimeout = 500 * time.Millisecond

// completion is what cobra asks for the words that could come next. That there are none is no error: a shell shows nothing then.
type completion func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective)

func (e *env) completeNodes(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	dir, _ := cmd.Flags().GetString("dir")
	return e.testbed.Nodes(dir), cobra.ShellCompDirectiveNoFileComp
}

// completeFirst completes the first argument with what the agent says, which ask makes words of.
func completeFirst(e *env, ask func(context.Context, *api.Client) ([]cobra.Completion, error)) completion {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		c, err := e.client(cmd)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
		defer cancel()
		words, err := ask(ctx, c)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return words, cobra.ShellCompDirectiveNoFileComp
	}
}

// completePeers completes the name of a peer.
func (e *env) completePeers() completion {
	return completeFirst(e, func(ctx context.Context, c *api.Client) (words []cobra.Completion, err error) {
		peers, err := c.Peers(ctx)
		for _, p := range peers {
			words = append(words, cobra.CompletionWithDesc(printable(p.Name), printable(p.State)))
		}
		return words, err
	})
}

// completeTokens completes the ID of a token.
func (e *env) completeTokens() completion {
	return completeFirst(e, func(ctx context.Context, c *api.Client) (words []cobra.Completion, err error) {
		tokens, err := c.Tokens(ctx)
		for _, t := range tokens {
			words = append(words, cobra.CompletionWithDesc(printable(t.ID), printable(t.State)))
		}
		return words, err
	})
}

// completeCerts completes the name of a certificate, which may be of two words.
func (e *env) completeCerts() completion {
	return completeFirst(e, func(ctx context.Context, c *api.Client) (words []cobra.Completion, err error) {
		certs, err := c.Certs(ctx)
		for _, c := range certs {
			words = append(words, cobra.CompletionWithDesc(printable(c.Name), printable(c.State)))
		}
		return words, err
	})
}
