package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"causeway/datapath"
	"causeway/identity"
)

// Phases of the demo's traffic.
const (
	phaseBoth     = "both"      // both clusters have servers
	phaseEastDown = "east-down" // only west has
	phaseRestored = "restored"  // both again
)

// DemoTraffic is who answered the client of one cluster in one phase.
type DemoTraffic struct {
	Phase    string `json:"phase"`
	Client   string `json:"client"` // its cluster
	Requests int    `json:"requests"`
	Failed   int    `json:"failed"`
	// By counts the answers by the cluster of the server.
	By map[string]int `json:"by"`
}

// traffic runs the phases, with the changes between them.
func (d *demo) traffic(ctx context.Context) error {
	both := map[string]int{"east": demoNodes, "west": demoNodes}
	westOnly := map[string]int{"west": demoNodes}
	steps := []struct {
		text string
		run  func(context.Context) (string, error)
	}{
		{"ask shop from both sides", d.phase(phaseBoth, both)},
		{"delete east's servers", func(ctx context.Context) (string, error) {
			if err := d.stopServers(ctx, "east"); err != nil {
				return "", err
			}
			return "every node's kernel knows only west's", d.waitServers(ctx, westOnly)
		}},
		{"ask again: west serves east's clients", d.phase(phaseEastDown, westOnly)},
		{"bring east's servers back", func(ctx context.Context) (string, error) {
			if err := d.startServers(ctx, "east"); err != nil {
				return "", err
			}
			return "every node's kernel knows them", d.waitServers(ctx, both)
		}},
		{"ask once more: both serve", d.phase(phaseRestored, both)},
	}
	for _, s := range steps {
		if err := d.step(ctx, s.text, s.run); err != nil {
			return err
		}
	}
	return nil
}

// phase sends requests from each cluster's client, and checks that exactly the clusters with servers answered.
func (d *demo) phase(name string, servers map[string]int) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		var details []string
		var errs []error
		for _, c := range demoClusters {
			t, err := d.ask(ctx, name, c)
			if err != nil {
				return "", err
			}
			d.result.Traffic = append(d.result.Traffic, t.DemoTraffic)
			details = append(details, c+"'s client got "+answers(t.By))
			errs = append(errs, t.check(servers))
		}
		return strings.Join(details, "; "), errors.Join(errs...)
	}
}

// answers counts in words who answered how often: "east 103, west 97".
func answers(by map[string]int) string {
	var parts []string
	for _, cluster := range slices.Sorted(maps.Keys(by)) {
		parts = append(parts, cluster+" "+strconv.Itoa(by[cluster]))
	}
	return strings.Join(parts, ", ")
}

// demoRun is traffic with what went wrong in it.
type demoRun struct {
	DemoTraffic
	errors map[string]int // by reason
}

func (t *demoRun) check(servers map[string]int) error {
	if t.Failed > 0 {
		return fmt.Errorf("%d of %d requests of %s's client failed: %s", t.Failed, t.Requests, t.Client, answers(t.errors))
	}
	for cluster, n := range t.By {
		if (n > 0) != (servers[cluster] > 0) {
			return fmt.Errorf("%s's client got %d answers from %s, which has %d servers", t.Client, n, cluster, servers[cluster])
		}
	}
	return nil
}

// ask sends the requests of one client, each on a connection of its own.
func (d *demo) ask(ctx context.Context, phase, cluster string) (*demoRun, error) {
	url := "http://" + netip.AddrPortFrom(d.shop[cluster], shopPort).String() + "/"
	var out, stderr bytes.Buffer
	code, err := d.bed.Exec(ctx, Target{Cluster: cluster, Pod: "client"},
		[]string{"clustermesh", "testbed", "load", "--url", url, "--requests", strconv.Itoa(d.o.Requests), "-o", "json"}, Stdio{Out: &out, Err: &stderr})
	if err != nil {
		return nil, err
	}
	var report LoadResult
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		return nil, fmt.Errorf("%s's client ended with exit status %d: %s", cluster, code, strings.TrimSpace(stderr.String()))
	}
	run := &demoRun{DemoTraffic: DemoTraffic{Phase: phase, Client: cluster, Requests: report.Requests, Failed: report.Failed, By: map[string]int{}}}
	for _, c := range demoClusters {
		run.By[c] = 0
	}
	for c, n := range report.By {
		run.By[c] += n
	}
	run.errors = report.Errors
	return run, nil
}

// demoKernel is what the kernel of every node holds, read without its agent.
type demoKernel struct {
	nodes []demoNode
}

type demoNode struct {
	name string
	maps *datapath.Maps
}

func openDemoKernel(b *Bed) (*demoKernel, error) {
	k := new(demoKernel)
	for _, c := range demoClusters {
		for n := 1; n <= demoNodes; n++ {
			maps, err := datapath.OpenMaps(b.PinDir(c, nodeName(n)))
			if err != nil {
				return nil, errors.Join(err, k.close())
			}
			k.nodes = append(k.nodes, demoNode{c + "/" + nodeName(n), maps})
		}
	}
	return k, nil
}

func (k *demoKernel) close() error {
	var errs []error
	for _, n := range k.nodes {
		errs = append(errs, n.maps.Close())
	}
	return errors.Join(errs...)
}

// waitServers waits until every node's kernel translates each of the service's addresses to exactly so many servers of each cluster.
func (d *demo) waitServers(ctx context.Context, want map[string]int) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		missing, err := d.missingServers(want)
		if err != nil || missing == "" {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", missing, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

// missingServers says which node's kernel differs from what is wanted, and how; empty if none does.
func (d *demo) missingServers(want map[string]int) (string, error) {
	for _, n := range d.kernel.nodes {
		frontends, err := n.maps.ListFrontends()
		if err != nil {
			return "", fmt.Errorf("reading the maps of %s: %w", n.name, err)
		}
		for _, addr := range d.shop {
			i := slices.IndexFunc(frontends, func(f datapath.FrontendEntry) bool { return f.Address == addr && f.Port == shopPort })
			if i < 0 {
				return fmt.Sprintf("the kernel of %s does not know the service's address %s", n.name, addr), nil
			}
			if got := countServers(frontends[i].Backends); !maps.Equal(got, want) {
				return fmt.Sprintf("the kernel of %s has servers %q behind %s, not %q", n.name, answers(got), addr, answers(want)), nil
			}
		}
	}
	return "", nil
}

// countServers counts by cluster; IDs are given in the order of demoClusters, from 1.
func countServers(backends []datapath.BackendEntry) map[string]int {
	seen := map[netip.AddrPort]identity.ClusterID{}
	for _, b := range backends {
		seen[b.Address] = b.Owner
	}
	count := map[string]int{}
	for _, owner := range seen {
		if owner >= 1 && int(owner) <= len(demoClusters) {
			count[demoClusters[owner-1]]++
		}
	}
	return count
}
