package main

import (
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"causeway/agent/api"
	"causeway/lb"

	"github.com/spf13/cobra"
)

func newServiceCommand(e *env) *cobra.Command {
	return family("service", "The services of the mesh", `  clustermesh service list
  clustermesh service apply -f shop.yaml`,
		newServiceListCommand(e), newServiceApplyCommand(e), newServiceDeleteCommand(e))
}

func newServiceListCommand(e *env) *cobra.Command {
	return query[[]api.Service]{
		use:     "list",
		short:   "List the services as this node sees them, merged over clusters",
		example: "  clustermesh service list --node east/node1\n  clustermesh service list --watch",
		get:     (*api.Client).Services,
		watch:   (*api.Client).WatchServices,
		print:   func(p *printer, services []api.Service) { p.table(serviceTable(services)) },
	}.command(e)
}

// serviceTable has a row for each address and port that clients connect to.
func serviceTable(services []api.Service) *table {
	t := newTable("SERVICE", "FRONTEND", "OWNER", "DECLARED BY", "AFFINITY", "L7", "BACKENDS", "STATUS")
	for _, s := range services {
		if len(s.Frontends) == 0 {
			t.add(s.Name, "", "", declarers(s), "", "", len(s.Backends), "")
		}
		for _, f := range s.Frontends {
			affinity, algorithm := balancing(s, f)
			address := hostPort(f.Address.String(), f.Port, string(f.Protocol))
			if f.Outside {
				address += " from outside"
			}
			t.add(s.Name, address, f.Cluster, declarers(s), affinity, algorithm,
				backendCounts(s.Backends, f.Target), rowStatus(worst(f, s.Backends)))
		}
	}
	return t
}

// balancing returns a frontend's affinity, and its algorithm if it is balanced at L7, which may have another affinity than L4 can.
func balancing(s api.Service, f api.Frontend) (lb.Affinity, lb.L7Algorithm) {
	i := slices.IndexFunc(s.Routes, func(r lb.Route) bool { return r.Port == f.Target })
	if i < 0 || !f.L7 {
		return f.Affinity, ""
	}
	return s.Routes[i].Options.Affinity, s.Routes[i].Options.Algorithm
}

// declarers names the clusters that declare s, and whether each does for itself only.
func declarers(s api.Service) string {
	var parts []string
	for _, d := range s.Declared {
		if d.Global {
			parts = append(parts, d.Cluster+" (global)")
		} else {
			parts = append(parts, d.Cluster)
		}
	}
	return strings.Join(parts, ", ")
}

// backendCounts counts the backends of one port by cluster, "east 2, west 2".
func backendCounts(backends []api.Backend, port lb.PortKey) string {
	count := map[string]int{}
	for _, b := range backends {
		if b.Port == port {
			count[b.Cluster]++
		}
	}
	var parts []string
	for _, cluster := range slices.Sorted(maps.Keys(count)) {
		parts = append(parts, fmt.Sprintf("%s %d", cluster, count[cluster]))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

// worst returns the frontend's status, or that of the first of its backends that is not done.
func worst(f api.Frontend, backends []api.Backend) api.RowStatus {
	status := f.Status
	for _, b := range backends {
		if status.Error == "" && b.Port == f.Target && b.Status.Kind != f.Status.Kind {
			status = b.Status
		}
	}
	return status
}

func newServiceApplyCommand(e *env) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Declare the services of a file of Kubernetes manifests in this node's cluster",
		Long: `Declare the services of a file of Kubernetes manifests in this node's cluster: all, or none if one is refused.

The selector picks endpoints of this cluster. Given clusterIPs are honoured, else one is allocated, or one of IPv4 and one of IPv6 if
ipFamilyPolicy is PreferDualStack or RequireDualStack. Annotations:
  service.cilium.io/global: "true"         merge with the service of the same name of other clusters
  service.cilium.io/shared: "false"        keep this cluster's backends from the others
  service.cilium.io/affinity: none|local|remote    whose backends are preferred
  service.cilium.io/lb-l7: enabled         balance requests instead of connections; docs/formats.md has what more can be said of that`,
		Example: `  clustermesh service apply -f shop.yaml
  clustermesh service apply --node east/node1 -f - < shop.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			manifests, err := e.readFile(file)
			if err != nil {
				return err
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			results, err := c.ApplyServices(cmd.Context(), manifests)
			if err != nil {
				return err
			}
			for _, r := range results {
				fmt.Fprintf(e.out, "service %s %s%s\n", r.Service, r.Action, at(r.ClusterIPs))
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&file, "filename", "f", "", "the `FILE` to read; - is stdin")
	return cmd
}

// readFile reads what -f names.
func (e *env) readFile(name string) ([]byte, error) {
	switch name {
	case "":
		return nil, usageError("no manifest given: name a file with -f FILE, or -f - for stdin")
	case "-":
		b, err := io.ReadAll(e.in)
		if err != nil {
			return nil, fmt.Errorf("reading stdin: %w", err)
		}
		return b, nil
	}
	return os.ReadFile(name)
}

func at(ips []string) string {
	if len(ips) == 0 {
		return ""
	}
	return " at " + strings.Join(ips, ", ")
}

func newServiceDeleteCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "delete NAMESPACE/NAME",
		Short:   "Withdraw this cluster's declaration of a service",
		Long:    "Withdraw this cluster's declaration of a service. Where others declare it too, it lives on with theirs.",
		Example: "  clustermesh service delete default/shop --node east/node1",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			namespace, name, ok := strings.Cut(args[0], "/")
			if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
				return usageError("%q is not a service's name: write NAMESPACE/NAME, such as default/%s", args[0], args[0])
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.DeleteService(cmd.Context(), namespace, name); err != nil {
				return err
			}
			fmt.Fprintf(e.out, "service %s/%s deleted\n", namespace, name)
			return nil
		},
	}
}

func hostPort(host string, port uint16, protocol string) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port))) + "/" + protocol
}
