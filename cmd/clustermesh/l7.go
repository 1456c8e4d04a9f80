package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"causeway/agent/api"
	"causeway/lb"
	"causeway/lb/l7/state"

	"github.com/spf13/cobra"
)

func newL7Command(e *env) *cobra.Command {
	return family("l7", "What is balanced at L7, by request: services, statistics, requests as they come, and the proxy's upgrade",
		`  clustermesh l7 list --node east/node1
  clustermesh l7 tap default/shop`,
		newL7ListCommand(e), newL7StatsCommand(e), newL7TapCommand(e), newL7UpgradeCommand(e))
}

func newL7ListCommand(e *env) *cobra.Command {
	return query[*api.L7]{
		use:   "list",
		short: "List the ports that are balanced at L7: the algorithm, and the backends that are well of each cluster",
		example: `  clustermesh l7 list
  clustermesh l7 list --node east/node1 -o json | jq .fallbacks`,
		get: (*api.Client).L7,
		print: func(p *printer, l *api.L7) {
			t := newTable("SERVICE", "FAMILY", "FRONTENDS", "PROTOCOL", "ALGORITHM", "CLUSTERS", "BACKENDS", "STATUS")
			for _, r := range l.Routes {
				status, port := "pending", servingPort(l, r.Port)
				switch {
				case len(l.Proxies) == 0 || l.Proxies[0].Draining:
					status = "error: no proxy, balanced at L4"
				case port != nil:
					status = "done"
				}
				t.add(routeName(r.Port), "IPv"+familyDigit(r.Port.Family), frontendsOf(port), cmp.Or(string(r.App), "found out"), algorithmText(r.Options), preference(r.Options), backendsText(port), status)
			}
			p.table(t)
		},
	}.command(e)
}

func routeName(k lb.PortKey) string { return k.Service.String() + ":" + k.Port }

func familyDigit(f lb.Family) string {
	if f == lb.IPv6 {
		return "6"
	}
	return "4"
}

// servingPort is what the proxy in service says of a port; nil if it does not know it.
func servingPort(l *api.L7, key lb.PortKey) *state.PortStatus {
	if len(l.Proxies) == 0 || l.Proxies[0].Draining {
		return nil
	}
	for i, p := range l.Proxies[0].Ports {
		if p.Route.Port == key {
			return &l.Proxies[0].Ports[i]
		}
	}
	return nil
}

func frontendsOf(p *state.PortStatus) string {
	if p == nil {
		return ""
	}
	var all []string
	for _, f := range p.Frontends {
		all = append(all, f.String())
	}
	return strings.Join(all, ", ")
}

func algorithmText(o lb.L7Options) string {
	switch {
	case o.HashHeader != "":
		return "hash of header " + o.HashHeader
	case o.HashCookie != "":
		return "hash of cookie " + o.HashCookie
	}
	return string(o.Algorithm)
}

// preference says how clusters are chosen.
func preference(o lb.L7Options) string {
	switch {
	case len(o.Weights) > 0:
		var all []string
		for _, w := range o.Weights {
			all = append(all, fmt.Sprintf("%s=%d", w.Cluster, w.Weight))
		}
		return strings.Join(all, ",")
	case len(o.Failover) > 0:
		return strings.Join(o.Failover, " > ")
	}
	return string(o.Affinity)
}

// backendsText counts the backends of each cluster that are well, of all: "east 2/3, west 3/3".
func backendsText(p *state.PortStatus) string {
	if p == nil {
		return ""
	}
	well, all := map[string]int{}, map[string]int{}
	for _, b := range p.Backends {
		all[b.Cluster]++
		if !b.Unhealthy && !b.Ejected && !b.Quarantined {
			well[b.Cluster]++
		}
	}
	var texts []string
	for _, c := range slices.Sorted(maps.Keys(all)) {
		texts = append(texts, fmt.Sprintf("%s %d/%d", c, well[c], all[c]))
	}
	return cmp.Or(strings.Join(texts, ", "), "none")
}

func newL7StatsCommand(e *env) *cobra.Command {
	f := formatTable
	cmd := &cobra.Command{
		Use:   "stats [NAMESPACE/NAME]",
		Short: "Show how many requests there were, how they were answered, and how long that took",
		Long: `Show, for each port that is balanced at L7, how many requests there were since the proxy's start, how many are under way, how they were
answered and from which clusters, and how long that took. With a service it shows that one's ports and backends.`,
		Example: `  clustermesh l7 stats
  clustermesh l7 stats default/shop --node east/node1
  clustermesh l7 stats -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var only lb.Name
			if len(args) > 0 {
				var err error
				if only, err = serviceName(args[0]); err != nil {
					return err
				}
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			l, err := c.L7(cmd.Context())
			if err != nil {
				return err
			}
			return printL7Stats(e, l, only, f)
		},
	}
	outputFlag(cmd, &f)
	return cmd
}

// serviceName reads NAMESPACE/NAME.
func serviceName(s string) (lb.Name, error) {
	namespace, name, ok := strings.Cut(s, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return lb.Name{}, usageError("%q is not a service's name: write NAMESPACE/NAME, such as default/%s", s, strings.Trim(s, "/"))
	}
	return lb.Name{Namespace: namespace, Name: name}, nil
}

func printL7Stats(e *env, l *api.L7, only lb.Name, f format) error {
	ports := []state.PortStatus{}
	for i := range l.Proxies {
		for _, p := range l.Proxies[i].Ports {
			if only == (lb.Name{}) || p.Route.Port.Service == only {
				ports = append(ports, p)
			}
		}
	}
	if only != (lb.Name{}) && len(ports) == 0 {
		return fmt.Errorf("service %s is not balanced at L7 on this node, or no proxy runs: see clustermesh l7 list", only)
	}
	if f != formatTable {
		return encode(e.out, f, ports, false)
	}
	p := e.printer()
	t := newTable("SERVICE", "REQUESTS", "IN FLIGHT", "RETRIES", "P50", "P99", "TCP", "CLUSTERS", "CODES")
	for _, s := range ports {
		t.add(routeName(s.Route.Port), s.Stats.Requests, s.Stats.InFlight, s.Stats.Retries, latency(s.Stats.P50MS, s.Stats.Sample), latency(s.Stats.P99MS, s.Stats.Sample), s.Stats.TCP,
			counts(s.Stats.Clusters), counts(s.Stats.Codes))
	}
	p.table(t)
	if only != (lb.Name{}) {
		p.printf("\n")
		p.table(l7BackendTable(ports))
	}
	return nil
}

func l7BackendTable(ports []state.PortStatus) *table {
	t := newTable("SERVICE", "BACKEND", "NODE", "REQUESTS", "IN FLIGHT", "FAILURES", "EJECTIONS", "STATE")
	for _, s := range ports {
		for _, b := range s.Backends {
			health := "well"
			switch {
			case b.Unhealthy:
				health = strings.TrimSuffix("dead: "+b.Reason, ": ")
			case b.Ejected:
				health = "suspect: ejected"
			case b.Quarantined:
				health = "suspect: quarantined"
			}
			t.add(routeName(s.Route.Port), hostPort(b.Address.String(), b.Number, string(b.Port.Protocol)), qualified(b.Cluster, b.Node), b.Requests, b.InFlight, b.Failures, b.Ejections, health)
		}
	}
	return t
}

func latency(ms float64, sample int) string {
	if sample == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f ms", ms)
}

// counts lists counts by name: "200: 12, 503: 1".
func counts(m map[string]uint64) string {
	var texts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		texts = append(texts, fmt.Sprintf("%s: %d", k, m[k]))
	}
	return strings.Join(texts, ", ")
}

func newL7TapCommand(e *env) *cobra.Command {
	f := formatTable
	percent := 100.0
	cmd := &cobra.Command{
		Use:   "tap NAMESPACE/NAME",
		Short: "Show a service's requests as they come through this node's proxy, until interrupted",
		Long: `Show a service's requests as they come through this node's proxy, until interrupted: each when it has ended. Of a busy service, look at a
sample. What can't be shown fast enough is left out, so that no request waits for it. Paths are shown without their queries, which may hold secrets.`,
		Example: `  clustermesh l7 tap default/shop --node east/node1
  clustermesh l7 tap default/shop --sample 1 -o json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			service, err := serviceName(args[0])
			if err != nil {
				return err
			}
			if !(percent > 0 && percent <= 100) {
				return usageError("--sample %v: want a percentage above 0 and up to 100", percent)
			}
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			return tapL7(cmd.Context(), e, c.TapL7(cmd.Context(), service, percent), f)
		},
	}
	outputFlag(cmd, &f)
	cmd.Flags().Float64Var(&percent, "sample", 100, "show so many `percent` of the requests")
	return cmd
}

func tapL7(ctx context.Context, e *env, records iter.Seq2[state.TapRecord, error], f format) error {
	p := e.printer()
	for r, err := range records {
		switch {
		case errors.Is(err, context.Canceled) && ctx.Err() != nil:
			return nil // There is no other way to stop it.
		case err != nil:
			return err
		case f != formatTable:
			if err := encode(e.out, f, r, true); err != nil {
				return err
			}
		default:
			p.printf("%s\n", printable(tapText(&r)))
		}
	}
	return nil
}

// tapText is a request on one line.
func tapText(r *state.TapRecord) string {
	result := fmt.Sprint(r.Status)
	switch {
	case r.GRPC != nil:
		result = fmt.Sprintf("%d grpc:%d", r.Status, *r.GRPC)
	case r.Status == 0:
		result = "cut"
	}
	if r.Protocol == "tcp" {
		result = "passed on"
	}
	words := []string{r.Time.Local().Format("15:04:05.000"), r.Service, r.Protocol, r.Client}
	if r.Method != "" {
		words = append(words, r.Method, r.Host+r.Path)
	}
	words = append(words, "→", cmp.Or(strings.TrimPrefix(r.Cluster+" "+r.Backend, " "), "nobody"), result, millis(r.Took))
	if r.Local != "" {
		words = append(words, "("+r.Local+")")
	}
	if r.Retries > 0 {
		words = append(words, fmt.Sprintf("after %d retries", r.Retries))
	}
	return strings.Join(words, "  ")
}

func newL7UpgradeCommand(e *env) *cobra.Command {
	f := formatTable
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Replace the node's L7 proxy by a new one, of the program that is on the disk now, without losing a request",
		Long: `Replace the node's L7 proxy by a new one, of the program that is on the disk now. The new one takes connections as soon as it knows all services; the old one
finishes what it has, streams too. An agent of a new version does the same by itself when it is started.`,
		Example: "  clustermesh l7 upgrade --node east/node1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			done, err := c.UpgradeL7(ctx)
			if err != nil {
				return err
			}
			if f != formatTable {
				return encode(e.out, f, done, false)
			}
			e.printer().printf("process %d serves; process %d finishes what it has\n", done.PID, done.Before)
			return nil
		},
	}
	outputFlag(cmd, &f)
	return cmd
}

// l7Text is L7 in short, for status; empty if nothing is balanced at L7.
func l7Text(s api.L7Summary) string {
	if s.Services == 0 && s.PID == 0 {
		return ""
	}
	text := fmt.Sprintf("L7: %d services, no proxy", s.Services)
	if s.PID != 0 {
		text = fmt.Sprintf("L7: %d services, proxy is process %d", s.Services, s.PID)
	}
	if s.Draining > 0 {
		text += fmt.Sprintf(", %d finish what they have", s.Draining)
	}
	return text + fmt.Sprintf(", %d connections balanced at L4 instead", s.Fallbacks)
}
