package main

import (
	"errors"
	"fmt"
	"net"
	"os"

	"causeway/lb/l7"
	"causeway/lb/l7/exchange"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// firstInherited is the number of the first file that a process is started with besides its standard ones.
const firstInherited = 3

// newProxyCommand is what an agent starts; by hand it runs without one.
func newProxyCommand() *cobra.Command {
	cfg := l7.Config{Limits: exchange.DefaultLimits()}
	var standalone, level string
	var listeners int
	c := &cobra.Command{
		Use:   "proxy (--agent SOCKET --listeners N | --standalone FILE)",
		Short: "Balance requests of services that are annotated for L7, in a process of its own",
		Long: `Balance requests of services that are annotated for L7, until SIGTERM; what is under way is finished.

The node's agent starts it by itself as soon as a service is annotated, and replaces it when it fails.

With --agent the services come from the agent of this node, and connections through listeners that are inherited. With --standalone they are in a file,
lines of JSON as an agent sends them, and it listens at the services' own addresses: to try it, and to measure it.`,
		Example: `  clustermesh proxy --standalone services.ndjson --admin /tmp/proxy.sock
  curl --unix-socket /tmp/proxy.sock http://proxy/v1/ports`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			switch {
			case (cfg.Agent == "") == (standalone == ""):
				return usageError("say where the services come from: --agent SOCKET or --standalone FILE, and not both")
			case standalone != "" && listeners > 0:
				return usageError("with --standalone it opens its listeners itself: leave --listeners out")
			case standalone == "" && listeners < 1:
				return usageError("--listeners: want the number of listening sockets that are inherited, 1 or more")
			}
			cfg.File, cfg.Standalone = standalone, standalone != ""
			if cfg.Log, err = newLogger(level); err != nil {
				return err
			}
			if cfg.Version, err = l7.BuildID(); err != nil {
				return err
			}
			if cfg.Listeners, err = inherited(listeners); err != nil {
				return err
			}
			// Nothing that it may ever start gets more than it has.
			if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
				cfg.Log.Warn("the proxy might get privileges that it has not", "error", err)
			}
			return l7.Run(c.Context(), cfg)
		},
	}
	f := c.Flags()
	f.StringVar(&cfg.Agent, "agent", "", "the `SOCKET` of the agent that says what to do")
	f.StringVar(&cfg.Admin, "admin", "", "the `SOCKET` to answer questions at")
	f.IntVar(&listeners, "listeners", 0, "how many listening sockets are inherited, from file 3 on")
	f.StringVar(&standalone, "standalone", "", "read the services from a `FILE` and listen at their own addresses")
	f.DurationVar(&cfg.DrainTime, "drain-time", l7.DefaultDrainTime, "what connections get to end when another proxy has taken over")
	f.DurationVar(&cfg.StopTime, "stop-time", l7.DefaultStopTime, "what they get after SIGTERM")
	f.Float64Var(&cfg.AccessLog, "access-log", 0, "how many of all requests are logged, in `PERCENT`")
	f.StringVar(&cfg.OTLP, "otlp", "", "the `ENDPOINT` of an OpenTelemetry collector that gets spans, as in http://127.0.0.1:4317")
	f.Float64Var(&cfg.TracePercent, "trace-percent", 1, "how many requests without a traceparent get a span, in `PERCENT`")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return c
}

// inherited returns the listeners that the process was started with.
func inherited(n int) (listeners []net.Listener, err error) {
	for i := range n {
		unix.CloseOnExec(firstInherited + i)
		file := os.NewFile(uintptr(firstInherited+i), fmt.Sprintf("listener %d", i))
		l, e := net.FileListener(file)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("file %d, which should be a listening socket: %w", firstInherited+i, e))
			continue
		}
		listeners = append(listeners, l)
		_ = file.Close() // the listener has a copy
	}
	return listeners, err
}
