package main

import (
	"fmt"
	"regexp"
	"time"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

// tokenText matches what looks like a token, wherever it stands.
var tokenText = regexp.MustCompile(`\bcm[0-9]+\.[A-Za-z0-9_=+/.-]{16,}`)

// hideTokens takes tokens out of a text, such as an error about an argument that was one.
func hideTokens(s string) string { return tokenText.ReplaceAllString(s, "(a token)") }

func newTokenCommand(e *env) *cobra.Command {
	return family("token", "Tokens, with which another cluster joins this one", `  clustermesh token create                    in one cluster; and in the other one: clustermesh connect TOKEN
  clustermesh token list
  clustermesh token delete ejkcwktfykopk`,
		newTokenCreateCommand(e), newTokenListCommand(e), newTokenDeleteCommand(e))
}

func newTokenCreateCommand(e *env) *cobra.Command {
	var ttl time.Duration
	var isolated bool
	f := formatTable
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a token, with which one other cluster can join this one",
		Long: `Make a token, with which one other cluster can join this one: once, and until it expires, 10 s to 24 h from now. It is the only thing on standard
output; what to do with it is told on the terminal.

It holds where this cluster is reached, which cluster that must be, and a secret. Whoever has it before it is used can join:
hand it over as you would a password. After use it is worth nothing.

Exit codes:
  0  the token is on standard output
  1  it could not be made
  2  wrong usage, or no agent there`,
		Example: `  clustermesh token create
  clustermesh token create --ttl 1h --isolated
  clustermesh token create --node east/node1 | clustermesh connect --node west/node1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl < time.Second {
				return usageError("--ttl %s is too short: such as 15m", ttl)
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			t, err := c.CreateToken(cmd.Context(), api.TokenRequest{TTL: int64(ttl / time.Second), Isolated: isolated})
			if err != nil {
				return err
			}
			return e.showToken(f, t)
		},
	}
	outputFlag(cmd, &f)
	cmd.Flags().DurationVar(&ttl, "ttl", 15*time.Minute, "how long it can be used")
	cmd.Flags().BoolVar(&isolated, "isolated", false, "whoever joins with it is not introduced to this cluster's peers")
	return cmd
}

// showToken prints a token alone, so that a shell can take it as it is, and says beside it, to a person, what to do with it.
func (e *env) showToken(f format, t *api.Token) error {
	if f != formatTable {
		return encode(e.out, f, t, false)
	}
	if e.terminalErr {
		left := duration(t.Expires.Sub(e.now()).Round(time.Second))
		fmt.Fprintf(e.err, "To join %s, type in the other cluster, with the line below for TOKEN:\n  clustermesh connect TOKEN\nIt can be used once, until %s (%s from now).\n",
			printable(t.Cluster), t.Expires.Local().Format(time.TimeOnly), left)
	}
	_, err := fmt.Fprintln(e.out, printable(t.Text))
	return err
}

func newTokenListCommand(e *env) *cobra.Command {
	return query[[]api.TokenInfo]{
		use:   "list",
		short: "List the tokens that were made: which can be used, and who has used one",
		long: `List the tokens that were made, without their texts: which can be used still, and who has used one. Used and expired ones are
shown for an hour. One "for" a cluster was made since a peer has introduced that cluster.`,
		example: "  clustermesh token list\n  clustermesh token list -o json",
		get:     (*api.Client).Tokens,
		print: func(p *printer, tokens []api.TokenInfo) {
			t := newTable("ID", "STATE", "CREATED", "EXPIRES", "BY", "USED BY")
			for _, x := range tokens {
				used := x.UsedBy
				if used != "" {
					used += " " + p.until(x.UsedAt)
				}
				t.add(x.ID, tokenState(x), p.until(x.Created), p.until(x.Expires), x.Node, used)
			}
			t.status = 1
			p.table(t)
		},
	}.command(e)
}

// tokenState is a token's state with what limits it.
func tokenState(t api.TokenInfo) string {
	state := t.State
	if t.Isolated {
		state += ", isolated"
	}
	if t.For != "" {
		state += ", for " + t.For
	}
	return state
}

func newTokenDeleteCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:               "delete ID",
		Short:             "Make a token worthless",
		Long:              "Make a token worthless, by its ID: nobody can join with it any more. Who has joined already stays; see disconnect.",
		Example:           "  clustermesh token delete ejkcwktfykopk",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: e.completeTokens(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if tokenText.MatchString(args[0]) {
				return usageError("that is a token's text: name it by its ID, which token list shows")
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.DeleteToken(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(e.out, "token %s deleted: nobody can join with it any more\n", printable(args[0]))
			return nil
		},
	}
}
