package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"causeway/agent/api"
	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// newUnconnected brings up clusters that are not joined, with a server, a client and the service shop in each.
func newUnconnected(t *testing.T, nodes int, clusters ...string) *mesh {
	t.Helper()
	needRoot(t)
	program, err := realBinary()
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{T: t, bed: mustUp(t, Options{Binary: program, Clusters: clusters, Nodes: nodes, Unconnected: true})}
	for _, c := range clusters {
		m.server(c, "node1", "shop-1")
		m.pod(PodSpec{Cluster: c, Node: "node1", Name: "client", Labels: map[string]string{"app": "client"}, Command: []string{"sleep", "infinity"}})
		client := m.bed.Client(c, "node1")
		results, err := client.ApplyServices(t.Context(), []byte(shop))
		client.Close()
		if err != nil {
			t.Fatal(err)
		}
		if c == clusters[0] {
			m.shop = "http://" + results[0].ClusterIPs[0] + "/"
		}
	}
	return m
}

// peerOf returns what a node says of a peer; nil if it has none of the name.
func (m *mesh) peerOf(cluster, peer string) *api.Peer {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	peers, err := client.Peers(m.Context())
	if err != nil {
		m.Fatal(err)
	}
	for i := range peers {
		if peers[i].Name == peer {
			return &peers[i]
		}
	}
	return nil
}

func (m *mesh) wantConnected(cluster, peer string) {
	m.Helper()
	m.eventually(cluster+" and "+peer, func() string {
		p := m.peerOf(cluster, peer)
		if p == nil || p.State != "connected" {
			return fmt.Sprintf("%+v", p)
		}
		return ""
	})
}

func (m *mesh) connect(to, cluster string) time.Duration {
	m.Helper()
	began := time.Now()
	if err := m.bed.Connect(m.Context(), to, cluster); err != nil {
		m.Fatal(err)
	}
	return time.Since(began)
}

// TestJoin joins clusters by token as people do. It takes less than 5 s, traffic flows at once, and a third cluster learns of the second by the first.
func TestJoin(t *testing.T) {
	m := newUnconnected(t, 2, "west", "east", "north")
	m.shop = "http://" + m.serviceIP("east") + "/"
	if took := m.connect("west", "east"); took > 5*time.Second {
		t.Errorf("joining took %s, want at most 5 s", took)
	}
	r, err := m.load(t.Context(), "east", 100, time.Second)
	m.wantAll(r, err, "east", "west")
	m.wantConnected("east", "west")
	m.wantConnected("west", "east")

	m.connect("west", "north")
	for _, pair := range [][2]string{{"north", "east"}, {"north", "west"}, {"east", "north"}, {"west", "north"}} {
		m.wantConnected(pair[0], pair[1])
	}
	m.shop = "http://" + m.serviceIP("north") + "/"
	r, err = m.load(t.Context(), "north", 100, time.Second)
	m.wantAll(r, err, "east", "west", "north")
	m.wantReadOnly("east", "west")
}

func (m *mesh) serviceIP(cluster string) string {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	services, err := client.Services(m.Context())
	if err != nil {
		m.Fatal(err)
	}
	for _, s := range services {
		for _, d := range s.Declared {
			if d.Cluster == cluster {
				return d.ClusterIPs[0].String()
			}
		}
	}
	m.Fatalf("%s has no service", cluster)
	return ""
}

// asPeer opens a cluster's store with the certificate that a peer has there.
func (m *mesh) asPeer(cluster, peer string) kvstore.Store {
	m.Helper()
	dir := filepath.Join(m.bed.path(peer, "node1", "state", "peers", cluster))
	return m.storeWith(cluster, dir, "client.crt", "client.key", "ca.crt")
}

func (m *mesh) storeWith(cluster, dir, certFile, keyFile, caFile string) kvstore.Store {
	m.Helper()
	state, err := m.bed.State()
	if err != nil {
		m.Fatal(err)
	}
	c, err := state.cluster(cluster)
	if err != nil {
		m.Fatal(err)
	}
	store, err := kvstore.Dial(context.Background(), kvstore.Config{
		Endpoints: []string{kvstoreEndpoint(c.KVStore.Address)},
		CAFile:    filepath.Join(dir, caFile), CertFile: filepath.Join(dir, certFile), KeyFile: filepath.Join(dir, keyFile),
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			return m.bed.dialIn(ctx, m.bed.kvstoreNS(cluster), "tcp", address)
		},
	})
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { store.Close() })
	return store
}

// wantReadOnly checks that a peer's certificate reads what its cluster may read of another, and nothing else.
func (m *mesh) wantReadOnly(cluster, peer string) {
	m.Helper()
	store, ctx := m.asPeer(cluster, peer), m.Context()
	entries, err := store.List(ctx, kvstore.Prefix)
	if err != nil || len(entries) == 0 {
		m.Errorf("as %s in %s: %d entries, %v", peer, cluster, len(entries), err)
	}
	_, err1 := store.List(ctx, "causeway/")
	_, err2 := store.List(ctx, kvstore.PrivatePrefix)
	_, err3 := store.Get(ctx, "other")
	for what, err := range map[string]error{
		"a listing of all": err1, "of what is private": err2, "another key": err3, "a write": store.Put(ctx, kvstore.Prefix+"nodes/"+cluster+"/x", []byte("x")),
		"a deletion": store.Delete(ctx, kvstore.Prefix+"cluster"), "a leased write": store.Put(ctx, kvstore.Prefix+"x", []byte("x"), kvstore.Leased),
	} {
		if !errors.Is(err, kvstore.ErrDenied) {
			m.Errorf("as %s in %s, %s: %v, want it denied", peer, cluster, what, err)
		}
	}
}

// troubleshoot returns the verdict on a peer, and fails if it takes longer than 10 s.
func (m *mesh) troubleshoot(cluster, peer string) (verdict string) {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	began := time.Now()
	for ev, err := range client.Troubleshoot(m.Context(), api.TroubleshootRequest{Peer: peer}) {
		if err != nil {
			m.Fatal(err)
		}
		if ev.Check == nil {
			verdict = ev.Verdict
		}
	}
	if took := time.Since(began); took > 10*time.Second {
		m.Errorf("troubleshoot took %s", took)
	}
	return verdict
}

// TestStatusNeverLies breaks the connection in every way that one meets. Status says that it is not connected and why, troubleshoot names what
// is broken, and both are well again when it is.
func TestStatusNeverLies(t *testing.T) {
	m := newUnconnected(t, 1, "west", "east")
	ctx := t.Context()
	m.connect("west", "east")
	// drop loses what goes to WireGuard's ports: the key's in use, and that of one which may take its place.
	drop := func(oneWay bool) func() error {
		return func() (err error) {
			for _, port := range []uint16{51871, 51872} {
				err = errors.Join(err, m.bed.Partition(ctx, Partition{A: "east", B: "west", Loss: 100, OneWay: oneWay, Port: Port{Protocol: lb.UDP, Number: port}}))
			}
			return err
		}
	}
	heal := func() error { return m.bed.HealAll(ctx) }
	for _, fault := range []struct {
		name            string
		begin, end      func() error
		status, verdict string // what both say, as parts
	}{
		{"tunnel's port dropped", drop(false), heal, "UDP port 51871 (WireGuard)", "WireGuard UDP from east to west (172.29.1.11:51871/udp)"},
		{"tunnel's port dropped one way", drop(true), heal, "UDP port 51871 (WireGuard)", "WireGuard UDP"},
		{"too narrow a path", func() error { return m.bed.SetMTU(ctx, "east", "west", 600) }, heal, "path MTU", "path MTU"},
		{"stopped etcd", func() error { return m.bed.Kill(ctx, Victim{Kind: "kvstore", Cluster: "west"}) },
			func() error { return m.bed.Start(ctx, Victim{Kind: "kvstore", Cluster: "west"}) }, "store of cluster west", "TCP from east to west (172.29.1.2:2379/tcp)"},
		{"wrong clock", func() error { return m.bed.SetClock(ctx, "west", 5*time.Minute) }, func() error { return m.bed.SetClock(ctx, "west", 0) }, "clock", "the clocks differ by 5m0s"},
	} {
		t.Run(fault.name, func(t *testing.T) {
			m := &mesh{T: t, bed: m.bed, shop: m.shop}
			m.wantConnected("east", "west")
			if err := fault.begin(); err != nil {
				t.Fatal(err)
			}
			m.eventually("status", func() string {
				p := m.peerOf("east", "west")
				if p == nil || p.State != "not connected" || !strings.Contains(strings.Join(p.Why, "\n"), fault.status) {
					return fmt.Sprintf("%+v, want %q", p, fault.status)
				}
				return ""
			})
			if got := m.troubleshoot("east", "west"); !strings.Contains(got, fault.verdict) {
				t.Errorf("troubleshoot says %q, want %q", got, fault.verdict)
			}
			if err := fault.end(); err != nil {
				t.Fatal(err)
			}
			m.wantConnected("east", "west")
			if got := m.troubleshoot("east", "west"); got != "" {
				t.Errorf("all is well again, and troubleshoot says %q", got)
			}
		})
	}
	t.Run("expired certificate", func(t *testing.T) {
		m := &mesh{T: t, bed: m.bed, shop: m.shop}
		if err := m.bed.Expire(ctx, "east", "west"); err != nil {
			t.Fatal(err)
		}
		m.eventually("status", func() string {
			p := m.peerOf("east", "west")
			if p == nil || p.State != "not connected" || !strings.Contains(strings.Join(p.Why, "\n"), "expired") {
				return fmt.Sprintf("%+v", p)
			}
			return ""
		})
		if got := m.troubleshoot("east", "west"); !strings.Contains(got, "expired") {
			t.Errorf("troubleshoot says %q", got)
		}
		// A new token mends it.
		m.connect("west", "east")
		m.wantConnected("east", "west")
	})
}

// TestPeerGoneForGood disconnects a cluster that does not answer, and lets it come back: it is told, and can do nothing.
func TestPeerGoneForGood(t *testing.T) {
	m := newUnconnected(t, 1, "west", "east")
	ctx := t.Context()
	before := m.inForce("east")
	m.connect("west", "east")
	m.wantConnected("east", "west")
	m.wantConnected("west", "east")
	asWest := m.asPeer("east", "west")
	if err := m.bed.Kill(ctx, Victim{Kind: "cluster", Cluster: "west"}); err != nil {
		t.Fatal(err)
	}
	m.disconnect("east", "west")
	if m.peerOf("east", "west") != nil {
		t.Error("the peer is still shown")
	}
	if after := m.inForce("east"); !slices.Equal(after, before) {
		t.Errorf("in force were\n%s\nbefore the cluster was joined, and are after it was disconnected\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
	if files, _ := os.ReadDir(m.bed.path("east", "node1", "state", "peers")); len(files) > 0 {
		t.Errorf("files are left: %v", files)
	}
	if _, err := asWest.List(ctx, kvstore.Prefix); !errors.Is(err, kvstore.ErrDenied) {
		t.Errorf("its certificate still reads: %v", err)
	}
	m.disconnect("east", "west") // again: nothing to do

	if err := m.bed.Start(ctx, Victim{Kind: "cluster", Cluster: "west"}); err != nil {
		t.Fatal(err)
	}
	m.eventually("the peer is told", func() string {
		p := m.peerOf("west", "east")
		if p == nil || p.State != "left" || !strings.Contains(strings.Join(p.Why, " "), "peer left") {
			return fmt.Sprintf("%+v", p)
		}
		return ""
	})
	if after := m.inForce("east"); !slices.Equal(after, before) {
		t.Errorf("the peer came back, and in force are\n%s\ninstead of\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
}

func (m *mesh) disconnect(cluster, peer string) {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	began := time.Now()
	if _, err := client.Disconnect(m.Context(), peer, false); err != nil {
		m.Fatal(err)
	}
	if took := time.Since(began); took > time.Second {
		m.Errorf("disconnecting took %s, want at most 1 s", took)
	}
}

// inForce lists what a node has in its kernel and tables: addresses, backends, nodes, and routes and links in its namespace.
func (m *mesh) inForce(cluster string) (all []string) {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	addresses, err1 := client.BPFAddresses(m.Context())
	frontends, err2 := client.BPFLB(m.Context())
	nodes, err3 := client.Nodes(m.Context())
	if err := errors.Join(err1, err2, err3); err != nil {
		m.Fatal(err)
	}
	for _, a := range addresses {
		all = append(all, fmt.Sprintf("address %s %s %s", a.Prefix, a.Tunnel, a.Cluster))
	}
	for _, f := range frontends {
		for _, b := range append(f.Backends, f.Quarantined...) {
			all = append(all, fmt.Sprintf("backend %s:%d %s:%d", f.Address, f.Port, b.Address, b.Port))
		}
	}
	for _, n := range nodes {
		all = append(all, "node "+n.Cluster+"/"+n.Name)
	}
	for _, argv := range [][]string{{"ip", "-o", "route", "show", "table", "all"}, {"ip", "-o", "link"}} {
		var out bytes.Buffer
		if _, err := m.bed.Exec(m.Context(), Target{Cluster: cluster, Node: "node1"}, argv, Stdio{Out: &out}); err != nil {
			m.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			if strings.Contains(line, "fe80::") {
				continue // comes by itself, a while after the link
			}
			all = append(all, strings.TrimSpace(line))
		}
	}
	slices.Sort(all)
	return all
}

// TestJoinAndLeaveAgainAndAgain joins and leaves under traffic inside of each cluster, which is not disturbed; nothing grows.
func TestJoinAndLeaveAgainAndAgain(t *testing.T) {
	rounds := 3
	if soaking {
		rounds = 50
	}
	m := newUnconnected(t, 1, "west", "east")
	round := func() {
		m.connect("west", "east")
		m.disconnect("east", "west")
		m.eventually("the peer knows", func() string {
			if p := m.peerOf("west", "east"); p == nil || p.State != "left" {
				return fmt.Sprintf("%+v", p)
			}
			return ""
		})
	}
	east, west := m.local("east"), m.local("west")
	round() // what is made once is made
	before, beforeWest := m.sizes("east"), m.sizes("west")
	inForce := m.inForce("east")
	r := east.during("east", 50, func() {
		r := west.during("west", 50, func() {
			for range rounds {
				round()
			}
		})
		m.wantAll(r, nil, "west")
	})
	m.wantAll(r, nil, "east")
	if after := m.inForce("east"); !slices.Equal(after, inForce) {
		t.Errorf("in force were\n%s\nand are after %d rounds\n%s", strings.Join(inForce, "\n"), rounds, strings.Join(after, "\n"))
	}
	m.wantNoMore("east", before)
	m.wantNoMore("west", beforeWest)
	t.Logf("%d rounds; east before %+v, after %+v; west before %+v, after %+v", rounds, before, m.sizes("east"), beforeWest, m.sizes("west"))
}

func (m *mesh) wantNoMore(cluster string, before sizes) {
	m.Helper()
	m.eventually("nothing has grown in "+cluster, func() string {
		after := m.sizes(cluster)
		switch {
		case after.goroutines > before.goroutines+5:
			return fmt.Sprintf("%d goroutines, before %d", after.goroutines, before.goroutines)
		case after.heap > before.heap+16<<20:
			return fmt.Sprintf("%d bytes of heap, before %d", after.heap, before.heap)
		case after.keys > before.keys:
			return fmt.Sprintf("%d keys in the store, before %d", after.keys, before.keys)
		}
		return ""
	})
}

// home is a service of a cluster's own, with the servers of shop.
const home = `apiVersion: v1
kind: Service
metadata: {name: home}
spec:
  selector: {app: shop}
  ports: [{port: 80, targetPort: 8080}]
`

// local is the mesh with a service of a cluster's own in place of the global one.
func (m *mesh) local(cluster string) *mesh {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	results, err := client.ApplyServices(m.Context(), []byte(home))
	if err != nil {
		m.Fatal(err)
	}
	return &mesh{T: m.T, bed: m.bed, shop: "http://" + results[0].ClusterIPs[0] + "/"}
}

// sizes are what may not grow.
type sizes struct {
	goroutines int
	heap       uint64
	keys       int
}

func (m *mesh) sizes(cluster string) (s sizes) {
	m.Helper()
	client := m.bed.Client(cluster, "node1")
	defer client.Close()
	var metrics struct {
		Goroutines     int
		HeapAllocBytes uint64
	}
	var bundle bytes.Buffer
	if err := client.Bundle(m.Context(), &bundle); err != nil {
		m.Fatal(err)
	}
	if err := json.Unmarshal(untar(m.T, &bundle)["metrics.json"], &metrics); err != nil {
		m.Fatal(err)
	}
	entries, err := m.store(cluster).List(m.Context(), "causeway/")
	if err != nil {
		m.Fatal(err)
	}
	return sizes{metrics.Goroutines, metrics.HeapAllocBytes, len(entries)}
}

// TestWipedStoreKeepsPeers loses all of a store's data. The agents know whom the cluster was joined with, and give the store back what it
// needs, so that nothing has to be joined again, and the peer takes it for no disconnect.
func TestWipedStoreKeepsPeers(t *testing.T) {
	m := newUnconnected(t, 1, "west", "east")
	ctx := t.Context()
	m.connect("west", "east")
	m.wantConnected("west", "east")
	store := Victim{Kind: "kvstore", Cluster: "west"}
	if err := m.bed.Kill(ctx, store); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(m.bed.path("west", kvstoreName, "data")); err != nil {
		t.Fatal(err)
	}
	if err := m.bed.Start(ctx, store); err != nil {
		t.Fatal(err)
	}
	m.eventually("the records are back", func() string {
		if _, err := m.store("west").Get(ctx, "causeway/private/v1/peers/east"); err != nil {
			return err.Error()
		}
		return ""
	})
	m.eventually("the peer reads again", func() string {
		if _, err := m.asPeer("west", "east").Get(ctx, "causeway/v1/heartbeat"); err != nil {
			return err.Error()
		}
		return ""
	})
	for _, pair := range [][2]string{{"west", "east"}, {"east", "west"}} {
		m.eventually("packets go both ways", func() string {
			if p := m.peerOf(pair[0], pair[1]); p == nil || p.State == "left" || !p.Out.OK {
				return fmt.Sprintf("%+v", p)
			}
			return ""
		})
	}
}

// TestIDsAreAssigned: clusters whose configurations have no ID get one. Should two that are joined have the same, the one that joins takes another,
// with all that is in it already.
func TestIDsAreAssigned(t *testing.T) {
	needRoot(t)
	program, err := realBinary()
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	m := &mesh{T: t, bed: mustUp(t, Options{Binary: program, Clusters: []string{"west", "east"}, Nodes: 2, Unconnected: true, AssignIDs: true})}
	for _, cluster := range []string{"west", "east"} {
		if err := m.store(cluster).Put(ctx, "causeway/private/v1/cluster-id", []byte("77")); err != nil {
			t.Fatal(err)
		}
		for _, node := range []string{"node1", "node2"} {
			m.eventually(cluster+"/"+node+" has the ID", func() string { return m.notID(cluster, node, 77) })
		}
		m.server(cluster, "node2", "shop-1")
		m.pod(PodSpec{Cluster: cluster, Node: "node1", Name: "client", Labels: map[string]string{"app": "client"}, Command: []string{"sleep", "infinity"}})
		client := m.bed.Client(cluster, "node1")
		if _, err := client.ApplyServices(ctx, []byte(shop)); err != nil {
			t.Fatal(err)
		}
		client.Close()
	}
	m.connect("west", "east")
	for _, node := range []string{"node1", "node2"} {
		m.eventually("east/"+node+" has another ID", func() string { return m.notID("east", node, 1) })
	}
	m.wantConnected("east", "west")
	m.wantConnected("west", "east")
	m.shop = "http://" + m.serviceIP("east") + "/"
	m.eventually("both serve", func() string {
		r, err := m.load(ctx, "east", 50, time.Second)
		if err != nil || r.Failed > 0 || len(r.By) != 2 {
			return fmt.Sprintf("%+v, %v", r, err)
		}
		return ""
	})
	for _, pair := range [][2]string{{"east", "west"}, {"west", "east"}} {
		client := m.bed.Client(pair[0], "node1")
		m.eventually("nothing is refused in "+pair[0], func() string {
			status, err := client.Status(ctx)
			if err != nil || !status.OK || len(status.Refusals) > 0 {
				return fmt.Sprintf("%+v, %v", status, err)
			}
			return ""
		})
		client.Close()
	}
}

// notID tells why a node does not have a cluster ID, or is not well with it.
func (m *mesh) notID(cluster, node string, id identity.ClusterID) string {
	m.Helper()
	client := m.bed.Client(cluster, node)
	defer client.Close()
	status, err := client.Status(m.Context())
	if err != nil || status.ClusterID != id || !status.OK {
		return fmt.Sprintf("%+v, %v", status, err)
	}
	return ""
}
