package main

import (
	"fmt"
	"net"
	"os/signal"
	"syscall"

	"causeway/kvstore"

	"github.com/spf13/cobra"
)

// newKVStoreCommand returns "clustermesh kvstore", which runs a cluster's store until it is told to stop.
func newKVStoreCommand() *cobra.Command {
	var cfg kvstore.ServerConfig
	cmd := &cobra.Command{
		Use:   "kvstore",
		Short: "Run a cluster's store: an etcd server of one member",
		Long: `Run a cluster's store: an etcd server of one member, for test-beds, demos and small clusters.
Larger ones bring their own etcd.

Clients are served over TLS only, and must show a certificate of the authority in --ca. One
line is printed once they are; SIGINT or SIGTERM stop the server. Agents don't need the
store to go on with what they know, and find it again when it is back.`,
		Example: `  # The store of cluster east
  clustermesh kvstore --data-dir /var/lib/causeway/kvstore --listen-client 172.29.1.2:2379 \
      --ca ca.crt --cert kvstore.crt --key kvstore.key

  # A throw-away one, as fast as memory
  clustermesh kvstore --data-dir /tmp/kvstore --listen-client 127.0.0.1:2379 \
      --ca ca.crt --cert kvstore.crt --key kvstore.key --unsafe-no-fsync

  # Look into it with etcd's own tool
  etcdctl --endpoints https://172.29.1.2:2379 --cacert ca.crt --cert client.crt --key client.key \
      get --prefix causeway/v1/`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			cfg.LogOutput = cmd.ErrOrStderr()
			cfg.Ready = func(addr net.Addr) {
				fmt.Fprintf(cmd.OutOrStdout(), "kvstore: ready, serving %s from %s\n", addr, cfg.DataDir)
			}
			return kvstore.Serve(ctx, cfg)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&cfg.DataDir, "data-dir", "", "directory of the data, made if missing (required)")
	flags.StringVar(&cfg.ListenClient, "listen-client", "", "`host:port` to serve clients at (required)")
	flags.StringVar(&cfg.AdvertiseClient, "advertise-client", "", "`host:port` that clients are told of (default: that of --listen-client)")
	flags.StringVar(&cfg.CAFile, "ca", "", "PEM `file` of the authority whose certificates clients must show (required)")
	flags.StringVar(&cfg.CertFile, "cert", "", "PEM `file` of the server's certificate, for the host of --listen-client (required)")
	flags.StringVar(&cfg.KeyFile, "key", "", "PEM `file` of the key of --cert (required)")
	flags.StringVar(&cfg.Name, "name", "kvstore", "name of the member")
	flags.StringVar(&cfg.LogLevel, "log-level", "warn", "level of etcd's log on stderr: debug, info, warn or error")
	flags.BoolVar(&cfg.UnsafeNoFsync, "unsafe-no-fsync", false,
		"don't wait for the disk: much faster writes, which survive the death of the process\n"+
			"(kill -9 included) but may be lost or damaged by a power cut or a crash of the machine")
	for _, name := range []string{"data-dir", "listen-client", "ca", "cert", "key"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // a name that isn't among the flags above
		}
	}
	return cmd
}
