package main

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedServeCommand() *cobra.Command {
	var name, listen string
	cmd := &cobra.Command{
		Use:   "serve --name TEXT",
		Short: "A small HTTP server that says who it is, for pods",
		Long: `Answer HTTP requests with who answered whom: the header X-Served-By and a JSON body. What comes to the same port over UDP
is sent back. It ends on SIGTERM, after the requests that it has. It needs no test-bed.`,
		Example: `  clustermesh testbed serve --name east/shop-1
  clustermesh testbed pod run east/node1 shop-1 --labels app=shop --ready-port 8080 -- clustermesh testbed serve --name east/shop-1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name == "" {
				return usageError("say who answers, with --name TEXT")
			}
			return testbed.Serve(cmd.Context(), name, listen, func(a net.Addr) {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s serves on %s\n", name, a)
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "`TEXT` that says who answers, like east/shop-1")
	cmd.Flags().StringVar(&listen, "listen", ":8080", "`address:port` to serve")
	return cmd
}

func newTestbedLoadCommand() *cobra.Command {
	o := testbed.LoadOptions{}
	cmd := &cobra.Command{
		Use:   "load --url URL",
		Short: "Send HTTP requests at a steady pace and count who answered",
		Long: `Send HTTP requests at a steady pace, whether or not earlier ones were answered, and count who answered
(X-Served-By up to the first "/"). It needs no test-bed.

Exit codes:
  0  every request was answered
  1  some failed`,
		Example: `  clustermesh testbed exec east/pod:client -- clustermesh testbed load --url http://100.64.64.1/ --duration 10s
  clustermesh testbed load --url http://10.1.1.5:8080/ --rate 50 --requests 100 -o json
  clustermesh testbed load --url 'http://[fd00:10:1:1::5]:8080/'`,
		Args: cobra.NoArgs,
	}
	f := formatTable
	cmd.Flags().VarP(&f, "output", "o", "how to print it")
	cmd.Flags().StringVar(&o.URL, "url", "", "`URL` to ask")
	cmd.Flags().Float64Var(&o.Rate, "rate", 500, "requests per `second`")
	cmd.Flags().DurationVar(&o.Duration, "duration", 5*time.Second, "how `long` to send")
	cmd.Flags().IntVar(&o.Requests, "requests", 0, "how `many` to send at most (default: as many as fit into --duration)")
	cmd.Flags().BoolVar(&o.NewConnections, "new-connections", true, "a new connection for every request, so that each is balanced anew")
	cmd.Flags().StringVar(&o.Protocol, "protocol", testbed.ProtocolHTTP1, "`protocol` to ask by: http1, http2, or grpc (unary calls on connections that last)")
	cmd.Flags().IntVar(&o.Connections, "connections", 1, "how `many` connections gRPC's calls are spread over")
	cmd.Flags().DurationVar(&o.Timeout, "timeout", 5*time.Second, "how long a request may take")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if o.Requests > 0 && !cmd.Flags().Changed("duration") {
			o.Duration = 0
		}
		result, err := testbed.Load(cmd.Context(), o)
		if err != nil {
			return usageError("%w", err)
		}
		if f == formatTable {
			printLoad(testbedPrinter(cmd), result)
		} else if err := encode(cmd.OutOrStdout(), f, result, false); err != nil {
			return err
		}
		if result.Failed > 0 {
			return &exitError{code: exitFailed}
		}
		return nil
	}
	return cmd
}

func printLoad(p *printer, r *testbed.LoadResult) {
	p.printf("%d requests in %.1fs, %d failed; p50 %.1f ms, p99 %.1f ms, longest %.1f ms\n",
		r.Requests, float64(r.ElapsedMS)/1000, r.Failed, r.Latency.P50, r.Latency.P99, r.Latency.Max)
	t := newTable("ANSWERED BY", "REQUESTS")
	for _, by := range slices.Sorted(maps.Keys(r.By)) {
		t.add(by, r.By[by])
	}
	for _, reason := range slices.Sorted(maps.Keys(r.Errors)) {
		t.add("error: "+reason, r.Errors[reason])
	}
	p.table(t)
}
