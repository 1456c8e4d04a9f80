package lb

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

var shop = Service{
	Cluster: "east", ClusterID: 1, Name: Name{"web", "shop"}, Affinity: AffinityNone,
	ClusterIPs: []netip.Addr{netip.MustParseAddr("100.64.64.10")},
	Ports:      []ServicePort{{Name: "http", Protocol: TCP, Port: 80, TargetPort: 8080}},
	Selector:   map[string]string{"app": "shop"},
}

func shopEndpoint(i int) EndpointView {
	return EndpointView{
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})},
		ID:        fmt.Sprintf("web/shop-%d", i),
		Labels:    map[string]string{"app": "shop", "version": "2"},
		Ready:     true,
	}
}

func TestSelects(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Service, *EndpointView)
		want   bool
	}{
		{"as they are", func(*Service, *EndpointView) {}, true},
		{"not ready", func(_ *Service, e *EndpointView) { e.Ready = false }, false},
		{"another namespace", func(_ *Service, e *EndpointView) { e.ID = "dev/shop-1" }, false},
		{"another value", func(_ *Service, e *EndpointView) { e.Labels = map[string]string{"app": "cart"} }, false},
		{"label missing", func(_ *Service, e *EndpointView) { e.Labels = nil }, false},
		{"empty selector", func(s *Service, _ *EndpointView) { s.Selector = nil }, false},
		{"one of two labels", func(s *Service, _ *EndpointView) { s.Selector = map[string]string{"app": "shop", "tier": "a"} }, false},
	} {
		service, endpoint := shop, shopEndpoint(1)
		test.change(&service, &endpoint)
		if got := service.Selects(endpoint); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

func TestSlicesFor(t *testing.T) {
	var endpoints []EndpointView
	for i := range 250 {
		endpoints = append(endpoints, shopEndpoint(i+1))
	}
	first := SlicesFor("node1", shop, endpoints, nil)
	if names := sliceNames(first); !slices.Equal(names, []string{"node1", "node1.1", "node1.2"}) {
		t.Fatalf("slices %v", names)
	}
	for i := range first {
		first[i].Incarnation, first[i].Sequence = 1, uint64(i+1)
		if _, err := DecodeSlice(first[i].Key(), EncodeSlice(first[i])); err != nil {
			t.Error(err)
		}
	}

	// One backend of the first slice goes: only that slice is to be written.
	second := SlicesFor("node1", shop, endpoints[1:], first)
	if changed := sliceNames(changedSlices(second)); !slices.Equal(changed, []string{"node1"}) {
		t.Errorf("one backend's end changes slices %v", changed)
	}
	// Another comes: it takes the free place.
	second[0].Incarnation = 1
	third := SlicesFor("node1", shop, append(endpoints[1:], shopEndpoint(999)), second)
	if changed := changedSlices(third); len(changed) != 1 || changed[0].Slice != "node1" || len(changed[0].Backends) != 100 {
		t.Errorf("one backend's start changes slices %v", sliceNames(changed))
	}
	// All of the first slice go: it is not returned, the others stay as they are.
	third[0].Incarnation = 1
	last := SlicesFor("node1", shop, endpoints[100:], third)
	if names := sliceNames(last); !slices.Equal(names, []string{"node1.1", "node1.2"}) || len(changedSlices(last)) != 0 {
		t.Errorf("slices %v, changed %v", names, sliceNames(changedSlices(last)))
	}
	// A new target port changes them all.
	service := shop
	service.Ports = []ServicePort{{Name: "http", Protocol: TCP, Port: 80, TargetPort: 9090}}
	if changed := changedSlices(SlicesFor("node1", service, endpoints[100:], last)); len(changed) != 2 || changed[0].Ports[0].Port != 9090 {
		t.Errorf("changed %+v", changed)
	}
	if none := SlicesFor("node1", shop, nil, last); len(none) != 0 {
		t.Errorf("slices without endpoints: %v", sliceNames(none))
	}
}

func TestSlicesHaveTheServicesFamilies(t *testing.T) {
	both, old := shopEndpoint(1), shopEndpoint(2)
	both.Addresses = append(both.Addresses, netip.MustParseAddr("fd00:10:1::1"))
	four, six := netip.MustParseAddr("100.64.64.10"), netip.MustParseAddr("fd00:1::a")
	var before []Slice
	for _, test := range []struct {
		ips  []netip.Addr
		want []string
	}{
		{[]netip.Addr{four}, []string{"10.1.0.1", "10.1.0.2"}},
		{[]netip.Addr{six, four}, []string{"10.1.0.1", "10.1.0.2", "fd00:10:1::1"}},
		{[]netip.Addr{six}, []string{"fd00:10:1::1"}},
		{nil, []string{"10.1.0.1", "10.1.0.2", "fd00:10:1::1"}}, // headless
	} {
		service := shop
		service.ClusterIPs, service.Headless = test.ips, test.ips == nil
		before = SlicesFor("node1", service, []EndpointView{both, old}, before)
		var got []string
		for _, s := range before {
			for _, b := range s.Backends {
				got = append(got, b.Address.String())
			}
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("cluster IPs %s: backends %s, want %s", test.ips, got, test.want)
		}
	}
}

// TestSlicesLeaveOutNamedTargetPorts: an endpoint's labels don't tell what number a name has.
func TestSlicesLeaveOutNamedTargetPorts(t *testing.T) {
	service := shop
	service.Ports = []ServicePort{{Name: "admin", Protocol: TCP, Port: 81}, {Name: "http", Protocol: TCP, Port: 80, TargetPort: 8080}}
	for _, want := range [][]BackendPort{{{"http", TCP, 8080}}, {}} {
		got := SlicesFor("node1", service, []EndpointView{shopEndpoint(1)}, nil)
		if len(got) != 1 || !slices.Equal(got[0].Ports, want) || len(got[0].Backends) != 1 {
			t.Fatalf("slices %+v, want one with ports %v", got, want)
		}
		got[0].Incarnation = 1
		if _, err := DecodeSlice(got[0].Key(), EncodeSlice(got[0])); err != nil {
			t.Error(err)
		}
		service.Ports = service.Ports[:1]
	}
}

// TestSlicesForKeepsPlaces holds for any history: the slices have exactly the endpoints, none has
// more than it may, and a backend that stays, stays where it is.
func TestSlicesForKeepsPlaces(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	present := map[int]bool{}
	var before []Slice
	for range 300 {
		for range random.IntN(40) {
			i := random.IntN(400)
			present[i] = !present[i]
		}
		var endpoints []EndpointView
		for i, there := range present {
			if there {
				endpoints = append(endpoints, shopEndpoint(i))
			}
		}
		after := SlicesFor("node1", shop, endpoints, before)
		was, is := places(t, before), places(t, after)
		if len(is) != len(endpoints) {
			t.Fatalf("%d backends of %d endpoints", len(is), len(endpoints))
		}
		for address, slice := range is {
			if old, ok := was[address]; ok && old != slice {
				t.Fatalf("%s moved from %s to %s", address, old, slice)
			}
		}
		before = after
	}
}

func places(t *testing.T, all []Slice) map[netip.Addr]string {
	placed := map[netip.Addr]string{}
	for _, s := range all {
		if len(s.Backends) == 0 || len(s.Backends) > MaxSliceBackends {
			t.Fatalf("slice %s has %d backends", s.Slice, len(s.Backends))
		}
		for _, b := range s.Backends {
			placed[b.Address] = s.Slice
		}
	}
	return placed
}

func changedSlices(all []Slice) []Slice {
	return slices.DeleteFunc(slices.Clone(all), func(s Slice) bool { return s.Incarnation != 0 })
}

func sliceNames(all []Slice) []string {
	var names []string
	for _, s := range all {
		names = append(names, s.Slice)
	}
	return names
}
