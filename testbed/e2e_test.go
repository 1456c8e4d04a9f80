package testbed

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"causeway/identity"
	"causeway/kvstore"
)

// realBinary builds the program that users run, once for all tests, in the directory that TestMain removes.
var realBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(binaryDir, "clustermesh")
	if out, err := exec.Command("go", "build", "-o", path, "causeway/cmd/clustermesh").CombinedOutput(); err != nil {
		return "", fmt.Errorf("building clustermesh: %w\n%s", err, out)
	}
	return path, nil
})

// mesh is a bed of real agents with a global service shop, a server of it on every node, and a client in each cluster.
type mesh struct {
	*testing.T
	bed  *Bed
	shop string // URL of the service, at the IPv4 address that east gave it
}

const shop = `apiVersion: v1
kind: Service
metadata:
  name: shop
  annotations: {service.cilium.io/global: "true"}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: shop}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: packets, protocol: UDP, port: 80, targetPort: 8080}]
`

func newMesh(t *testing.T) *mesh { return newMeshOf(t, Options{}) }

// newMeshOf is newMesh on a bed with options.
func newMeshOf(t *testing.T, o Options) *mesh {
	t.Helper()
	needRoot(t)
	var err error
	if o.Binary, err = realBinary(); err != nil {
		t.Fatal(err)
	}
	m := &mesh{T: t, bed: mustUp(t, o)}
	servers := 0
	for _, c := range []string{"east", "west"} {
		for _, n := range m.nodesOf(c) {
			m.server(c, n, "shop-"+n)
			servers++
		}
		m.pod(PodSpec{Cluster: c, Node: "node1", Name: "client", Labels: map[string]string{"app": "client"}, Command: []string{"sleep", "infinity"}})
		client := m.bed.Client(c, "node1")
		results, err := client.ApplyServices(t.Context(), []byte(shop))
		client.Close()
		if err != nil {
			t.Fatal(err)
		}
		if c == "east" {
			m.shop = "http://" + results[0].ClusterIPs[0] + "/"
		}
	}
	m.waitBackends(servers)
	return m
}

func (m *mesh) nodesOf(cluster string) (names []string) {
	m.Helper()
	c, err := mustState(m.T, m.bed).cluster(cluster)
	if err != nil {
		m.Fatal(err)
	}
	for _, n := range c.Nodes {
		names = append(names, n.Name)
	}
	return names
}

func (m *mesh) pod(spec PodSpec) *PodStatus {
	m.Helper()
	pod, err := m.bed.RunPod(m.Context(), spec)
	if err != nil {
		m.Fatal(err)
	}
	return pod
}

// server starts a backend of shop.
func (m *mesh) server(cluster, node, name string) *PodStatus {
	m.Helper()
	return m.pod(PodSpec{
		Cluster: cluster, Node: node, Name: name, Labels: map[string]string{"app": "shop"}, ReadyPort: 8080,
		Command: []string{"clustermesh", "testbed", "serve", "--name", cluster + "/" + name},
	})
}

// eventually waits until problem returns "".
func (m *mesh) eventually(what string, problem func() string) {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), 20*time.Second)
	defer cancel()
	for {
		p := problem()
		if p == "" {
			return
		}
		if pause(ctx, 20*time.Millisecond) != nil {
			m.Fatalf("%s: %s", what, p)
		}
	}
}

// kernel returns the addresses of shop's backends as a node's kernel has them, "ADDRESS:PORT ID" each.
func (m *mesh) kernel(cluster, node string) (backends []string) {
	m.Helper()
	client := m.bed.Client(cluster, node)
	defer client.Close()
	frontends, err := client.BPFLB(m.Context())
	if err != nil {
		m.Fatal(err)
	}
	for _, f := range frontends {
		if !strings.HasPrefix(m.shop, "http://"+f.Address+"/") || f.Protocol != "TCP" {
			continue
		}
		for _, b := range f.Backends {
			backends = append(backends, fmt.Sprintf("%s:%d %d", b.Address, b.Port, b.ID))
		}
	}
	return backends
}

// waitBackends waits until every node's kernel has n backends of shop.
func (m *mesh) waitBackends(n int) {
	m.Helper()
	for _, c := range []string{"east", "west"} {
		for _, node := range m.nodesOf(c) {
			m.eventually("backends of "+c+"/"+node, func() string {
				if got := m.kernel(c, node); len(got) != n {
					return fmt.Sprintf("%d in the kernel, want %d: %q", len(got), n, got)
				}
				return ""
			})
		}
	}
}

// load runs traffic in a client pod until the context ends or d is over.
func (m *mesh) load(ctx context.Context, cluster string, rate int, d time.Duration) (*LoadResult, error) {
	var out, errOut bytes.Buffer
	argv := []string{"clustermesh", "testbed", "load", "--url", m.shop, "--rate", fmt.Sprint(rate), "--duration", d.String(), "-o", "json"}
	if _, err := m.bed.Exec(ctx, Target{Cluster: cluster, Pod: "client"}, argv, Stdio{Out: &out, Err: &errOut}); err != nil {
		return nil, err
	}
	r := new(LoadResult)
	if err := json.Unmarshal(out.Bytes(), r); err != nil {
		return nil, fmt.Errorf("%w in %q, %q", err, out.String(), errOut.String())
	}
	return r, nil
}

// wantAll checks that every request was answered, by servers of exactly these clusters.
func (m *mesh) wantAll(r *LoadResult, err error, clusters ...string) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
	if r.Failed > 0 || r.Requests == 0 || len(r.By) != len(clusters) {
		m.Errorf("%d requests, %d failed %v, answered by %v, want %v", r.Requests, r.Failed, r.Errors, r.By, clusters)
	}
	for _, c := range clusters {
		if r.By[c] == 0 {
			m.Errorf("nothing was answered by %s: %v", c, r.By)
		}
	}
}

// during runs fn under traffic from a cluster's client, and returns what came of the traffic, which ends after fn.
func (m *mesh) during(cluster string, rate int, fn func()) *LoadResult {
	m.Helper()
	var wg sync.WaitGroup
	var total *LoadResult
	var failed error
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			r, err := m.load(m.Context(), cluster, rate, time.Second)
			if err != nil {
				failed = err
				return
			}
			total = total.plus(r)
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	func() {
		defer wg.Wait()
		defer close(stop)
		fn()
	}()
	if failed != nil {
		m.Fatal(failed)
	}
	return total
}

func (r *LoadResult) plus(s *LoadResult) *LoadResult {
	if r == nil {
		return s
	}
	r.Requests += s.Requests
	r.Failed += s.Failed
	for k, n := range s.By {
		r.By[k] += n
	}
	for k, n := range s.Errors {
		r.Errors[k] += n
	}
	return r
}

func TestGlobalService(t *testing.T) {
	m := newMesh(t)
	ctx := t.Context()
	for _, c := range []string{"east", "west"} {
		r, err := m.load(ctx, c, 200, time.Second)
		m.wantAll(r, err, "east", "west")
	}

	t.Run("taking backends away and back", func(t *testing.T) {
		r := m.during("east", 200, func() {
			for _, pod := range []string{"shop-node1", "shop-node2"} {
				if _, err := m.bed.DeletePod(ctx, "east", pod, DefaultGrace); err != nil {
					t.Fatal(err)
				}
			}
			m.waitBackends(2)
		})
		m.wantAll(r, nil, "east", "west")
		r, err := m.load(ctx, "east", 200, time.Second)
		m.wantAll(r, err, "west")
		m.server("east", "node1", "shop-node1")
		m.waitBackends(3)
		r, err = m.load(ctx, "east", 200, time.Second)
		m.wantAll(r, err, "east", "west")
	})

	t.Run("the VNI is the client's identity", func(t *testing.T) {
		vnis := m.sniffVNIs(func() {
			if _, err := m.load(ctx, "east", 100, 500*time.Millisecond); err != nil {
				t.Fatal(err)
			}
		})
		client := m.bed.Client("east", "node1")
		defer client.Close()
		endpoints, err := client.Endpoints(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var want identity.Number
		for _, e := range endpoints {
			if e.Name == "client" {
				want = e.Identity
			}
		}
		// The third address of a node's pod range is its end of the tunnel.
		node1, west1, west2 := "10.1.1.2", "10.2.1.2", "10.2.2.2"
		if want == 0 || vnis[[2]string{node1, west1}] != want || vnis[[2]string{node1, west2}] != want {
			t.Errorf("packets from the client's node to west carry %v, want %d", vnis, want)
		}
		if back := vnis[[2]string{west1, node1}]; back.Cluster() != 2 {
			t.Errorf("answers carry %d, which is not of cluster 2", back)
		}
	})
}

// sniffVNIs returns the VNI that pods' VXLAN packets in WireGuard carried at both ends of it while fn ran, by source and destination.
func (m *mesh) sniffVNIs(fn func()) map[[2]string]identity.Number {
	m.Helper()
	var mu sync.Mutex
	vnis := map[[2]string]identity.Number{}
	see := func(p []byte) {
		// IPv4 without options, UDP to port 4789, VXLAN (RFC 7348).
		if len(p) < 36 || p[0] != 0x45 || p[9] != 17 || binary.BigEndian.Uint16(p[22:]) != 4789 {
			return
		}
		number := identity.Number(binary.BigEndian.Uint32(p[32:]) >> 8)
		if number.Reserved() {
			return // an echo of a node's own
		}
		from, to := netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
		mu.Lock()
		defer mu.Unlock()
		vnis[[2]string{from.String(), to.String()}] = number
	}
	var taps []*tap
	for _, node := range []string{"east/node1", "west/node1", "west/node2"} {
		at, _ := ParseNode(node)
		s, err := newTap(m.bed.nodeNS(at.Cluster, at.Node), see)
		if err != nil {
			m.Fatal(err)
		}
		taps = append(taps, s)
	}
	fn()
	for _, s := range taps {
		if _, err := s.stop(); err != nil {
			m.Error(err)
		}
	}
	return vnis
}

// An agent that is killed and started again loses no request, and no established connection.
func TestAgentRestartsUnderTraffic(t *testing.T) {
	m := newMesh(t)
	victim := Victim{Kind: "agent", Cluster: "east", Node: "node1"}
	rounds := 20
	if testing.Short() {
		rounds = 3
	}
	pod := m.server("west", "node2", "kept")
	m.waitBackends(5)
	endKept := m.keepConnection("east", "client", pod.Address)
	r := m.during("east", 500, func() {
		for range rounds {
			if err := m.bed.Kill(t.Context(), victim); err != nil {
				t.Fatal(err)
			}
			if err := m.bed.Start(t.Context(), victim); err != nil {
				t.Fatal(err)
			}
		}
	})
	m.wantAll(r, nil, "east", "west")
	t.Logf("%d requests, %d failed", r.Requests, r.Failed)
	if requests, connections, err := endKept(); err != nil || connections != 1 || requests == 0 {
		t.Errorf("on one kept connection: %d requests on %d connections, %v", requests, connections, err)
	}
	m.waitBackends(5)
}

// keepConnection sends requests from a pod's namespace to a server, one after the other, on a connection that is kept. The
// function that it returns ends that, and says how many requests went over how many connections.
func (m *mesh) keepConnection(cluster, pod string, server netip.Addr) (end func() (requests, connections int, err error)) {
	var requests, connections int
	var failed error
	transport := &http.Transport{MaxConnsPerHost: 1, DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		connections++
		nsErr := inNS(m.bed.podNS(cluster, pod), func() error {
			conn, err = new(net.Dialer).DialContext(ctx, network, address)
			return err
		})
		return conn, nsErr
	}}
	ctx, cancel := context.WithCancel(m.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
		for failed == nil && pause(ctx, 10*time.Millisecond) == nil {
			_, failed = ask(client, fmt.Sprintf("http://%s:8080/", server))
			requests++
		}
	})
	return func() (int, int, error) {
		cancel()
		wg.Wait()
		transport.CloseIdleConnections()
		return requests, connections, failed
	}
}

// A store that is away changes nothing; when it is back everything is synced, and no entry of any kernel map was touched.
func TestStoreAwayUnderTraffic(t *testing.T) {
	m := newMesh(t)
	ctx := t.Context()
	victim := Victim{Kind: "kvstore", Cluster: "west"}
	before := strings.Join(m.kernel("east", "node1"), " ")
	var flapped string
	r := m.during("east", 200, func() {
		watchCtx, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() {
			for pause(watchCtx, 5*time.Millisecond) == nil {
				if now := strings.Join(m.kernel("east", "node1"), " "); now != before {
					flapped = now
				}
			}
		})
		defer wg.Wait()
		defer stop()
		if err := m.bed.Kill(ctx, victim); err != nil {
			t.Fatal(err)
		}
		m.eventually("east notices", func() string {
			client := m.bed.Client("east", "node1")
			defer client.Close()
			if st, err := client.Status(ctx); err != nil || st.OK {
				return fmt.Sprintf("status ok, %v", err)
			}
			return ""
		})
		if err := m.bed.Start(ctx, victim); err != nil {
			t.Fatal(err)
		}
		m.eventually("all is well again", func() string {
			st, err := m.bed.Status(ctx)
			if err != nil || !st.OK {
				return fmt.Sprintf("%+v, %v", st, err)
			}
			return ""
		})
	})
	m.wantAll(r, nil, "east", "west")
	if flapped != "" {
		t.Errorf("the kernel had %s, then %s", before, flapped)
	}
	m.server("west", "node1", "late")
	m.waitBackends(5)
}

// A node that was cut off comes back with its pods; a pod that went while its agent was away is forgotten.
func TestNodeReturns(t *testing.T) {
	m := newMesh(t)
	ctx := t.Context()
	node := Victim{Kind: "node", Cluster: "west", Node: "node2"}
	if err := m.bed.Kill(ctx, node); err != nil {
		t.Fatal(err)
	}
	if err := m.bed.Start(ctx, node); err != nil {
		t.Fatal(err)
	}
	m.waitBackends(4)
	r, err := m.load(ctx, "east", 200, time.Second)
	m.wantAll(r, err, "east", "west")

	agent := Victim{Kind: "agent", Cluster: "west", Node: "node2"}
	if err := m.bed.Kill(ctx, agent); err != nil {
		t.Fatal(err)
	}
	if warning, err := m.bed.DeletePod(ctx, "west", "shop-node2", 0); err != nil || warning == "" {
		t.Fatalf("%q, %v", warning, err)
	}
	if err := m.bed.Start(ctx, agent); err != nil {
		t.Fatal(err)
	}
	m.waitBackends(3)
}

// Clusters that cannot reach each other go on by themselves, and find each other again.
func TestPartitionedClusters(t *testing.T) {
	m := newMesh(t)
	ctx := t.Context()
	if err := m.bed.Partition(ctx, Partition{A: "east", B: "west", Loss: 100}); err != nil {
		t.Fatal(err)
	}
	m.server("east", "node1", "meanwhile")
	m.eventually("east's own new backend", func() string {
		if got := m.kernel("east", "node2"); len(got) != 5 {
			return fmt.Sprint(got)
		}
		return ""
	})
	if got := m.kernel("west", "node1"); len(got) != 4 {
		t.Errorf("west has %q behind the partition", got)
	}
	if err := m.bed.HealAll(ctx); err != nil {
		t.Fatal(err)
	}
	m.waitBackends(5)
	r, err := m.load(ctx, "west", 200, time.Second)
	m.wantAll(r, err, "east", "west")
}

// A store that somebody else can write to is the way in for everything that is wrong. Whatever it is, it is refused
// with a reason, and nothing else is disturbed.
func TestBadEntriesAreRefusedAndShown(t *testing.T) {
	m := newMesh(t)
	store := m.store("west")
	before := m.kernel("east", "node1")
	nodeEntry := func(name, address, podCIDR string) []byte {
		return identity.EncodeNode(identity.Node{
			Cluster: "west", ClusterID: 2, Name: name, Address: netip.MustParseAddr(address), PodCIDRs: []netip.Prefix{netip.MustParsePrefix(podCIDR)},
			Instance: "another-machine-0123456789", Version: identity.Version{Incarnation: 1, Sequence: 1},
		})
	}
	addressEntry := func(ip, node string, id identity.Number) []byte {
		return identity.EncodeAddress(identity.Address{
			Cluster: "west", ClusterID: 2, Prefix: netip.MustParsePrefix(ip + "/32"), Identity: id, Node: node, Endpoint: "default/x",
			Version: identity.Version{Incarnation: 1, Sequence: 1},
		})
	}
	bad := map[string]struct {
		value  []byte
		reason string
	}{
		"nodes/west/node7":          {[]byte("not JSON"), "node entry"},
		"nodes/west/node8":          {nodeEntry("node8", "172.29.2.11", "10.2.8.0/24"), "is node west/node1's already"},
		"nodes/west/node9":          {nodeEntry("node9", "172.29.2.19", "10.1.1.0/24"), "outside of cluster west's"},
		"addresses/west/10.1.1.2":   {addressEntry("10.1.1.2", "node1", identity.Compose(2, 400)), "outside of node west/node1's"},
		"addresses/west/10.2.1.99":  {addressEntry("10.2.1.99", "node1", identity.Compose(1, 400)), "belongs to cluster 1"},
		"addresses/west/10.2.1.98":  {addressEntry("10.2.1.98", "nobody", identity.Compose(2, 400)), "node west/nobody"},
		"services/west/default/bad": {[]byte(`{"affinity":"nearby"}`), "service entry"},
		"nonsense":                  {[]byte("x"), "unknown kind"},
	}
	for key, entry := range bad {
		if err := store.Put(t.Context(), kvstore.Prefix+key, entry.value); err != nil {
			t.Fatal(err)
		}
	}
	east := m.bed.Client("east", "node1")
	defer east.Close()
	refused := func() map[string]string {
		status, err := east.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		shown := map[string]string{}
		for _, r := range status.Refusals {
			shown[strings.TrimPrefix(r.Key, kvstore.Prefix)] = r.Reason
		}
		return shown
	}
	m.eventually("refusals in status", func() string {
		shown := refused()
		for key, entry := range bad {
			if !strings.Contains(shown[key], entry.reason) {
				return fmt.Sprintf("%s: %q, want %q", key, shown[key], entry.reason)
			}
		}
		return ""
	})
	if after := m.kernel("east", "node1"); !slices.Equal(after, before) {
		t.Errorf("the service's backends were %q, and are %q", before, after)
	}
	r, err := m.load(t.Context(), "east", 200, time.Second)
	m.wantAll(r, err, "east", "west")
	for key := range bad {
		if err := store.Delete(t.Context(), kvstore.Prefix+key); err != nil {
			t.Fatal(err)
		}
	}
	m.eventually("what is gone is shown no more", func() string {
		if shown := refused(); len(shown) > 0 {
			return fmt.Sprint(shown)
		}
		return ""
	})
}

// store opens a cluster's store with its own agents' certificate.
func (m *mesh) store(cluster string) kvstore.Store {
	m.Helper()
	return m.storeWith(cluster, m.bed.pki(cluster), "agent.crt", "agent.key", "ca.crt")
}
