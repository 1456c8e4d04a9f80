package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"causeway/datapath"
	"causeway/identity"
)

// kubeShop is a global service with its servers, which go on serving while the news of their end spreads, as deployments do that must not lose requests; and a client.
const kubeShop = `
apiVersion: v1
kind: Namespace
metadata: {name: NAMESPACE}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: NAMESPACE}
spec:
  replicas: REPLICAS
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 10
      containers:
      - name: web
        image: e2e-test-images/agnhost:2.53
        args: [netexec]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        lifecycle: {preStop: {sleep: {seconds: DRAIN}}}
---
apiVersion: v1
kind: Service
metadata:
  name: shop
  namespace: NAMESPACE
  annotations: {service.cilium.io/global: "true"}
spec:
  selector: {app: shop}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: NAMESPACE}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: client, image: "e2e-test-images/agnhost:2.53"}]
`

// kubeMesh is a namespace of its own in both clusters, with the service shop and a client.
type kubeMesh struct {
	*kube
	namespace string
}

// newKubeMesh makes one with so many servers in each cluster, which go on for so many seconds when they are to end.
func newKubeMesh(t *testing.T, namespace string, replicas, drain int) *kubeMesh {
	t.Helper()
	m := &kubeMesh{kube: kubernetesBed(t), namespace: namespace}
	for _, c := range []string{"east", "west"} {
		m.apply(c, strings.NewReplacer("NAMESPACE", namespace, "REPLICAS", fmt.Sprint(replicas), "DRAIN", fmt.Sprint(drain)).Replace(kubeShop))
	}
	t.Cleanup(func() { // in both at once; what was applied is waited for
		for _, c := range []string{"east", "west"} {
			_, _ = m.try("", "--context", c, "delete", "namespace", namespace, "--wait=false")
		}
	})
	for _, c := range []string{"east", "west"} {
		m.in(c, "rollout", "status", "deployment/shop", "--timeout=60s")
		m.in(c, "wait", "--for=condition=Ready", "pod/client", "--timeout=60s")
	}
	return m
}

// in is kubectl in the mesh's namespace of a cluster.
func (m *kubeMesh) in(cluster string, args ...string) string {
	m.Helper()
	return m.kubectl(append([]string{"--context", cluster, "-n", m.namespace}, args...)...)
}

// pods are the names of a cluster's servers.
func (m *kubeMesh) pods(cluster string) []string {
	m.Helper()
	return strings.Fields(m.in(cluster, "get", "pods", "-l", "app=shop", "-o", "jsonpath={.items[*].metadata.name}"))
}

// answers says who of shop answered a client how often, of n requests of curl.
func (m *kubeMesh) answers(cluster string, n int) map[string]int {
	m.Helper()
	script := fmt.Sprintf("for i in $(seq %d); do curl -sS --max-time 5 http://shop/hostname; echo; done", n)
	by := map[string]int{}
	for _, name := range strings.Fields(m.in(cluster, "exec", "client", "--", "sh", "-c", script)) {
		by[name]++
	}
	return by
}

// waitAnswers waits until exactly these servers answer a client.
func (m *kubeMesh) waitAnswers(cluster string, names ...string) {
	m.Helper()
	slices.Sort(names)
	m.eventually("who answers in "+cluster, 20*time.Second, func() string {
		// That one of six is not asked in 90 requests would happen once in 10 million times.
		if got := slices.Sorted(maps.Keys(m.answers(cluster, 90))); !slices.Equal(got, names) {
			return fmt.Sprintf("%q, want %q", got, names)
		}
		return ""
	})
}

// eventually waits until problem returns "".
func (k *kube) eventually(what string, timeout time.Duration, problem func() string) {
	k.Helper()
	ctx, cancel := context.WithTimeout(k.Context(), timeout)
	defer cancel()
	for {
		p := problem()
		if p == "" {
			return
		}
		if pause(ctx, 20*time.Millisecond) != nil {
			k.Fatalf("%s: %s", what, p)
		}
	}
}

// send has a pod of a cluster ask a URL at a pace until the returned function is called, which says what came of it. The pod needs no API server for that.
func (m *kubeMesh) send(cluster, url string, rate int) (stop func() *LoadResult) {
	m.Helper()
	m.apply(cluster, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: traffic, namespace: %s}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: load
    image: causeway/clustermesh
    args: [testbed, load, --url, %q, --rate, "%d", --duration, 1h, -o, json]
`, m.namespace, url, rate))
	m.in(cluster, "wait", "--for=condition=Ready", "pod/traffic", "--timeout=60s")
	return func() *LoadResult {
		m.Helper()
		m.in(cluster, "exec", "traffic", "--", "sh", "-c", "kill -TERM 1")
		m.in(cluster, "wait", "--for=condition=Ready=false", "pod/traffic", "--timeout=60s")
		r, log := new(LoadResult), m.in(cluster, "logs", "traffic")
		if err := json.NewDecoder(strings.NewReader(log)).Decode(r); err != nil {
			m.Fatalf("the traffic of %s: %v in %q", cluster, err, log)
		}
		return r
	}
}

// wantAllAnswered checks that traffic has lasted for at least d at about its rate, and that nothing of it failed.
func (k *kube) wantAllAnswered(what string, r *LoadResult, rate int, d time.Duration) {
	k.Helper()
	k.Logf("%s: %d requests in %.1f s, %d failed; p50 %.1f ms, p99 %.1f ms, longest %.1f ms", what, r.Requests, float64(r.ElapsedMS)/1000, r.Failed,
		r.Latency.P50, r.Latency.P99, r.Latency.Max)
	if r.Failed > 0 {
		k.Errorf("%s: %d of %d requests failed: %v, the first at %v", what, r.Failed, r.Requests, r.Errors, r.Failures[0].Sent)
	}
	if least := int(d.Seconds() * float64(rate) * 0.9); r.Requests < least {
		k.Errorf("%s: %d requests in %v, want at least %d", what, r.Requests, d, least)
	}
}

// A service of both clusters, applied with plain kubectl: answered by all, then by west alone, then by all, and nothing fails in between.
func TestKubernetesGlobalService(t *testing.T) {
	m := newKubeMesh(t, "global-service", 3, 2)
	east, west := m.pods("east"), m.pods("west")
	if len(east) != 3 || len(west) != 3 {
		t.Fatalf("servers %q and %q", east, west)
	}
	m.waitAnswers("east", slices.Concat(east, west)...)
	t.Logf("90 requests of a pod in east: %v", m.answers("east", 90))

	const rate = 100
	stop := m.send("east", "http://shop/hostname", rate)
	began := time.Now()
	m.in("east", "scale", "deployment/shop", "--replicas=0")
	m.in("east", "wait", "--for=delete", "pod", "-l", "app=shop", "--timeout=60s")
	m.waitAnswers("east", west...)
	t.Logf("with no server left in east: %v", m.answers("east", 90))
	m.in("east", "scale", "deployment/shop", "--replicas=3")
	m.in("east", "rollout", "status", "deployment/shop", "--timeout=60s")
	m.waitAnswers("east", slices.Concat(m.pods("east"), west)...)
	lasted := time.Since(began)
	m.wantAllAnswered("while east went and came back", stop(), rate, lasted)
}

// kernels are the maps of a bed's nodes, in the order of their names.
type kernels struct {
	nodes []identity.NodeName
	maps  map[identity.NodeName]*datapath.Maps
}

func (k *kube) kernels() *kernels {
	k.Helper()
	all := &kernels{maps: map[identity.NodeName]*datapath.Maps{}}
	for _, c := range mustState(k.T, k.bed).Clusters {
		for _, n := range c.Nodes {
			name := identity.NodeName{Cluster: c.Name, Node: n.Name}
			m, err := datapath.OpenMaps(k.bed.PinDir(c.Name, n.Name))
			if err != nil {
				k.Fatal(err)
			}
			k.Cleanup(func() { _ = m.Close() })
			all.nodes, all.maps[name] = append(all.nodes, name), m
		}
	}
	return all
}

// backends returns those that new connections to an address choose from in a node's kernel, ordered; false if it does not know the address.
func (k *kernels) backends(n identity.NodeName, frontend netip.AddrPort) (addresses []netip.AddrPort, known bool, err error) {
	entries, err := k.maps[n].ListFrontends()
	for _, e := range entries {
		if e.Address != frontend.Addr() || e.Port != frontend.Port() || e.Outside {
			continue
		}
		known = true
		for _, b := range e.Backends {
			addresses = append(addresses, b.Address)
		}
	}
	slices.SortFunc(addresses, netip.AddrPort.Compare)
	return addresses, known, err
}

// kubeAPI asks a cluster's API server as its administrator.
type kubeAPI struct {
	client *http.Client
	server string
}

func (k *kube) api(cluster string) *kubeAPI {
	k.Helper()
	c, err := mustState(k.T, k.bed).cluster(cluster)
	if err != nil {
		k.Fatal(err)
	}
	client, err := k.bed.kubernetesHTTP(c)
	if err != nil {
		k.Fatal(err)
	}
	client.Timeout = 0 // watches last
	k.Cleanup(client.CloseIdleConnections)
	return &kubeAPI{client: client, server: apiServerURL(c.KVStore.Address, apiServerPort)}
}

// do sends a request and returns the answer if it is one of success.
func (a *kubeAPI) do(ctx context.Context, method, path, contentType string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.server+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text)
	}
	return resp, nil
}

// propagation is a service without a selector whose EndpointSlice in west is changed, and what is seen of that.
type propagation struct {
	*kube
	api      *kubeAPI
	path     string
	watched  chan sliceSeen
	kernels  *kernels
	node     identity.NodeName
	frontend netip.AddrPort
}

// sliceSeen is what a watch on the API server delivered, and when.
type sliceSeen struct {
	at        time.Time
	addresses []string
}

const probeService = `
apiVersion: v1
kind: Namespace
metadata: {name: propagation}
---
apiVersion: v1
kind: Service
metadata:
  name: probe
  namespace: propagation
  annotations: {service.cilium.io/global: "true"}
spec:
  ports: [{port: 80, targetPort: 8080}]
`

const probeSlice = `
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: probe-1
  namespace: propagation
  labels: {kubernetes.io/service-name: probe}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.2.1.200], nodeName: node1, conditions: {ready: true}}]
`

// How soon east's kernel has what is written to west's API server.
func TestKubernetesPropagation(t *testing.T) {
	const (
		changes = 80
		all     = 500 * time.Millisecond // from the write on
		ours    = 200 * time.Millisecond // from when the API server tells of it
	)
	k := kubernetesBed(t)
	k.apply("east", probeService)
	k.apply("west", probeService+probeSlice)
	address, err := netip.ParseAddr(k.kubectl("--context", "east", "-n", "propagation", "get", "service", "probe", "-o", "jsonpath={.spec.clusterIP}"))
	if err != nil {
		t.Fatal(err)
	}
	p := &propagation{
		kube: k, api: k.api("west"), path: "/apis/discovery.k8s.io/v1/namespaces/propagation/endpointslices", watched: make(chan sliceSeen, changes),
		kernels: k.kernels(), node: identity.NodeName{Cluster: "east", Node: "node1"}, frontend: netip.AddrPortFrom(address, 80),
	}
	k.eventually("the endpoint that there is from the start", 20*time.Second, func() string {
		if got, _, err := p.kernels.backends(p.node, p.frontend); len(got) != 1 || err != nil {
			return fmt.Sprintf("%v, %v", got, err)
		}
		return ""
	})
	defer p.watch()()
	var fromWrite, fromWatch []time.Duration
	for i := range changes {
		written, watched := p.change(i%2 == 0, fmt.Sprintf("10.2.1.%d", 201+i/2))
		fromWrite, fromWatch = append(fromWrite, written), append(fromWatch, watched)
	}
	t.Logf("%d changes, from the write to west's API until east's kernel has it: p50 %.1f ms, p99 %.1f ms; from when the API tells of it: p50 %.1f ms, p99 %.1f ms",
		changes, percentile(fromWrite, 50), percentile(fromWrite, 99), percentile(fromWatch, 50), percentile(fromWatch, 99))
	for what, p99 := range map[string]struct{ got, most time.Duration }{
		"from the write":            {percentileOf(fromWrite, 99), all},
		"from when the API told it": {percentileOf(fromWatch, 99), ours},
	} {
		if p99.got > p99.most {
			t.Errorf("%s p99 is %v, want %v at most", what, p99.got, p99.most)
		}
	}
}

func percentileOf(samples []time.Duration, p int) time.Duration {
	return time.Duration(percentile(samples, p) * float64(time.Millisecond))
}

// watch follows the slice until the returned function is called.
func (p *propagation) watch() (stop func()) {
	p.Helper()
	ctx, cancel := context.WithCancel(p.Context())
	resp, err := p.api.do(ctx, http.MethodGet, p.path+"?watch=true&fieldSelector=metadata.name%3Dprobe-1", "", nil)
	if err != nil {
		cancel()
		p.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer resp.Body.Close()
		events := json.NewDecoder(resp.Body)
		for {
			var event struct {
				Object struct {
					Endpoints []struct{ Addresses []string }
				}
			}
			if err := events.Decode(&event); err != nil {
				return
			}
			seen := sliceSeen{at: time.Now()}
			for _, e := range event.Object.Endpoints {
				seen.addresses = append(seen.addresses, e.Addresses...)
			}
			select {
			case p.watched <- seen:
			case <-ctx.Done():
				return
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// change adds an endpoint or removes it, and returns how long it took until the kernel had that: from before the write, and from when the watch delivered it.
func (p *propagation) change(add bool, address string) (fromWrite, fromWatch time.Duration) {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), sampleTimeout)
	defer cancel()
	endpoints := []map[string]any{probeEndpoint("10.2.1.200")}
	if add {
		endpoints = append(endpoints, probeEndpoint(address))
	}
	patch, err := json.Marshal(map[string]any{"endpoints": endpoints})
	if err != nil {
		p.Fatal(err)
	}
	backend := netip.AddrPortFrom(netip.MustParseAddr(address), 8080)
	var wg sync.WaitGroup
	var failed error
	defer wg.Wait()
	began := time.Now()
	wg.Go(func() {
		resp, err := p.api.do(ctx, http.MethodPatch, p.path+"/probe-1", "application/merge-patch+json", patch)
		if err != nil {
			failed = err
			cancel()
			return
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	})
	var there time.Time
	for there.IsZero() {
		got, _, err := p.kernels.backends(p.node, p.frontend)
		switch {
		case err == nil && len(got) == len(endpoints) && slices.Contains(got, backend) == add:
			there = time.Now()
		case pause(ctx, time.Millisecond) != nil:
			wg.Wait()
			p.Fatalf("%s is not as it should be in the kernel of %v after %v: %v, %v, %v", address, p.node, time.Since(began), got, err, failed)
		}
	}
	for {
		select {
		case seen := <-p.watched:
			if len(seen.addresses) == len(endpoints) && slices.Contains(seen.addresses, address) == add {
				return there.Sub(began), max(0, there.Sub(seen.at))
			}
		case <-ctx.Done():
			p.Fatalf("the watch did not deliver the change of %s", address)
		}
	}
}

func probeEndpoint(address string) map[string]any {
	return map[string]any{"addresses": []string{address}, "nodeName": "node1", "conditions": map[string]bool{"ready": true}}
}

// guard watches that backends which are healthy all the time stay in all kernels.
type guard struct {
	m       *kubeMesh
	kernels *kernels
	// frontends of shop, by cluster, and the backends that must stay.
	frontends map[string]netip.AddrPort
	healthy   []netip.AddrPort
	looks     atomic.Int64
}

// lost says which backend a kernel has lost.
func (g *guard) lost(n identity.NodeName) string {
	g.looks.Add(1)
	got, known, err := g.kernels.backends(n, g.frontends[n.Cluster])
	if err != nil || !known {
		return fmt.Sprintf("the kernel of %v does not know the service (%v)", n, err)
	}
	for _, b := range g.healthy {
		if !slices.Contains(got, b) {
			return fmt.Sprintf("the kernel of %v has lost %v, and has %v", n, b, got)
		}
	}
	return ""
}

// watch looks until the returned function is called.
func (g *guard) watch() (stop func()) {
	ctx, cancel := context.WithCancel(g.m.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		told := map[identity.NodeName]bool{}
		for pause(ctx, 5*time.Millisecond) == nil {
			for _, n := range g.kernels.nodes {
				problem := g.lost(n)
				for i := 1; i < confirmLooks && problem != ""; i++ {
					problem = g.lost(n)
				}
				if problem != "" && !told[n] {
					told[n] = true
					g.m.Errorf("%s: %s", time.Now().Format("15:04:05.000"), problem)
				}
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// serving are the endpoints of shop that a cluster's API has as ready.
func (m *kubeMesh) serving(cluster string) (addresses []netip.AddrPort) {
	m.Helper()
	text := m.in(cluster, "get", "endpointslices", "-l", "kubernetes.io/service-name=shop", "-o",
		`jsonpath={range .items[*].endpoints[?(@.conditions.ready==true)]}{.addresses[0]}{"\n"}{end}`)
	for _, line := range strings.Fields(text) {
		a, err := netip.ParseAddr(line)
		if err != nil {
			m.Fatal(err)
		}
		addresses = append(addresses, netip.AddrPortFrom(a, 8080))
	}
	return addresses
}

// waitAsAPISays waits until every kernel has what both APIs say, a number of backends.
func (g *guard) waitAsAPISays(n int) {
	g.m.Helper()
	g.m.eventually("kernels as the APIs say", 60*time.Second, func() string {
		want := slices.Concat(g.m.serving("east"), g.m.serving("west"))
		slices.SortFunc(want, netip.AddrPort.Compare)
		if len(want) != n {
			return fmt.Sprintf("the APIs have %v, want %d; in west there are\n%s", want, n, g.m.in("west", "get", "deployments,replicasets,pods", "-o", "wide"))
		}
		for _, node := range g.kernels.nodes {
			if got, _, err := g.kernels.backends(node, g.frontends[node.Cluster]); err != nil || !slices.Equal(got, want) {
				return fmt.Sprintf("%v has %v, want %v (%v)", node, got, want, err)
			}
		}
		return ""
	})
}

// step runs a part of a test and says how long it took.
func (k *kube) step(what string, do ...func() error) {
	k.Helper()
	began := time.Now()
	for _, f := range do {
		if err := f(); err != nil {
			k.Fatalf("%s: %v", what, err)
		}
	}
	k.Logf("%s: %s, %.1f s", began.Format("15:04:05.000"), what, time.Since(began).Seconds())
}

// The control plane of Kubernetes goes and comes back, and even forgets: the data path goes on.
func TestKubernetesFaults(t *testing.T) {
	// The server that the restored API has never heard of ends when its kubelet hears that; nodes may hear it 6 s later, as the agents' pauses between attempts are.
	m := newKubeMesh(t, "faults", 2, 8)
	ctx := t.Context()
	g := &guard{m: m, kernels: m.kernels(), frontends: map[string]netip.AddrPort{}, healthy: slices.Concat(m.serving("east"), m.serving("west"))}
	for _, c := range []string{"east", "west"} {
		a, err := netip.ParseAddr(m.in(c, "get", "service", "shop", "-o", "jsonpath={.spec.clusterIP}"))
		if err != nil {
			t.Fatal(err)
		}
		g.frontends[c] = netip.AddrPortFrom(a, 80)
	}
	g.waitAsAPISays(4)

	const rate = 50
	began := time.Now()
	stops := map[string]func() *LoadResult{}
	for _, c := range []string{"east", "west"} {
		stops[c] = m.send(c, fmt.Sprintf("http://%v/hostname", g.frontends[c]), rate)
	}
	end := sync.OnceFunc(g.watch())
	defer end()
	fault := func(do func(context.Context, Victim) error, kind, node string) func() error {
		return func() error { return do(ctx, Victim{Kind: kind, Cluster: "west", Node: node}) }
	}
	kill, start := m.bed.Kill, m.bed.Start

	var away time.Time
	m.step("API server killed, for at least 5 s; meanwhile an agent is killed and started",
		func() error { away = time.Now(); return nil }, fault(kill, kindAPIServer, ""), fault(kill, kindAgent, "node1"), fault(start, kindAgent, "node1"),
		func() error { return pause(ctx, time.Until(away.Add(5*time.Second))) })
	m.step("API server started", fault(start, kindAPIServer, ""))
	m.step("controller-manager killed", fault(kill, kindControllerManager, ""))
	m.step("controller-manager started", fault(start, kindControllerManager, ""))

	snapshot := filepath.Join(t.TempDir(), "west.db")
	m.step("snapshot", func() error { return m.bed.SnapshotKubernetes(ctx, "west", snapshot) })
	m.step("scaled up by one", func() error {
		m.in("west", "scale", "deployment/shop", "--replicas=3")
		g.waitAsAPISays(5)
		return nil
	})
	m.step("restored", func() error { return m.bed.RestoreKubernetes(ctx, "west", snapshot) })
	m.step("kernels as the API says", func() error { g.waitAsAPISays(4); return nil })
	// As Kubernetes advises after a restore. Those that wait to reach the API server wait for up to a minute.
	m.step("controller-manager and scheduler started anew", fault(kill, kindControllerManager, ""), fault(kill, kindScheduler, ""),
		fault(start, kindControllerManager, ""), fault(start, kindScheduler, ""))
	m.step("a change after the restore", func() error {
		m.in("west", "scale", "deployment/shop", "--replicas=3")
		g.waitAsAPISays(5)
		return nil
	})
	lasted := time.Since(began)
	end()
	t.Logf("%d looks into kernels", g.looks.Load())
	for c, stop := range stops {
		m.wantAllAnswered("traffic of "+c, stop(), rate, lasted)
	}
	for _, node := range []string{"node1", "node2"} {
		m.step("kubelet of "+node+" started anew", fault(kill, kindKubelet, node), fault(start, kindKubelet, node))
	}
	m.eventually("the bed", 30*time.Second, func() string {
		if st, err := m.bed.Status(ctx); err != nil || !st.OK {
			return fmt.Sprintf("status %+v, %v", st, err)
		}
		return ""
	})
}
