package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

// maxToken is as much of standard input as is read for a token, in bytes.
const maxToken = 64 << 10

func newConnectCommand(e *env) *cobra.Command {
	req := api.ConnectRequest{}
	var timeout time.Duration
	var kube kubeConnect
	f := formatTable
	cmd := &cobra.Command{
		Use:   "connect [TOKEN]",
		Short: "Join the cluster that a token is of",
		Long: `Join this node's cluster with the one that a token is of, in both directions, and with that one's peers. What stands in the way is
found before anything is changed, and each check is a line; it is done when a packet has made the way from pods' side to
pods' side and back, both ways. If that does not come about, what was begun is taken back; should it be a peer of that cluster that
cannot be joined, the others stay connected, and the error names it.

A connection of which a certificate has expired is replaced; any other has to be disconnected first.

With --context and --to, which name contexts of a kubeconfig, both are done in one: a token is made by an agent of the cluster --to and used by one of --context, through
both API servers. It is in no argument, and nothing shows it.

The token is read from standard input if it is "-", or if there is none and standard input is no terminal. Other users of this
machine don't see it in the list of processes then.

Exit codes:
  0    connected: packets pass in both directions
  1    refused, or it did not come about in time, or not with all; the error says why
  2    wrong usage, or no agent there
  130  interrupted; what was begun is taken back`,
		Example: `  clustermesh connect TOKEN
  clustermesh connect <token                                                              made by "clustermesh token create"
  clustermesh token create --node east/node1 | clustermesh connect --node west/node1
  ssh west1 clustermesh token create | clustermesh connect - --isolated
  clustermesh connect --context east --to west                                            clusters of Kubernetes
  clustermesh connect - -o json | jq .check                                               each event, when it happens`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout <= 0 {
				return usageError("--timeout %s: it takes a few seconds, such as 60s", timeout)
			}
			if kube.wanted() {
				return e.connectContexts(cmd, kube, args, req.Isolated, timeout, f)
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			if req.Token, err = e.tokenArgument(cmd.Context(), args); err != nil {
				return err
			}
			return e.join(cmd.Context(), c, req, timeout, f)
		},
	}
	outputFlag(cmd, &f)
	kube.add(cmd)
	cmd.Flags().BoolVar(&req.Isolated, "isolated", false, "join that cluster only, not its peers")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "give up after this, and take back what was begun")
	return cmd
}

// tokenArgument returns the token that the arguments give, or standard input.
func (e *env) tokenArgument(ctx context.Context, args []string) (string, error) {
	if len(args) == 1 && args[0] != "-" {
		return args[0], nil
	}
	if e.terminalIn {
		if len(args) == 0 {
			return "", usageError("no token given: make one in the other cluster with clustermesh token create, and give it as the argument or, after -, by standard input")
		}
		fmt.Fprint(e.err, "token: ")
	}
	type line struct {
		text string
		err  error
	}
	read := make(chan line, 1)
	go func() { // Nothing ends a read: after Ctrl-C it waits until the process has ended.
		text, err := bufio.NewReader(io.LimitReader(e.in, maxToken)).ReadString('\n')
		read <- line{strings.TrimSpace(text), err}
	}()
	select {
	case <-ctx.Done():
		return "", &exitError{exitInterrupted, errors.New("interrupted; nothing was begun")}
	case l := <-read:
		switch {
		case l.text != "":
			return l.text, nil
		case l.err != nil && l.err != io.EOF:
			return "", fmt.Errorf("reading the token from standard input: %w", l.err)
		}
		return "", usageError("no token on standard input: its first line has to be one, as clustermesh token create prints it")
	}
}

// join connects, and shows what happens.
func (e *env) join(ctx context.Context, c *api.Client, req api.ConnectRequest, timeout time.Duration, f format) error {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	v := &connectView{p: e.printer(), out: e.out, f: f, token: req.Token, live: e.terminal && f == formatTable}
	err := follow(bounded, func(ctx context.Context) iter.Seq2[api.ConnectEvent, error] { return c.Connect(ctx, req) }, v.event, v.waiting)
	switch {
	case errors.Is(err, api.ErrNoAgent):
		return err
	case err != nil && ctx.Err() != nil:
		return &exitError{exitInterrupted, errors.New("interrupted; what was begun is taken back")}
	case err != nil && bounded.Err() != nil:
		return fmt.Errorf("not connected within %s, while %s; what was begun is taken back", duration(timeout), v.doing())
	case err != nil:
		return v.hidden(err)
	case v.last.Error != "":
		return v.hidden(errors.New(v.last.Error))
	case v.last.Stage != api.StageDone:
		return errors.New("the agent did not say whether it has connected: look at its peers")
	}
	return nil
}

// connectView shows the events of a connect.
type connectView struct {
	p     *printer
	out   io.Writer
	f     format
	live  bool   // somebody watches
	token string // never to be shown, should somebody quote it
	last  api.ConnectEvent
}

func (v *connectView) text(s string) string {
	return printable(hideTokens(strings.ReplaceAll(s, v.token, "(a token)")))
}

// hidden is err without the token.
func (v *connectView) hidden(err error) error {
	if strings.Contains(err.Error(), v.token) {
		return errors.New(v.text(err.Error()))
	}
	return err
}

func (v *connectView) event(e api.ConnectEvent) error {
	v.last = e
	if v.f != formatTable {
		return encode(v.out, v.f, e, true)
	}
	if e.Check != nil {
		v.p.printf("%s  %s  %s  %s\n", v.at(e.At), v.p.checkWord(e.Check), pad(direction(e.Check), 13), checkText(e.Check))
		if e.Check.Cause != "" {
			v.p.printf("%s likely cause: %s\n", pad("", 2+6+2+checkWidth), v.text(e.Check.Cause))
		}
	}
	switch {
	case e.Stage == api.StageDone && e.Error == "":
		text := cmp.Or(e.Text, fmt.Sprintf("connected with %s in %.1fs", e.Peer, e.At/1000))
		v.p.printf("%s\n", v.p.paint(green, v.text(text)))
	case e.Text != "":
		v.p.printf("%s  %s  %s\n", v.at(e.At), pad(e.Stage, checkWidth), v.text(e.Text))
	}
	return nil
}

// at is how long ago the connect began, in seconds.
func (v *connectView) at(ms float64) string { return fmt.Sprintf("%7.2fs", ms/1000) }

func (v *connectView) waiting(since time.Duration) {
	if v.live {
		v.p.printf("%s\n", v.p.paint(faint, fmt.Sprintf("%s  %s  %s", v.at(float64(since.Milliseconds())), pad("waiting", checkWidth), v.doing())))
	}
}

// doing says what is being waited for.
func (v *connectView) doing() string {
	switch v.last.Stage {
	case "":
		return "asking the other cluster"
	case "preflight":
		return "checking both directions"
	case "verify":
		return "waiting for packets to pass in both directions"
	case "undo":
		return "taking back what was begun"
	}
	return "exchanging trust"
}
