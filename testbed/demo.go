package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"causeway/agent/api"
	"causeway/identity"

	"golang.org/x/sync/errgroup"
)

// DemoOptions says how much the demo shows.
type DemoOptions struct {
	// Dir of the demo's own bed; empty: [DemoDir].
	Dir string
	// Requests that each client sends in each phase.
	Requests int
	// Samples of the propagation of an endpoint from one cluster to the other.
	Samples int
	// IPv6 has the clients ask the service at its IPv6 address, and the servers in their pods' IPv6 addresses with it.
	IPv6 bool
	// Encryption is what the clusters encrypt; empty: everything.
	Encryption identity.Encryption
	// Report, if set, is told what goes on, one call at a time.
	Report func(DemoEvent)
}

// DemoEvent tells that a step began, how far it is, or how it ended.
type DemoEvent struct {
	// Step says what is being done.
	Step string
	// Done is true for the last event of a step.
	Done bool
	// Err is why the step failed.
	Err error
	// Detail says what came out of it, if there is anything to say.
	Detail string
	// Took is the duration of a step that is done.
	Took time.Duration
}

// DemoResult is what the demo has shown.
type DemoResult struct {
	OK       bool `json:"ok"`
	Clusters int  `json:"clusters"`
	Nodes    int  `json:"nodes"`
	Pods     int  `json:"pods"`
	// SetupMS is the time until the service answered, in milliseconds.
	SetupMS     int64           `json:"setupMs"`
	Traffic     []DemoTraffic   `json:"traffic"`
	Propagation DemoPropagation `json:"propagationMs"`
	// CleanedUp says that nothing of the demo is left on this machine.
	CleanedUp bool `json:"cleanedUp"`
}

// demoClusters, their nodes and the pods on them. The first cluster's backends go away and come back; endpoints
// are added in the last to see when the first knows them.
var demoClusters = []string{"east", "west"}

const (
	demoNodes = 2
	// shopPort is the service's port, backendPort that of the servers behind it.
	shopPort    = 80
	backendPort = 8080
	// settleTimeout bounds the wait for news to reach every node's kernel.
	settleTimeout = 10 * time.Second
)

// shopManifest is the service of the demo, the same in each cluster.
const shopManifest = `apiVersion: v1
kind: Service
metadata:
  name: shop
  namespace: default
  annotations:
    service.cilium.io/global: "true"
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: shop}
  ports: [{port: 80, targetPort: 8080}]
`

// demo is one run.
type demo struct {
	o      DemoOptions
	bed    *Bed
	kernel *demoKernel
	result DemoResult
	// shop is the address of the service that each cluster has given it.
	shop map[string]netip.Addr
}

// Demo shows two clusters as one network, on a bed of its own that is gone afterwards whatever happens. What an earlier run
// that was killed left behind is removed first. The result holds as far as it got, also with an error.
func Demo(ctx context.Context, o DemoOptions) (DemoResult, error) {
	if o.Dir == "" {
		o.Dir = DemoDir
	}
	d := &demo{o: o, shop: map[string]netip.Addr{}, result: DemoResult{Traffic: []DemoTraffic{}}}
	err := d.run(ctx)
	if d.kernel != nil {
		err = errors.Join(err, d.kernel.close())
	}
	if d.bed != nil {
		// Also when ctx has ended: Ctrl-C must not leave anything.
		err = errors.Join(err, d.step(context.WithoutCancel(ctx), "take everything down", d.takeDown))
	}
	d.result.OK = err == nil
	return d.result, err
}

func (d *demo) run(ctx context.Context) error {
	began := time.Now()
	if err := d.up(ctx); err != nil {
		return err
	}
	if err := d.step(ctx, "start servers and clients in pods of both clusters", d.startPods); err != nil {
		return err
	}
	if err := d.step(ctx, "declare the global service shop in both clusters", d.applyService); err != nil {
		return err
	}
	d.result.SetupMS = time.Since(began).Milliseconds()
	if err := d.traffic(ctx); err != nil {
		return err
	}
	return d.step(ctx, propagationStep, d.measurePropagation)
}

// step runs one step of the demo and reports it. A step's function returns what there is to say about it.
func (d *demo) step(ctx context.Context, text string, fn func(context.Context) (string, error)) error {
	began := time.Now()
	d.report(DemoEvent{Step: text})
	detail, err := fn(ctx)
	d.report(DemoEvent{Step: text, Done: true, Err: err, Detail: detail, Took: time.Since(began)})
	if err != nil {
		return d.explain(ctx, fmt.Errorf("%s: %w", text, err))
	}
	return nil
}

func (d *demo) report(e DemoEvent) {
	if d.o.Report != nil {
		d.o.Report(e)
	}
}

// explain adds what the agents last complained about, which is gone with the bed.
func (d *demo) explain(ctx context.Context, err error) error {
	if d.bed == nil || ctx.Err() != nil {
		return err
	}
	for _, c := range demoClusters {
		for n := 1; n <= demoNodes; n++ {
			path := d.bed.AgentLog(c, nodeName(n))
			for _, line := range complaints(path) {
				err = fmt.Errorf("%w\n  %s/%s: %s", err, c, nodeName(n), line)
			}
		}
	}
	return err
}

// complaints returns the last warnings and errors in an agent's log.
func complaints(path string) (lines []string) {
	for _, line := range logTail(path, 50) {
		if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines[max(0, len(lines)-3):]
}

func (d *demo) up(ctx context.Context) error {
	left, err := Leftovers(d.o.Dir)
	if err != nil {
		return err
	}
	return d.step(ctx, "bring up two clusters of two nodes", func(ctx context.Context) (string, error) {
		bed, err := Up(ctx, Options{Dir: d.o.Dir, Clusters: demoClusters, Nodes: demoNodes, Encryption: d.o.Encryption, Ephemeral: true})
		if err != nil {
			return "", err
		}
		d.bed, d.result.Clusters, d.result.Nodes = bed, len(demoClusters), len(demoClusters)*demoNodes
		if len(left) > 0 {
			return "an earlier run had left things behind, which are removed", nil
		}
		return "each node its own namespace and agent, each cluster its own etcd", nil
	})
}

// startPods starts the servers on every node, and a client in each cluster.
func (d *demo) startPods(ctx context.Context) (string, error) {
	g, ctx := errgroup.WithContext(ctx)
	for _, c := range demoClusters {
		g.Go(func() error { return d.startServers(ctx, c) })
		g.Go(func() error {
			_, err := d.bed.RunPod(ctx, PodSpec{Cluster: c, Node: nodeName(1), Name: "client", Labels: map[string]string{"app": "client"}, Command: []string{"sleep", "infinity"}})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return "", err
	}
	pods, err := d.bed.Pods()
	d.result.Pods = len(pods)
	return fmt.Sprintf("%d pods, each its own namespace", len(pods)), err
}

func serverName(n int) string { return fmt.Sprintf("shop-%d", n) }

// startServers starts a server on each node of a cluster.
func (d *demo) startServers(ctx context.Context, cluster string) error {
	g, ctx := errgroup.WithContext(ctx)
	for n := 1; n <= demoNodes; n++ {
		g.Go(func() error {
			_, err := d.bed.RunPod(ctx, PodSpec{
				Cluster: cluster, Node: nodeName(n), Name: serverName(n), Labels: map[string]string{"app": "shop"}, ReadyPort: backendPort,
				Command: []string{"clustermesh", "testbed", "serve", "--name", cluster + "/" + serverName(n), "--listen", fmt.Sprintf(":%d", backendPort)},
			})
			return err
		})
	}
	return g.Wait()
}

func (d *demo) stopServers(ctx context.Context, cluster string) error {
	g, ctx := errgroup.WithContext(ctx)
	for n := 1; n <= demoNodes; n++ {
		g.Go(func() error {
			_, err := d.bed.DeletePod(ctx, cluster, serverName(n), DefaultGrace)
			return err
		})
	}
	return g.Wait()
}

// applyService declares the service in each cluster, and waits until every node translates its addresses.
func (d *demo) applyService(ctx context.Context) (string, error) {
	for _, c := range demoClusters {
		client := d.bed.Client(c, nodeName(1))
		results, err := client.ApplyServices(ctx, []byte(shopManifest))
		client.Close()
		if err != nil {
			return "", fmt.Errorf("in %s: %w", c, err)
		}
		if d.shop[c], err = serviceAddress(results, d.o.IPv6); err != nil {
			return "", fmt.Errorf("in %s: %w", c, err)
		}
	}
	var err error
	if d.kernel, err = openDemoKernel(d.bed); err != nil {
		return "", err
	}
	detail := fmt.Sprintf("east reaches it at %s, west at %s", d.shop["east"], d.shop["west"])
	return detail, d.waitServers(ctx, map[string]int{"east": demoNodes, "west": demoNodes})
}

// serviceAddress returns the address of one family that a cluster has given the one service that was applied.
func serviceAddress(results []api.ServiceResult, ipv6 bool) (netip.Addr, error) {
	if len(results) == 1 {
		for _, text := range results[0].ClusterIPs {
			if ip, err := netip.ParseAddr(text); err == nil && ip.Is6() == ipv6 {
				return ip, nil
			}
		}
	}
	family := "IPv4"
	if ipv6 {
		family = "IPv6"
	}
	return netip.Addr{}, fmt.Errorf("the agent gave the service no %s address: %+v", family, results)
}

// takeDown removes the bed, and then looks for what may be left.
func (d *demo) takeDown(ctx context.Context) (string, error) {
	if err := d.bed.Down(ctx); err != nil {
		return "", err
	}
	left, err := Leftovers(d.o.Dir)
	if err != nil {
		return "", err
	}
	running, err := processesFrom(d.o.Dir)
	if err != nil {
		return "", err
	}
	if left = append(left, running...); len(left) > 0 {
		return "", fmt.Errorf("still there: %s", strings.Join(left, ", "))
	}
	d.result.CleanedUp = true
	return "no namespace, link, pin, mount, cgroup, process or file is left", nil
}

// processesFrom lists the processes whose program is or was in dir.
func processesFrom(dir string) (list []string, err error) {
	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return nil, err
	}
	for _, link := range programs {
		// A process that has ended meanwhile, or one of the kernel, has none.
		if program, err := os.Readlink(link); err == nil && strings.HasPrefix(program, dir+"/") {
			list = append(list, "process "+string(bytes.TrimSuffix([]byte(link[len("/proc/"):]), []byte("/exe"))))
		}
	}
	return list, nil
}
