package k8s

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/statedb"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"causeway/clustermesh"
	"causeway/lb"
)

// inWest is a backend of cluster west.
func inWest(service lb.Name, address, slice string, change ...func(*lb.Backend)) lb.Backend {
	b := lb.Backend{
		Cluster: "west", ClusterID: 2, Service: service, Address: netip.MustParseAddr(address), Node: "node7", Slice: slice,
		Ports: []lb.BackendPort{{Name: "http", Protocol: lb.TCP, Port: 8080}},
	}
	for _, f := range change {
		f(&b)
	}
	return b
}

// mirrorText is what EndpointSlices say: "CLUSTER: PORTS: ADDRESS CONDITIONS…", sorted.
func mirrorText(list []discoveryv1.EndpointSlice) []string {
	out := []string{}
	for _, s := range list {
		text := s.Labels[LabelSourceCluster] + ":"
		for _, p := range s.Ports {
			text += fmt.Sprintf(" %s=%d/%s", *p.Name, *p.Port, *p.Protocol)
		}
		for _, e := range s.Endpoints {
			text += "; " + e.Addresses[0] + " "
			for i, condition := range []*bool{e.Conditions.Ready, e.Conditions.Serving, e.Conditions.Terminating} {
				if *condition {
					text += "rst"[i : i+1]
				}
			}
			if e.Hostname != nil {
				text += " " + *e.Hostname
			}
		}
		out = append(out, text)
	}
	slices.Sort(out)
	return out
}

func TestMirrorSlices(t *testing.T) {
	name := lb.Name{Namespace: "web", Name: "shop"}
	terminating := func(b *lb.Backend) { b.Terminating = true }
	other := func(b *lb.Backend) { b.Ports = []lb.BackendPort{{Name: "http", Protocol: lb.TCP, Port: 9090}} }
	named := func(b *lb.Backend) { b.Hostname = "shop-0" }
	for _, test := range []struct {
		name      string
		endpoints []mirrorEndpoint
		want      []string
	}{
		{"none", nil, []string{}},
		{"one slice is one", []mirrorEndpoint{{inWest(name, "10.2.0.6", "a", named), false}, {inWest(name, "10.2.0.5", "a"), false}}, []string{"west: http=8080/TCP; 10.2.0.5 rs; 10.2.0.6 rs shop-0"}},
		{"two are two", []mirrorEndpoint{{inWest(name, "10.2.0.5", "a"), false}, {inWest(name, "10.2.0.6", "b"), false}}, []string{"west: http=8080/TCP; 10.2.0.5 rs", "west: http=8080/TCP; 10.2.0.6 rs"}},
		{"families", []mirrorEndpoint{{inWest(name, "10.2.0.5", "a"), false}, {inWest(name, "fd00:2::5", "a"), false}}, []string{"west: http=8080/TCP; 10.2.0.5 rs", "west: http=8080/TCP; fd00:2::5 rs"}},
		{"ports", []mirrorEndpoint{{inWest(name, "10.2.0.5", "a"), false}, {inWest(name, "10.2.0.6", "a", other), false}}, []string{"west: http=8080/TCP; 10.2.0.5 rs", "west: http=9090/TCP; 10.2.0.6 rs"}},
		{"conditions", []mirrorEndpoint{{inWest(name, "10.2.0.5", "a", terminating), false}, {inWest(name, "10.2.0.6", "a"), true}}, []string{"west: http=8080/TCP; 10.2.0.5 st; 10.2.0.6 "}},
	} {
		var list []discoveryv1.EndpointSlice
		for key, s := range mirrorSlices(name, "uid", test.endpoints) {
			if !strings.HasPrefix(key, "shop-west-") || s.Name != key || s.Namespace != "web" || s.OwnerReferences[0].UID != "uid" ||
				s.Labels[discoveryv1.LabelServiceName] != "shop" || s.Labels[discoveryv1.LabelManagedBy] != ManagedBy || (s.AddressType == "IPv4") != strings.Contains(s.Endpoints[0].Addresses[0], ".") {
				t.Errorf("%s: %s is %+v", test.name, key, s)
			}
			list = append(list, *s)
		}
		if got := mirrorText(list); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

// TestMirror has EndpointSlices of a real API server follow what another cluster has.
func TestMirror(t *testing.T) {
	api := startAPIServer(t)
	h := newHarness(t, api, api.kubeconfig(t, adminToken)).run().waitSynced()
	namespace := h.namespace("mirror")
	name := lb.Name{Namespace: namespace, Name: "shop"}
	services := api.client.CoreV1().Services(namespace)
	object := plainService("shop")
	object.Annotations = map[string]string{lb.AnnotationGlobal: "true", lb.AnnotationSyncSlices: "true"}
	made, err := services.Create(t.Context(), object, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	h.wait(func(read statedb.ReadTxn) string {
		if s := h.service(read, name); s == nil || !s.Global {
			return "no global Service"
		}
		return ""
	})
	write := func(f func(statedb.WriteTxn) error) {
		t.Helper()
		txn := h.tables.DB.WriteTxn(h.tables.Services, h.tables.Backends)
		if err := f(txn); err != nil {
			t.Fatal(err)
		}
		txn.Commit()
	}
	put := func(b lb.Backend) {
		t.Helper()
		write(func(txn statedb.WriteTxn) error {
			_, _, err := h.tables.Backends.Insert(txn, clustermesh.NewRow(b))
			return err
		})
	}
	declare := func(cluster string, id uint8) {
		t.Helper()
		write(func(txn statedb.WriteTxn) error {
			_, _, err := h.tables.Services.Insert(txn, clustermesh.NewRow(lb.Service{
				Cluster: cluster, ClusterID: id, Name: name, Global: true, Shared: true, Ports: []lb.ServicePort{{Name: "http", Protocol: lb.TCP, Port: 80}},
			}))
			return err
		})
	}
	declare("west", 2)
	put(inWest(name, "10.2.0.5", "a"))
	put(inWest(name, "10.2.0.6", "b"))

	var settled atomic.Bool
	settled.Store(true)
	changed := make(chan struct{}, 1)
	lead := func() (end func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() {
			done <- h.Mirror(ctx, MirrorConfig{Changed: changed, Settled: func(cluster string) bool { return cluster == "north" || settled.Load() }, View: func(txn statedb.ReadTxn, name lb.Name) lb.ServiceView {
				return lb.ServiceView{Self: "east", SelfID: 1, Declared: h.tables.ServicesNamed(txn, name)}
			}})
		}()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	eps := api.client.DiscoveryV1().EndpointSlices(namespace)
	wait := func(what string, want ...string) []discoveryv1.EndpointSlice {
		t.Helper()
		watch, err := eps.Watch(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer watch.Stop()
		end := time.After(patience)
		for {
			list, err := eps.List(t.Context(), metav1.ListOptions{LabelSelector: discoveryv1.LabelManagedBy + "=" + ManagedBy})
			if err != nil {
				t.Fatal(err)
			}
			got := mirrorText(list.Items)
			if slices.Equal(got, want) {
				return list.Items
			}
			select {
			case <-watch.ResultChan():
			case <-end:
				t.Fatalf("%s: there are %q, want %q", what, got, want)
			}
		}
	}
	const five, six = "west: http=8080/TCP; 10.2.0.5 rs", "west: http=8080/TCP; 10.2.0.6 rs"
	end := lead()
	before := wait("at first", five, six)
	if o := before[0].OwnerReferences; len(o) != 1 || o[0].UID != made.UID || o[0].Kind != "Service" {
		t.Errorf("its owners are %+v", o)
	}
	put(inWest(name, "10.2.0.6", "b", func(b *lb.Backend) { b.Terminating = true }))
	const ends = "west: http=8080/TCP; 10.2.0.6 st"
	versions := map[string]string{}
	for _, s := range before {
		versions[s.Endpoints[0].Addresses[0]] = s.ResourceVersion
	}
	for _, s := range wait("one terminates", five, ends) {
		if a := s.Endpoints[0].Addresses[0]; (versions[a] == s.ResourceVersion) != (a == "10.2.0.5") {
			t.Errorf("the slice of %s was %s and is %s", a, versions[a], s.ResourceVersion)
		}
	}
	if own := h.tables.BackendsIn(h.tables.DB.ReadTxn(), "east", name, before[0].Name); len(own) > 0 {
		t.Errorf("what is mirrored is taken for this cluster's: %+v", own)
	}

	// Somebody changes them while nobody leads.
	end()
	if err := eps.Delete(t.Context(), before[0].Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := eps.Patch(t.Context(), before[1].Name, types.MergePatchType, []byte(`{"endpoints":[]}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	left := wait("changed by somebody", "west: http=8080/TCP")
	stale := left[0].DeepCopy()
	stale.ObjectMeta = metav1.ObjectMeta{Name: "shop-west-stale", Labels: stale.Labels}
	if _, err := eps.Create(t.Context(), stale, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// The next one has not read west's store.
	settled.Store(false)
	end = lead()
	defer func() { end() }()
	declare("north", 3)
	north := inWest(name, "10.3.0.5", "a", func(b *lb.Backend) { b.Cluster, b.ClusterID = "north", 3 })
	put(north)
	const asItWas = "west: http=8080/TCP"
	wait("west's is not known", "north: http=8080/TCP; 10.3.0.5 rs", asItWas, asItWas)
	north.Terminating = true
	put(north)
	wait("west's is not known", "north: http=8080/TCP; 10.3.0.5 st", asItWas, asItWas)
	write(func(txn statedb.WriteTxn) error {
		return clustermesh.Remove(txn, h.tables.Services, "north/"+name.String())
	})
	wait("north is gone", asItWas, asItWas)
	settled.Store(true)
	changed <- struct{}{}
	wait("repaired", five, ends)

	made.Annotations = map[string]string{lb.AnnotationGlobal: "true"}
	if made, err = services.Update(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	wait("the annotation is gone")
	made.Annotations = object.Annotations
	if _, err = services.Update(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	wait("it is back", five, ends)
	if err := services.Delete(t.Context(), "shop", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	wait("the Service is gone")
}
