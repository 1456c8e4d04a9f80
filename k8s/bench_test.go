package k8s

import (
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/ptr"

	"causeway/clustermesh"
)

// benchSlice is an EndpointSlice as Kubernetes' controller writes it.
func benchSlice(service string, slice, endpoints int) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "bench", Name: fmt.Sprintf("%s-%05d", service, slice), UID: types.UID(fmt.Sprintf("%036d", slice)), ResourceVersion: "1",
			Labels:          map[string]string{discoveryv1.LabelServiceName: service, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: service, UID: types.UID(fmt.Sprintf("%036d", slice))}},
			ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", Operation: "Update", FieldsV1: metav1.NewFieldsV1(strings.Repeat("f", 800))}},
		},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: ptr.To("http"), Port: ptr.To[int32](8080), Protocol: ptr.To(corev1.ProtocolTCP)}},
	}
	for i := range endpoints {
		n := slice*endpoints + i
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{fmt.Sprintf("10.%d.%d.%d", n>>16, n>>8&255, n&255)},
			Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)},
			NodeName:   ptr.To(fmt.Sprintf("node-%d", n%100)),
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "bench", Name: fmt.Sprintf("%s-7d4b9c-%05d", service, n), UID: types.UID(fmt.Sprintf("%036d", n))},
			Zone:       ptr.To("zone-a"),
		})
	}
	return s
}

func benchService(name string, i int) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "bench", Name: name, UID: types.UID(fmt.Sprintf("%036d", i)), Annotations: map[string]string{"example.org/a": "b"}},
		Spec: corev1.ServiceSpec{
			ClusterIP: fmt.Sprintf("10.96.%d.%d", i>>8, i&255), ClusterIPs: []string{fmt.Sprintf("10.96.%d.%d", i>>8, i&255)}, Selector: map[string]string{"app": name},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80}},
		},
	}
}

// wire returns an object as it comes over the wire, so that it is made of as many pieces of memory.
func wire[T any, P interface {
	*T
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
}](object P) P {
	data, err := object.Marshal()
	if err != nil {
		panic(err)
	}
	read := P(new(T))
	if err := read.Unmarshal(data); err != nil {
		panic(err)
	}
	return read
}

func benchSource(b *testing.B) (*Source, *clustermesh.Tables) {
	tables, err := clustermesh.NewTables()
	if err != nil {
		b.Fatal(err)
	}
	s := newSource(Config{Node: "node-1", Cluster: "east", ClusterID: 1, Tables: tables, Refusals: clustermesh.NewRefusals(), Log: slog.New(slog.DiscardHandler)})
	close(s.synced)
	return s, tables
}

func (s *Source) serviceStore() *store[*corev1.Service] {
	return &store[*corev1.Service]{s: s, kind: kind[*corev1.Service]{slim: slimService, all: s.services.all, put: s.services.put, drop: s.services.drop, tables: true}}
}

func (s *Source) sliceStore() *store[*discoveryv1.EndpointSlice] {
	return &store[*discoveryv1.EndpointSlice]{
		s: s, kind: kind[*discoveryv1.EndpointSlice]{slim: slimSlice, all: s.endpointSlices.all, put: s.endpointSlices.put, drop: s.endpointSlices.drop, tables: true},
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkMemory measures what 10,000 services with 10 endpoints each take: all together, and what an informer's store with slimmed objects would take besides.
func BenchmarkMemory(b *testing.B) {
	const services, endpoints = 10_000, 10
	perThousand := func(bytes uint64) float64 { return float64(bytes) / (services * endpoints / 1000) }
	b.Run("rows", func(b *testing.B) {
		for b.Loop() {
			before := heap()
			s, tables := benchSource(b)
			into, slicesInto := s.serviceStore(), s.sliceStore()
			for i := range services {
				name := fmt.Sprintf("shop-%05d", i)
				if err := into.Add(wire(benchService(name, i))); err != nil {
					b.Fatal(err)
				}
				if err := slicesInto.Add(wire(benchSlice(name, i, endpoints))); err != nil {
					b.Fatal(err)
				}
			}
			all := heap() - before
			b.ReportMetric(perThousand(all), "bytes/1000-endpoints")
			known := len(s.endpointSlices.known)
			s.endpointSlices, s.services = nil, nil
			b.ReportMetric(perThousand(all-(heap()-before)), "beside-rows-bytes/1000-endpoints")
			if n := tables.Backends.NumObjects(tables.DB.ReadTxn()); n != services*endpoints || known != services {
				b.Fatal(n, known)
			}
		}
	})
	b.Run("informer-besides", func(b *testing.B) {
		for b.Loop() {
			before := heap()
			objects := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
			for i := range services {
				slice := wire(benchSlice(fmt.Sprintf("shop-%05d", i), i, endpoints))
				slimSlice(slice)
				service := wire(benchService(fmt.Sprintf("shop-%05d", i), i))
				slimService(service)
				service.Name = "service-" + service.Name // the same store
				if objects.Add(slice) != nil || objects.Add(service) != nil {
					b.Fatal("not added")
				}
			}
			b.ReportMetric(perThousand(heap()-before), "bytes/1000-endpoints")
			runtime.KeepAlive(objects)
		}
	})
}

// BenchmarkEndpointChange is what one endpoint's change costs in a service of 10,000: the whole slice comes over the wire, and one row is written.
func BenchmarkEndpointChange(b *testing.B) {
	s, tables := benchSource(b)
	into := s.sliceStore()
	var changed *discoveryv1.EndpointSlice
	for i := range 100 {
		changed = benchSlice("shop", i, 100)
		if err := into.Add(wire(changed)); err != nil {
			b.Fatal(err)
		}
	}
	var versions [2][]byte
	for i := range versions {
		changed.Endpoints[50].Conditions.Ready = ptr.To(i == 0)
		changed.Endpoints[50].Conditions.Terminating = ptr.To(i == 1)
		data, err := changed.Marshal()
		if err != nil {
			b.Fatal(err)
		}
		versions[i] = data
	}
	before := tables.Backends.Revision(tables.DB.ReadTxn())
	b.ReportAllocs()
	n, cpu := 0, cpuTime(b)
	for b.Loop() {
		n++
		var slice discoveryv1.EndpointSlice
		if err := slice.Unmarshal(versions[n%2]); err != nil {
			b.Fatal(err)
		}
		if err := into.Update(&slice); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpuTime(b)-cpu).Nanoseconds())/float64(n), "cpu-ns/op")
	if rows := int(tables.Backends.Revision(tables.DB.ReadTxn()) - before); rows > n || rows < n-1 {
		b.Fatalf("%d changes wrote %d rows", n, rows)
	}
}

// cpuTime is what this process has used so far, on a machine that others use too.
func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
