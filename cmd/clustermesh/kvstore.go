package main

import (
	"fmt"
	"net"
	"net/netip"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"causeway/clustermesh/peering"
	"causeway/identity/pki"
	"causeway/k8s"
	"causeway/kvstore"

	"github.com/spf13/cobra"
)

// newKVStoreCommand returns "clustermesh kvstore", which runs a cluster's store until it is told to stop.
func newKVStoreCommand() *cobra.Command {
	var cfg kvstore.ServerConfig
	var certs storeCerts
	var members, podsOf string
	cmd := &cobra.Command{
		Use:   "kvstore",
		Short: "Run a cluster's store: an etcd server",
		Long: `Run a cluster's store: an etcd server, the only one for test-beds, demos and small clusters, or with --initial-cluster one of several, as
"clustermesh install" runs them. Who has an etcd may bring it, and "clustermesh kvstore init" makes it ready.

Clients are served over TLS only, and must show a certificate of the cluster's authority. With --pki the
first start makes the authority and all certificates in a directory:

  ca.crt ca.key          the authority; the key stays here, and in the store for the cluster's agents
  server.crt server.key  the store's
  agent.crt agent.key    the agents': bring them to every node, with ca.crt

They are renewed before they expire, as long as the store runs; agents renew what was brought to their nodes by themselves. Who has no user in the
store may do nothing, whatever certificate it has: the agents have one, and clusters that are connected.

One line is printed once the store is ready; SIGINT or SIGTERM stop it. Agents don't need the
store to go on with what they know, and find it again when it is back.`,
		Example: `  # The store of cluster east, and its certificates
  clustermesh kvstore --data-dir /var/lib/causeway/kvstore --listen-client 172.29.1.2:2379 \
      --pki /etc/causeway/pki --cluster east

  # With certificates that somebody else makes; then see: clustermesh kvstore init --help
  clustermesh kvstore --data-dir /var/lib/causeway/kvstore --listen-client 172.29.1.2:2379 \
      --ca ca.crt --cert kvstore.crt --key kvstore.key

  # The first of three members; ca.crt and ca.key are in the directory of each
  clustermesh kvstore --data-dir /var/lib/causeway/kvstore --listen-client 172.29.1.2:2379 --pki /etc/causeway/pki --cluster east \
      --name a --listen-peer 172.29.1.2:2380 --initial-cluster a=172.29.1.2:2380,b=172.29.1.3:2380,c=172.29.1.4:2380 --initial-cluster-token east-1

  # A throw-away one, as fast as memory
  clustermesh kvstore --data-dir /tmp/kvstore --listen-client 127.0.0.1:2379 \
      --pki /tmp/pki --cluster east --unsafe-no-fsync

  # Look into it with etcd's own tool
  etcdctl --endpoints https://172.29.1.2:2379 --cacert ca.crt --cert agent.crt --key agent.key \
      get --prefix causeway/v1/`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			cfg.LogOutput = cmd.ErrOrStderr()
			for _, address := range []*string{&cfg.ListenClient, &cfg.Members.ListenPeer} {
				*address = withBrackets(*address)
			}
			if podsOf != "" {
				if err := resolvePodsOf(podsOf); err != nil {
					return err
				}
			}
			if members != "" {
				var err error
				if cfg.Members.Initial, err = kvstore.ParseMembers(members); err != nil {
					return usageError("--initial-cluster: %v", err)
				}
			}
			cfg.Limited = func(user string) bool { _, peer := pki.ClusterOf(user); return peer }
			ready := func(addr net.Addr) {
				fmt.Fprintf(cmd.OutOrStdout(), "kvstore: ready, serving %s from %s\n", addr, cfg.DataDir)
			}
			if certs.dir == "" {
				cfg.Ready = ready
				return kvstore.Serve(ctx, cfg)
			}
			certs.now, certs.log = time.Now, cmd.ErrOrStderr()
			return certs.serve(ctx, cfg, ready)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&cfg.DataDir, "data-dir", "", "directory of the data, made if missing (required)")
	flags.StringVar(&cfg.ListenClient, "listen-client", "", "`host:port` to serve clients at (required)")
	flags.StringVar(&cfg.AdvertiseClient, "advertise-client", "", "`host:port` that clients are told of (default: that of --listen-client)")
	flags.StringVar(&certs.dir, "pki", "", "`directory` of the certificates, which are made there and renewed; instead of --ca, --cert and --key")
	flags.StringVar(&certs.cluster, "cluster", "", "`name` of the cluster, for --pki")
	flags.StringSliceVar(&certs.hosts, "hosts", nil, "`names` or addresses that clients and members reach it at, besides those that are listened at and advertised, for --pki")
	flags.StringVar(&cfg.Members.ListenPeer, "listen-peer", "", "`host:port` to serve the other members at")
	flags.StringVar(&members, "initial-cluster", "", "all members, this one too: `NAME=host:port,…`; it counts for a new data directory only")
	flags.StringVar(&cfg.Members.Token, "initial-cluster-token", "", "a `text` that these members share with no others; it counts for a new data directory only")
	flags.StringVar(&podsOf, "resolve-pods-of", "", "`SERVICE.NAMESPACE`: in a pod, ask the API server for names of that Service's pods, which members have, as cluster DNS may need the network first")
	flags.StringVar(&cfg.ListenHealth, "listen-health", "", "`host:port` to answer GET /livez, /readyz and /metrics at, to everybody: on the loopback (default: none)")
	flags.StringVar(&cfg.CAFile, "ca", "", "PEM `file` of the authority whose certificates clients must show")
	flags.StringVar(&cfg.CertFile, "cert", "", "PEM `file` of the server's certificate, for the host of --listen-client")
	flags.StringVar(&cfg.KeyFile, "key", "", "PEM `file` of the key of --cert")
	flags.StringVar(&cfg.Name, "name", "kvstore", "name of the member, one of --initial-cluster's")
	flags.StringVar(&cfg.LogLevel, "log-level", "warn", "level of etcd's log on stderr: debug, info, warn or error")
	flags.BoolVar(&cfg.UnsafeNoFsync, "unsafe-no-fsync", false,
		"don't wait for the disk: much faster writes, which survive the death of the process\n"+
			"(kill -9 included) but may be lost or damaged by a power cut or a crash of the machine")
	require(cmd, "data-dir", "listen-client")
	cmd.MarkFlagsRequiredTogether("pki", "cluster")
	cmd.MarkFlagsRequiredTogether("ca", "cert", "key")
	cmd.MarkFlagsMutuallyExclusive("pki", "ca")
	cmd.MarkFlagsOneRequired("pki", "ca")
	cmd.AddCommand(newKVStoreInitCommand())
	return cmd
}

// withBrackets writes an IPv6 address before a port as it has to be: a pod knows its own without.
func withBrackets(address string) string {
	if end := strings.LastIndexByte(address, ':'); end >= 0 {
		if host, err := netip.ParseAddr(address[:end]); err == nil && host.Is6() {
			return net.JoinHostPort(host.String(), address[end+1:])
		}
	}
	return address
}

// resolvePodsOf has the whole process find the pods of a headless Service: etcd takes no resolver of its own.
func resolvePodsOf(of string) error {
	service, namespace, ok := strings.Cut(of, ".")
	if !ok {
		return usageError("--resolve-pods-of %q: want SERVICE.NAMESPACE", of)
	}
	rest, err := k8s.RESTConfig("", "", true)
	if err != nil {
		return err
	}
	resolver, err := k8s.PodResolver(rest, service, namespace)
	if err != nil {
		return err
	}
	net.DefaultResolver = resolver
	return nil
}

// newKVStoreInitCommand returns "clustermesh kvstore init", which makes an etcd ready that somebody else runs.
func newKVStoreInitCommand() *cobra.Command {
	var endpoints []string
	var caFile, keyFile string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make an etcd ready that runs already",
		Long: `Make an etcd ready that runs already, once, for a cluster: it gets the user that the agents are, refuses everybody without a user from then on,
and gets the cluster's authority, with which the agents let other clusters in.

The etcd must take certificates of that authority from its clients, as their only proof of who they are (etcd's --client-cert-auth and
--trusted-ca-file), and show one of it itself, for the names or addresses that nodes of all clusters reach it at. That of the agents is for clients, with
the common name "agent". The etcd should be Causeway's alone. To do it again changes nothing.`,
		Example: `  clustermesh kvstore init --endpoints https://172.29.1.2:2379 --ca ca.crt --ca-key ca.key

  # Several members
  clustermesh kvstore init --endpoints https://172.29.1.2:2379,https://172.29.1.3:2379 --ca ca.crt --ca-key ca.key`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			authority, err := pki.ReadAuthority(caFile, keyFile)
			if err != nil {
				return err
			}
			root, err := peering.RootConfig(endpoints, authority, time.Now())
			if err != nil {
				return err
			}
			if err := peering.PrepareStore(ctx, root, authority); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "kvstore: ready for agents with certificates of the user %q, signed by the authority %.16s…\n", pki.UserAgent, authority.Fingerprint())
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&endpoints, "endpoints", nil, "`URLs` of the etcd's members (required)")
	flags.StringVar(&caFile, "ca", "", "PEM `file` of the cluster's authority (required)")
	flags.StringVar(&keyFile, "ca-key", "", "PEM `file` of its key, readable by nobody else (required)")
	require(cmd, "endpoints", "ca", "ca-key")
	return cmd
}

// require marks flags that must be given.
func require(cmd *cobra.Command, names ...string) {
	for _, name := range names {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // a name that isn't among the flags
		}
	}
}
