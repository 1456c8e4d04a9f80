package lb

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

const (
	clusterSliceKey   = "causeway/v1/slices/east/web/shop/_shop-x7k2p.1"
	clusterSliceValue = `{"cluster":"east","clusterID":1,"service":{"namespace":"web","name":"shop"},"slice":"_shop-x7k2p.1",` +
		`"incarnation":1790000000000000001,"sequence":7,"ports":[{"name":"http","protocol":"TCP","port":8080}],` +
		`"backends":[{"ip":"10.1.1.5","endpoint":"web/shop-1","node":"node1","terminating":true,"hostname":"shop-1"},{"ip":"10.1.9.6"}]}`
)

// TestDecodeClusterSlice: as JSON, and as it is stored.
func TestDecodeClusterSlice(t *testing.T) {
	got, err := DecodeSlice(clusterSliceKey, []byte(clusterSliceValue))
	if err != nil {
		t.Fatal(err)
	}
	if got.Key() != clusterSliceKey || !got.OfCluster() || !OfClusterKey(clusterSliceKey) || OfClusterKey(sliceKey) {
		t.Errorf("%+v is not known as the cluster's", got)
	}
	stored := EncodeSlice(got)
	if plain, err := Expand(stored); err != nil || string(plain) != clusterSliceValue {
		t.Errorf("stored %s, %v", plain, err)
	}
	again, err := DecodeSlice(clusterSliceKey, stored)
	if err != nil || !reflect.DeepEqual(again, got) {
		t.Errorf("stored and read again: %+v, %v", again, err)
	}
	ports := []BackendPort{{"http", TCP, 8080}}
	want := []Backend{
		{Cluster: "east", ClusterID: 1, Service: Name{"web", "shop"}, Address: netip.MustParseAddr("10.1.1.5"), Node: "node1",
			Endpoint: "web/shop-1", Ports: ports, Slice: "_shop-x7k2p.1", Terminating: true, Hostname: "shop-1"},
		{Cluster: "east", ClusterID: 1, Service: Name{"web", "shop"}, Address: netip.MustParseAddr("10.1.9.6"), Ports: ports, Slice: "_shop-x7k2p.1"},
	}
	if rows := got.Rows(); !reflect.DeepEqual(rows, want) {
		t.Errorf("rows %+v", rows)
	}
}

func TestDecodeClusterSliceRefuses(t *testing.T) {
	long := "_" + strings.Repeat("x", 254)
	for _, e := range []edit{
		{`"slice":"_shop-x7k2p.1"`, `"slice":"_shop-x7k2p"`, "of slice _shop-x7k2p of web/shop"},
		{`"slice":"_shop-x7k2p.1"`, `"slice":"shop-x7k2p.1"`, `slice name "shop-x7k2p.1" of no node's is not "_" and a DNS subdomain`},
		{`"slice":"_shop-x7k2p.1"`, `"slice":"_"`, "is not"},
		{`"slice":"_shop-x7k2p.1"`, `"slice":"__shop"`, "is not"},
		{`"slice":"_shop-x7k2p.1"`, `"slice":"_a/b"`, "is not"},
		{`"slice":"_shop-x7k2p.1"`, `"slice":"` + long + `"`, "is not"},
		{`"slice":"_shop-x7k2p.1",`, `"slice":"_shop-x7k2p.1","node":"node1",`, "neither node1 nor node1.NUMBER"},
		{`"node":"node1"`, `"node":"node/1"`, `backend 10.1.1.5: node "node/1" is not a DNS label`},
		{`"hostname":"shop-1"`, `"hostname":"shop.1"`, `backend 10.1.1.5: hostname "shop.1" is not a DNS label`},
		{`"incarnation":1790000000000000001`, `"incarnation":0`, "incarnation is missing"},
		{`"10.1.9.6"`, `"169.254.169.254"`, "is link-local"},
		{`"10.1.9.6"`, `"10.1.1.5"`, "given twice"},
	} {
		refuses(t, e, clusterSliceValue, func(v string) error {
			if _, err := DecodeSlice(clusterSliceKey, []byte(v)); err != nil {
				return err
			}
			_, err := DecodeSlice(clusterSliceKey, compress([]byte(v)))
			return err
		})
	}
	onNode2 := strings.Replace(sliceValue, `"ip":"10.1.1.6"`, `"ip":"10.1.1.6","node":"node2"`, 1)
	if _, err := DecodeSlice(sliceKey, []byte(onNode2)); err == nil || !strings.Contains(err.Error(), `on node "node2", in a slice of node node1's`) {
		t.Errorf("a node's slice with another node's backend: %v", err)
	}
}

func TestNoPortsAreForHeadlessServices(t *testing.T) {
	if _, err := DecodeSlice(clusterSliceKey, []byte(strings.Replace(clusterSliceValue, `[{"name":"http","protocol":"TCP","port":8080}]`, `null`, 1))); err != nil {
		t.Error(err)
	}
}

// TestExpandIsBounded: a few hundred bytes that would be megabytes are refused, and so is what is no frame.
func TestExpandIsBounded(t *testing.T) {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer encoder.Close()
	bomb := encoder.EncodeAll(make([]byte, 16<<20), nil)
	for name, value := range map[string][]byte{"bomb": bomb, "cut": compress([]byte(clusterSliceValue))[:40], "magic alone": zstdMagic, "long": append(compress(nil), make([]byte, MaxValue)...)} {
		if plain, err := Expand(value); err == nil || plain != nil {
			t.Errorf("%s: %d bytes came of %d, %v", name, len(plain), len(value), err)
		}
	}
	full := []byte(strings.Repeat("x", MaxValue))
	if plain, err := Expand(compress(full)); err != nil || len(plain) != MaxValue {
		t.Errorf("the largest value: %d bytes, %v", len(plain), err)
	}
}

func TestExportedService(t *testing.T) {
	s := Service{
		Cluster: "east", ClusterID: 1, Name: Name{"web", "shop"}, Global: true, Shared: true, Affinity: AffinityLocal,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("100.64.64.10")}, Ports: []ServicePort{{Protocol: TCP, Port: 80, TargetPort: 8080, NodePort: 30080}},
		Selector: map[string]string{"app": "shop"}, ExternalIPs: []netip.Addr{netip.MustParseAddr("203.0.113.7")},
		InternalLocal: true, ExternalLocal: true, HealthCheckNodePort: 31000, SessionAffinity: 60,
		Annotations: map[string]string{AnnotationGlobal: "true", "causeway.io/l7-retries": "1", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
	}
	want := s
	want.Ports = []ServicePort{{Protocol: TCP, Port: 80, TargetPort: 8080}}
	want.Selector, want.ExternalIPs, want.InternalLocal, want.ExternalLocal, want.HealthCheckNodePort = nil, nil, false, false, 0
	want.Annotations = map[string]string{AnnotationGlobal: "true", "causeway.io/l7-retries": "1"}
	if got := s.Exported(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if s.Ports[0].NodePort == 0 || len(s.Annotations) != 3 {
		t.Error("the service itself was changed")
	}
}

func TestClusterSliceRefusesTwoSetsOfPorts(t *testing.T) {
	backends := podBackends(2)
	backends[1].Ports = []BackendPort{{"http", TCP, 8081}}
	if _, err := ClusterSlice(backends); err == nil || !strings.Contains(err.Error(), "listen on different ports") {
		t.Errorf("%v", err)
	}
}

// podBackends are pods as Kubernetes names and spreads them.
func podBackends(n int) []Backend {
	random := rand.New(rand.NewPCG(1, 2))
	const letters = "bcdfghjklmnpqrstvwxz2456789"
	backends := make([]Backend, n)
	for i := range backends {
		suffix := make([]byte, 5)
		for j := range suffix {
			suffix[j] = letters[random.IntN(len(letters))]
		}
		node := random.IntN(100)
		backends[i] = Backend{
			Cluster: "east", ClusterID: 1, Service: Name{"web", "shop"}, Address: netip.AddrFrom4([4]byte{10, 1, byte(node), byte(i)}), Node: fmt.Sprintf("node%d", node),
			Endpoint: fmt.Sprintf("web/shop-frontend-6d4b75cb6d-%s", suffix), Ports: []BackendPort{{"http", TCP, 8080}, {"metrics", TCP, 9090}}, Slice: "shop-frontend-x7k2p",
		}
	}
	return backends
}

// TestAFullSliceIsSmall: a change of one backend writes one slice, which has to fit into 4 KiB with everything around it.
func TestAFullSliceIsSmall(t *testing.T) {
	slice, err := ClusterSlice(podBackends(MaxSliceBackends))
	if err != nil {
		t.Fatal(err)
	}
	slice.Incarnation, slice.Sequence = 1790000000000000001, 4711
	if err := CheckSlice(slice); err != nil {
		t.Fatal(err)
	}
	plain, stored := encode(slice), EncodeSlice(slice)
	t.Logf("%d bytes as JSON, %d as stored", len(plain), len(stored))
	if len(stored) > 2500 {
		t.Errorf("%d bytes as stored", len(stored))
	}
}

func BenchmarkEncodeClusterSlice(b *testing.B) {
	slice, err := ClusterSlice(podBackends(MaxSliceBackends))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		EncodeSlice(slice)
	}
}

func BenchmarkDecodeClusterSlice(b *testing.B) {
	slice, err := ClusterSlice(podBackends(MaxSliceBackends))
	if err != nil {
		b.Fatal(err)
	}
	slice.Incarnation = 1
	value := EncodeSlice(slice)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeSlice(slice.Key(), value); err != nil {
			b.Fatal(err)
		}
	}
}
