package k8s

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"causeway/lb"
)

// endpoint of a slice; its conditions are ready, serving and terminating as letters: "rst", "-" for none of these.
func endpoint(address, conditions string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{address}}
	if conditions != "" {
		has := func(c string) *bool { return ptr.To(strings.Contains(conditions, c)) }
		e.Conditions = discoveryv1.EndpointConditions{Ready: has("r"), Serving: has("s"), Terminating: has("t")}
	}
	return e
}

func slicePort(name string, number int32) discoveryv1.EndpointPort {
	return discoveryv1.EndpointPort{Name: &name, Port: &number}
}

func newSlice(name, service string, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{slicePort("http", 8080)}, Endpoints: endpoints,
	}
}

// waitBackends returns when a service has these backends: "ADDRESS SLICE", with " terminating".
func (h *harness) waitBackends(name lb.Name, want ...string) {
	h.t.Helper()
	h.wait(func(read statedb.ReadTxn) string {
		var got []string
		for _, b := range h.backends(read, name) {
			text := b.Address.String() + " " + b.Slice
			if b.Terminating {
				text += " terminating"
			}
			got = append(got, text)
		}
		if !reflect.DeepEqual(got, want) {
			return fmt.Sprintf("service %s has the backends %q, want %q", name, got, want)
		}
		return ""
	})
}

// testEndpointSlices follows the slices of one service.
func testEndpointSlices(t *testing.T, h *harness) {
	namespace := h.namespace("slices")
	slices := h.api.client.DiscoveryV1().EndpointSlices(namespace)
	apply := func(s *discoveryv1.EndpointSlice) {
		t.Helper()
		old, err := slices.Get(t.Context(), s.Name, metav1.GetOptions{})
		if err == nil {
			s.ResourceVersion = old.ResourceVersion
			_, err = slices.Update(t.Context(), s, metav1.UpdateOptions{})
		} else {
			_, err = slices.Create(t.Context(), s, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	remove := func(name string) {
		t.Helper()
		if err := slices.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	shop := lb.Name{Namespace: namespace, Name: "shop"}

	t.Run("fields", func(t *testing.T) {
		e := endpoint("10.1.0.7", "rs")
		e.Addresses = append(e.Addresses, "10.1.0.8") // which means nothing
		e.NodeName, e.Hostname, e.Zone = ptr.To("node1"), ptr.To("shop-0"), ptr.To("zone")
		e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: "shop-0.x"}
		s := newSlice("fields", "fields", e)
		s.Ports = []discoveryv1.EndpointPort{
			slicePort("http", 8080), {Name: ptr.To("dns"), Port: ptr.To[int32](53), Protocol: ptr.To(corev1.ProtocolUDP)},
			{Name: ptr.To("any")}, {Name: ptr.To("sig"), Port: ptr.To[int32](3868), Protocol: ptr.To(corev1.ProtocolSCTP)},
		}
		apply(s)
		want := []lb.Backend{{
			Cluster: "east", ClusterID: 1, Service: lb.Name{Namespace: namespace, Name: "fields"}, Address: netip.MustParseAddr("10.1.0.7"),
			Node: "node1", Endpoint: namespace + "/shop-0.x", Hostname: "shop-0", Slice: "fields",
			Ports: []lb.BackendPort{{Name: "http", Protocol: lb.TCP, Port: 8080}, {Name: "dns", Protocol: lb.UDP, Port: 53}},
		}}
		h.wait(func(read statedb.ReadTxn) string {
			if got := h.backends(read, want[0].Service); !reflect.DeepEqual(got, want) {
				return fmt.Sprintf("got %+v\nwant %+v", got, want)
			}
			return ""
		})
		s.Endpoints[0].Zone = ptr.To("other") // nothing that a row has
		revision := h.tables.Backends.Revision(h.tables.DB.ReadTxn())
		apply(s)
		s = newSlice("marker", "marker", endpoint("10.1.9.9", ""))
		apply(s)
		h.waitBackends(lb.Name{Namespace: namespace, Name: "marker"}, "10.1.9.9 marker")
		if got := h.tables.Backends.Revision(h.tables.DB.ReadTxn()); got != revision+1 {
			t.Errorf("the table changed %d times, want once, for the marker", got-revision)
		}
	})

	t.Run("conditions", func(t *testing.T) {
		apply(newSlice("shop-a", "shop", endpoint("10.1.0.1", ""), endpoint("10.1.0.2", "rs"), endpoint("10.1.0.3", "st"), endpoint("10.1.0.4", "t"),
			endpoint("10.1.0.5", "s"), endpoint("10.1.0.6", "-"), endpoint("10.1.0.7", "rst"), endpoint("240.1.2.3", "r")))
		h.waitBackends(shop, "10.1.0.1 shop-a", "10.1.0.2 shop-a", "10.1.0.3 shop-a terminating", "10.1.0.7 shop-a")
	})
	t.Run("other slices add, whoever wrote them", func(t *testing.T) {
		s := newSlice("shop-b", "shop", endpoint("fd00::1", ""))
		s.AddressType, s.Labels[discoveryv1.LabelManagedBy] = discoveryv1.AddressTypeIPv6, "someone.example.org"
		apply(s)
		s = newSlice("shop-fqdn", "shop", endpoint("example.org", ""))
		s.AddressType = discoveryv1.AddressTypeFQDN
		apply(s)
		s = newSlice("shop-ours", "shop", endpoint("10.2.0.1", ""))
		s.Labels[discoveryv1.LabelManagedBy] = ManagedBy
		apply(s)
		apply(newSlice("shop-a", "shop", endpoint("10.1.0.1", "")))
		h.waitBackends(shop, "10.1.0.1 shop-a", "fd00::1 shop-b")
	})
	t.Run("of an address in two slices the better word counts", func(t *testing.T) {
		apply(newSlice("shop-c", "shop", endpoint("10.1.0.1", ""), endpoint("10.1.0.2", "")))
		h.waitBackends(shop, "10.1.0.1 shop-a", "10.1.0.2 shop-c", "fd00::1 shop-b")
		apply(newSlice("shop-a", "shop", endpoint("10.1.0.1", "st")))
		h.waitBackends(shop, "10.1.0.1 shop-c", "10.1.0.2 shop-c", "fd00::1 shop-b")
		apply(newSlice("shop-c", "shop", endpoint("10.1.0.2", "")))
		h.waitBackends(shop, "10.1.0.1 shop-a terminating", "10.1.0.2 shop-c", "fd00::1 shop-b")
		apply(newSlice("shop-c", "shop", endpoint("10.1.0.1", ""), endpoint("10.1.0.2", "")))
		h.waitBackends(shop, "10.1.0.1 shop-c", "10.1.0.2 shop-c", "fd00::1 shop-b")
		remove("shop-c")
		h.waitBackends(shop, "10.1.0.1 shop-a terminating", "fd00::1 shop-b")
		apply(newSlice("shop-c", "shop", endpoint("10.1.0.1", "")))
		h.waitBackends(shop, "10.1.0.1 shop-c", "fd00::1 shop-b")
		remove("shop-a") // whose word was not the one that counted
		apply(newSlice("shop-c", "shop", endpoint("10.1.0.3", "")))
		h.waitBackends(shop, "10.1.0.3 shop-c", "fd00::1 shop-b")
		h.mu.Lock()
		defer h.mu.Unlock()
		if len(h.endpointSlices.doubles) > 0 {
			t.Errorf("remembered beyond need: %v", h.endpointSlices.doubles)
		}
	})
	t.Run("a slice that changes its service", func(t *testing.T) {
		apply(newSlice("shop-c", "cart", endpoint("10.1.0.3", "")))
		h.waitBackends(lb.Name{Namespace: namespace, Name: "cart"}, "10.1.0.3 shop-c")
		h.waitBackends(shop, "fd00::1 shop-b")
		s := newSlice("shop-b", "", endpoint("fd00::1", ""))
		s.AddressType, s.Labels = discoveryv1.AddressTypeIPv6, nil
		apply(s)
		h.waitBackends(shop)
	})
	t.Run("names that look like parts", func(t *testing.T) {
		apply(newSlice("x", "names", endpoint("10.1.0.1", "")))
		apply(newSlice("x.1", "names", endpoint("10.1.0.2", "")))
		apply(newSlice("x", "names", endpoint("10.1.0.3", "")))
		h.waitBackends(lb.Name{Namespace: namespace, Name: "names"}, "10.1.0.2 x.1.0", "10.1.0.3 x")
		remove("x")
		h.waitBackends(lb.Name{Namespace: namespace, Name: "names"}, "10.1.0.2 x.1.0")
	})
}

// testLargeSlice has one of more endpoints than a slice of ours, and changes one of them.
func testLargeSlice(t *testing.T, h *harness) {
	namespace := h.namespace("large")
	name := lb.Name{Namespace: namespace, Name: "shop"}
	slices := h.api.client.DiscoveryV1().EndpointSlices(namespace)
	const n = 2*lb.MaxSliceBackends + 50
	s := newSlice("large", "shop")
	for i := range n {
		s.Endpoints = append(s.Endpoints, endpoint(fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250), ""))
	}
	s, err := slices.Create(t.Context(), s, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var before map[netip.Addr]lb.Backend
	placed := func(want int) func(statedb.ReadTxn) string {
		return func(read statedb.ReadTxn) string {
			before = map[netip.Addr]lb.Backend{}
			parts := map[string]int{}
			for _, b := range h.backends(read, name) {
				before[b.Address] = b
				parts[b.Slice]++
			}
			if len(before) != want || parts["large"] > lb.MaxSliceBackends || parts["large.1"] > lb.MaxSliceBackends || parts["large.2"] > lb.MaxSliceBackends || len(parts) != 3 {
				return fmt.Sprintf("%d backends in the slices %v", len(before), parts)
			}
			return ""
		}
	}
	h.wait(placed(n))
	was := before
	s.Endpoints = s.Endpoints[1:]
	if s, err = slices.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	h.wait(placed(n - 1))
	s.Endpoints = append([]discoveryv1.Endpoint{endpoint("10.1.200.200", "")}, s.Endpoints...)
	if _, err = slices.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	h.wait(placed(n))
	moved := 0
	for a, b := range was {
		if now, ok := before[a]; ok && now.Slice != b.Slice {
			moved++
		}
	}
	if moved > 0 {
		t.Errorf("the change of one endpoint moved %d others", moved)
	}
	if err := slices.Delete(t.Context(), "large", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	h.waitBackends(name)
}

func TestPartNames(t *testing.T) {
	seen := map[string]string{}
	for _, object := range []string{"a", "a.1", "a.1.0", "a.b", "a.01", "a.1.1", "1"} {
		for part := range 3 {
			name := partName(object, part)
			if other, taken := seen[name]; taken {
				t.Errorf("%s part %d and %s have the name %s", object, part, other, name)
			}
			seen[name] = fmt.Sprintf("%s part %d", object, part)
			if got, ok := partOf(object, name); !ok || got != part {
				t.Errorf("%s is part %d (%v) of %s, want %d", name, got, ok, object, part)
			}
		}
	}
	for _, no := range []string{"b", "a.x", "a.-1", "a.01", "a.0", "a.1.1"} {
		if part, ok := partOf("a", no); ok {
			t.Errorf("%s is part %d of a", no, part)
		}
	}
}
