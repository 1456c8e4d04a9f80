package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

func newTroubleshootCommand(e *env) *cobra.Command {
	f := formatTable
	cmd := &cobra.Command{
		Use:   "troubleshoot [PEER]",
		Short: "Walk the connection with a peer, or with all, and name the first thing that is broken",
		Long: `Walk the connection with a peer, or with all, in both directions: name resolution, TCP, TLS and its chain, clock, etcd, gossip, tunnel,
path MTU, and from pods' side to pods' side. It asks anew, whatever status says, changes nothing, and names the first thing that
is broken, the likely cause, and what to do. Peers that have left are not looked at.

Exit codes:
  0    nothing is broken, or there is no peer
  1    something is broken, or it could not be looked at
  2    wrong usage, or no agent there
  130  interrupted`,
		Example: `  clustermesh troubleshoot
  clustermesh troubleshoot west --node east/node1
  clustermesh troubleshoot -o json | jq 'select(.verdict)'`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: e.completePeers(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			return e.troubleshoot(cmd.Context(), c, strings.Join(args, ""), f)
		},
	}
	outputFlag(cmd, &f)
	return cmd
}

func (e *env) troubleshoot(ctx context.Context, c *api.Client, peer string, f format) error {
	v := &walkView{p: e.printer(), out: e.out, f: f, live: e.terminal && f == formatTable, verdicts: map[string]bool{}}
	err := follow(ctx, func(ctx context.Context) iter.Seq2[api.TroubleshootEvent, error] {
		return c.Troubleshoot(ctx, api.TroubleshootRequest{Peer: peer})
	}, v.event, v.waiting)
	switch {
	case err != nil && ctx.Err() != nil:
		return &exitError{exitInterrupted, errors.New("interrupted")}
	case err != nil:
		return err
	case len(v.verdicts)+len(v.open) == 0 && f == formatTable:
		v.p.printf("no peers: nothing to look at\n")
	}
	return v.result()
}

// walkView shows the events of a troubleshoot.
type walkView struct {
	p       *printer
	out     io.Writer
	f       format
	live    bool // somebody watches
	heading string
	last    string
	// verdicts has each peer that was looked at, and whether nothing is broken.
	verdicts map[string]bool
	open     []string // peers without a verdict yet
}

func (v *walkView) event(e api.TroubleshootEvent) error {
	v.note(e)
	if v.f != formatTable {
		return encode(v.out, v.f, e, true)
	}
	if c := e.Check; c != nil {
		if heading := direction(c); heading != v.heading {
			v.heading = heading
			v.p.printf("%s\n", v.p.paint(bold, printable(heading)))
		}
		v.p.printf("  %s  %s\n", v.p.checkWord(c), checkText(c))
		if c.Cause != "" {
			v.p.printf("%s  likely cause: %s\n", pad("", 2+checkWidth), printable(c.Cause))
		}
	}
	if e.Verdict == "" && !e.OK {
		return nil
	}
	colour := red
	if e.OK {
		colour = green
	}
	v.p.printf("%s\n", v.p.paint(colour, printable(e.Peer+": "+verdictText(e))))
	v.heading = ""
	return nil
}

func verdictText(e api.TroubleshootEvent) string {
	if e.Verdict == "" {
		return "ok"
	}
	return e.Verdict
}

// note keeps what result needs.
func (v *walkView) note(e api.TroubleshootEvent) {
	if e.Check != nil {
		v.last = fmt.Sprintf("%s (%s)", e.Check.Name, direction(e.Check))
	}
	if e.Verdict != "" || e.OK {
		v.verdicts[e.Peer] = e.OK
		v.open = slices.DeleteFunc(v.open, func(p string) bool { return p == e.Peer })
	} else if !slices.Contains(v.open, e.Peer) {
		v.open = append(v.open, e.Peer)
	}
}

func (v *walkView) result() error {
	if len(v.open) > 0 {
		return fmt.Errorf("there is no verdict on %s: the agent ended too early; ask again", strings.Join(v.open, ", "))
	}
	if slices.Contains(slices.Collect(maps.Values(v.verdicts)), false) {
		return &exitError{code: exitFailed}
	}
	return nil
}

func (v *walkView) waiting(since time.Duration) {
	if !v.live {
		return
	}
	text := "for the first check"
	if v.last != "" {
		text = "for what comes after " + printable(v.last)
	}
	v.p.printf("  %s\n", v.p.paint(faint, fmt.Sprintf("%s  %s, %.1fs so far", pad("waiting", checkWidth), text, since.Seconds())))
}
