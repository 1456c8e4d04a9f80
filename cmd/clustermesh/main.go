// Command clustermesh is all of Causeway in one program: the agent that runs on every
// node, the commands that ask and change it, and a test-bed that runs whole clusters
// on one machine. main.go holds what all commands share; each command has a file of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"causeway/agent/api"
	"causeway/k8s/cni"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// Exit codes; README.md lists them.
const (
	exitOK          = 0
	exitFailed      = 1   // it failed, or status found problems
	exitNotAsked    = 2   // wrong usage, or no agent there to ask
	exitInterrupted = 130 // Ctrl-C or SIGTERM ended it early
)

// env is what commands see of the world, so that tests can run them in process.
type env struct {
	in       io.Reader
	out, err io.Writer
	terminal bool // out is a terminal
	// terminalIn and terminalErr: so are in and err. What is written to err for people is for terminals only.
	terminalIn, terminalErr bool
	now                     func() time.Time
	getenv                  func(string) string
	connect                 func(socket string) *api.Client
	testbed                 testbedSockets
}

// exitError ends the program with a code of its own. Without err, nothing is printed.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError says that the command line is wrong.
func usageError(format string, args ...any) error {
	return &exitError{exitNotAsked, fmt.Errorf(format, args...)}
}

func main() {
	if filepath.Base(os.Args[0]) == cni.Name {
		os.Exit(cniPlugin().Run()) // its arguments are in the environment
	}
	os.Exit(run(contextOfSignals(), &env{
		in:          os.Stdin,
		out:         os.Stdout,
		err:         os.Stderr,
		terminal:    term.IsTerminal(int(os.Stdout.Fd())),
		terminalIn:  term.IsTerminal(int(os.Stdin.Fd())),
		terminalErr: term.IsTerminal(int(os.Stderr.Fd())),
		now:         time.Now,
		getenv:      os.Getenv,
		connect:     api.NewClient,
		testbed:     localTestbed{},
	}, os.Args[1:]))
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, e *env, args []string) int {
	root, started := newRootCommand(e)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	code := exitCode(ctx, err, *started)
	var silent *exitError
	if err != nil && !(errors.As(err, &silent) && silent.err == nil) {
		fmt.Fprintln(e.err, "error:", clean(hideTokens(err.Error())))
	}
	return code
}

// exitCode returns what err means to the caller; started tells whether the command line was understood.
func exitCode(ctx context.Context, err error, started bool) int {
	var exit *exitError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.code
	case !started, errors.Is(err, api.ErrNoAgent):
		return exitNotAsked
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	return exitFailed
}

// clean makes an error's text safe for a terminal, whatever a manifest or a peer put into
// it. It is one line, unless it quotes the end of a log.
func clean(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i, l := range lines {
		lines[i] = printable(l)
	}
	return strings.Join(lines, "\n")
}

// newRootCommand returns the whole command tree, and what tells afterwards whether the command line was understood.
func newRootCommand(e *env) (root *cobra.Command, started *bool) {
	started = new(bool)
	cobra.EnableCommandSorting = false // the order below is that of use
	root = &cobra.Command{
		Use:   "clustermesh",
		Short: "Causeway joins clusters into one network",
		Long: `Causeway joins clusters into one network: pods reach each other across clusters,
and a service can have its backends in all of them.`,
		Example: `  clustermesh demo                          two clusters on this machine, shown and taken down
  clustermesh testbed up                    the same to play with
  clustermesh status --node east/node1      how that node is
  clustermesh token create                  to join this cluster with another one, where "clustermesh connect TOKEN" does it`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetIn(e.in)
	root.SetOut(e.out)
	root.SetErr(e.err)
	addSocketFlags(root, e)
	addGroup(root, "try", "Try it on one machine:", newDemoCommand(e), newTestbedCommand(e), newSimCommand(e))
	addGroup(root, "join", "Join clusters:",
		newTokenCommand(e), newConnectCommand(e), newPeersCommand(e), newDisconnectCommand(e), newCertsCommand(e), newTroubleshootCommand(e), newBundleCommand(e))
	addGroup(root, "ask", "Ask and change a node:",
		newStatusCommand(e), newMembersCommand(e), newDrainCommand(e), newEncryptionCommand(e), newKeyringCommand(e), newNodeCommand(e), newEndpointCommand(e), newIdentityCommand(e),
		newAddressCommand(e), newServiceCommand(e), newL7Command(e), newBPFCommand(e), newMetricsCommand(e))
	addGroup(root, "run", "Run on a node:", newAgentCommand(), newProxyCommand(), newKVStoreCommand())
	root.AddCommand(newVersionCommand(e), newWireGuardCommand(e), newCNICommand())
	markStart(root, started)
	return root, started
}

// markStart sets started when a command runs: its flags and arguments have been accepted by then.
func markStart(c *cobra.Command, started *bool) {
	if inner := c.RunE; inner != nil {
		c.RunE = func(c *cobra.Command, args []string) error {
			*started = true
			return inner(c, args)
		}
	}
	for _, sub := range c.Commands() {
		markStart(sub, started)
	}
}

func addGroup(root *cobra.Command, id, title string, commands ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: id, Title: title})
	for _, c := range commands {
		c.GroupID = id
		root.AddCommand(c)
	}
}

// family returns a command that only holds others, and refuses a name that it doesn't hold.
func family(use, short, example string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use:     use,
		Short:   short,
		Example: example,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError("unknown command %q for %q: see %s --help", args[0], c.CommandPath(), c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(commands...)
	return c
}
