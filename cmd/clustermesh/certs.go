package main

import (
	"context"
	"strings"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

// States of a certificate.
const (
	certExpiresSoon = "expires soon"
	certExpired     = "expired"
	certNotYet      = "not valid yet"
)

const certCodes = `
Exit codes:
  0  all are valid
  1  one is expired or not valid yet, or the agent could not do it
  2  wrong usage, or no agent there`

func newCertsCommand(e *env) *cobra.Command {
	show := func(use string) *cobra.Command {
		return query[[]api.Cert]{
			use:   use,
			short: "The certificates that this node lives by, and until when",
			long: `The certificates that this node lives by: that of the cluster's authority, this node's own, and those with which this cluster reads
its peers' stores. They renew themselves when a third of their life is left (RENEWS), but the authority's.
One at a peer that has expired all the same takes a new token of that peer.
` + certCodes,
			example: "  clustermesh certs\n  clustermesh certs -o json | jq -r '.[] | select(.state != \"valid\") | .name'",
			get:     (*api.Client).Certs,
			print:   printCerts,
			verdict: certsVerdict,
		}.command(e)
	}
	cmd, sub := show("certs"), show("show")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError("unknown command %q for %q: see %s --help", args[0], cmd.CommandPath(), cmd.CommandPath())
		}
		return nil
	}
	sub.Short += " (what certs alone does)"
	cmd.Example += "\n  clustermesh certs rotate"
	cmd.AddCommand(sub, newCertsRotateCommand(e), newCertsIssueCommand(e), newCertsAuthorityCommand(e))
	return cmd
}

func newCertsRotateCommand(e *env) *cobra.Command {
	var name string
	cmd := query[[]api.Cert]{
		use:   "rotate [NAME]",
		short: "Renew certificates now, without waiting for their time",
		long: `Renew certificates now, without waiting for their time: all that can be, or the one that has this NAME in certs. Nothing is interrupted.
It prints all as they are then.
` + certCodes,
		example: `  clustermesh certs rotate
  clustermesh certs rotate agent
  clustermesh certs rotate peer west`,
		get: func(c *api.Client, ctx context.Context) ([]api.Cert, error) {
			return c.RotateCerts(ctx, api.CertsRequest{Name: name})
		},
		print:   printCerts,
		verdict: certsVerdict,
	}.command(e)
	cmd.Args = cobra.MaximumNArgs(2)
	cmd.ValidArgsFunction = e.completeCerts()
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name = strings.Join(args, " ") // "peer west" is a name, quoted or not
		return run(cmd, args)
	}
	return cmd
}

func printCerts(p *printer, certs []api.Cert) {
	t := newTable("NAME", "USER", "ISSUER", "VALID UNTIL", "LEFT", "RENEWS", "STATE")
	for _, c := range certs {
		left := "nothing"
		if c.NotAfter.After(p.now) {
			left = duration(c.NotAfter.Sub(p.now))
		}
		renews := p.until(c.Renews)
		if !c.Renews.IsZero() && !c.Renews.After(p.now) {
			renews = "now"
		}
		state := c.State
		if c.Problem != "" {
			state += ": " + c.Problem
		}
		t.add(c.Name, c.User, c.Issuer, minute(c.NotAfter), left, renews, state)
	}
	p.table(t)
}

// certsVerdict fails if one can't be used.
func certsVerdict(certs []api.Cert) error {
	for _, c := range certs {
		if c.State == certExpired || c.State == certNotYet {
			return &exitError{code: exitFailed}
		}
	}
	return nil
}
