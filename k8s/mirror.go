package k8s

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"causeway/identity"
	"causeway/lb"
)

// LabelSourceCluster names the cluster that an EndpointSlice's endpoints are of (https://github.com/kubernetes/enhancements/tree/master/keps/sig-multicluster/1645-multi-cluster-services-api).
const LabelSourceCluster = "multicluster.kubernetes.io/source-cluster"

const (
	// mirrorCompare is how often what is mirrored is compared with what the API server has, as somebody else may change it.
	mirrorCompare = 5 * time.Minute
	// Pauses between two attempts to write: the first, doubled each time, up to the longest.
	mirrorRetry     = 200 * time.Millisecond
	mirrorRetryMost = 30 * time.Second
)

// MirrorConfig is what a mirror has to know of the agent.
type MirrorConfig struct {
	View func(statedb.ReadTxn, lb.Name) lb.ServiceView
	// Settled tells whether the tables have all that another cluster has, or will never have anything, as it is no peer: else what is mirrored of it stays as it is.
	Settled func(cluster string) bool
	// Changed gets a token when Settled may say something else.
	Changed <-chan struct{}
}

// Mirror writes other clusters' endpoints of this cluster's global services as EndpointSlices, where lb.MirroredClusters says so, until ctx ends. One agent of a cluster
// does that. Other writers' EndpointSlices are left alone, and no agent takes these for backends.
func (s *Source) Mirror(ctx context.Context, cfg MirrorConfig) error {
	t := s.cfg.Tables
	txn := t.DB.WriteTxn(t.Services, t.Backends, t.Targets)
	services, err1 := t.Services.Changes(txn)
	backends, err2 := t.Backends.Changes(txn)
	targets, err3 := t.Targets.Changes(txn) // which follow the lives of nodes
	if err := errors.Join(err1, err2, err3); err != nil {
		txn.Abort()
		return err
	}
	txn.Commit()
	defer services.Close()
	defer backends.Close()
	defer targets.Close()

	m := &mirror{Source: s, cfg: cfg, dirty: map[lb.Name]struct{}{}}
	compare := time.NewTicker(mirrorCompare)
	defer compare.Stop()
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	pause := mirrorRetry
	for {
		read := t.DB.ReadTxn()
		changed, moreServices := services.Next(read)
		for change := range changed {
			m.dirty[change.Object.Object.Name] = struct{}{}
		}
		moved, moreBackends := backends.Next(read)
		for change := range moved {
			m.dirty[change.Object.Object.Service] = struct{}{}
		}
		lived, moreTargets := targets.Next(read)
		for change := range lived {
			m.dirty[change.Object.Object.Port.Service] = struct{}{}
		}
		if err := m.step(ctx, read); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("other clusters' endpoints are not all mirrored, will be retried", "error", err)
			retry.Reset(pause)
			pause = min(2*pause, mirrorRetryMost)
		} else {
			pause = mirrorRetry
		}
		select {
		case <-moreServices:
		case <-moreBackends:
		case <-moreTargets:
		case <-retry.C:
		case <-compare.C:
			m.have = nil
		case <-cfg.Changed:
			m.all(t.DB.ReadTxn())
		case <-ctx.Done():
			return nil
		}
	}
}

// mirror is the work of Mirror.
type mirror struct {
	*Source
	cfg MirrorConfig
	// have are the EndpointSlices that the API server has, by service and name; nil if that is not known.
	have  map[lb.Name]map[string]mirrored
	dirty map[lb.Name]struct{}
}

// mirrored is an EndpointSlice that is there.
type mirrored struct {
	cluster string
	hash    uint64 // of what it says
}

// step brings the dirty services' EndpointSlices into step. What fails stays dirty.
func (m *mirror) step(ctx context.Context, read statedb.ReadTxn) error {
	if m.have == nil {
		if err := m.list(ctx); err != nil {
			return err
		}
		m.all(read)
	}
	var errs []error
	for name := range m.dirty {
		if err := m.service(ctx, read, name); err != nil {
			errs = append(errs, err)
			if apierrors.ReasonForError(err) == metav1.StatusReasonUnknown {
				break // nobody answers
			}
			continue
		}
		delete(m.dirty, name)
	}
	return errors.Join(errs...)
}

// all makes all services dirty, those that are gone too.
func (m *mirror) all(read statedb.ReadTxn) {
	for row := range m.Source.cfg.Tables.Services.All(read) {
		m.dirty[row.Object.Name] = struct{}{}
	}
	for name := range m.have {
		m.dirty[name] = struct{}{}
	}
}

// list reads what the API server has.
func (m *mirror) list(ctx context.Context) error {
	have := map[lb.Name]map[string]mirrored{}
	options := metav1.ListOptions{LabelSelector: discoveryv1.LabelManagedBy + "=" + ManagedBy, Limit: 500}
	for {
		var page discoveryv1.EndpointSliceList
		if err := m.slices.Get().Resource("endpointslices").VersionedParams(&options, metav1.ParameterCodec).Do(ctx).Into(&page); err != nil {
			return err
		}
		for i := range page.Items {
			m.note(have, &page.Items[i])
		}
		if options.Continue = page.Continue; options.Continue == "" {
			m.have = have
			return nil
		}
	}
}

func (m *mirror) note(have map[lb.Name]map[string]mirrored, s *discoveryv1.EndpointSlice) {
	name := lb.Name{Namespace: s.Namespace, Name: s.Labels[discoveryv1.LabelServiceName]}
	if have[name] == nil {
		have[name] = map[string]mirrored{}
	}
	have[name][s.Name] = mirrored{s.Labels[LabelSourceCluster], hashOf(s)}
}

// service brings the EndpointSlices of a service into step: each of them that differs is written, and no other.
func (m *mirror) service(ctx context.Context, read statedb.ReadTxn, name lb.Name) error {
	m.mu.Lock()
	owner, known := m.services.known[name]
	m.mu.Unlock()
	want := map[string]*discoveryv1.EndpointSlice{}
	if known {
		clusters := lb.MirroredClusters(m.cfg.View(read, name))
		var endpoints []mirrorEndpoint
		for _, b := range m.Source.cfg.Tables.BackendsOf(read, name) {
			if slices.Contains(clusters, b.Cluster) && m.cfg.Settled(b.Cluster) {
				down := m.Source.cfg.Tables.Quarantined(read, identity.NodeName{Cluster: b.Cluster, Node: b.Node})
				endpoints = append(endpoints, mirrorEndpoint{b, down})
			}
		}
		want = mirrorSlices(name, owner, endpoints)
	}
	for _, key := range slices.Sorted(maps.Keys(want)) {
		if m.have[name][key].hash == hashOf(want[key]) {
			continue
		}
		written, err := m.apply(ctx, want[key])
		if err != nil {
			return fmt.Errorf("EndpointSlice %s/%s: %w", name.Namespace, key, err)
		}
		m.note(m.have, written)
	}
	for _, key := range slices.Sorted(maps.Keys(m.have[name])) {
		if _, wanted := want[key]; wanted || known && !m.cfg.Settled(m.have[name][key].cluster) {
			continue
		}
		err := m.slices.Delete().Namespace(name.Namespace).Resource("endpointslices").Name(key).Do(ctx).Error()
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("EndpointSlice %s/%s: %w", name.Namespace, key, err)
		}
		delete(m.have[name], key)
	}
	if len(m.have[name]) == 0 {
		delete(m.have, name)
	}
	return nil
}

// apply writes an EndpointSlice, whether it is there or not, on the server's side, and returns what is there then.
func (m *mirror) apply(ctx context.Context, s *discoveryv1.EndpointSlice) (*discoveryv1.EndpointSlice, error) {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(s); err != nil {
		return nil, err
	}
	var written discoveryv1.EndpointSlice
	force := true
	err := m.slices.Patch(types.ApplyPatchType).Namespace(s.Namespace).Resource("endpointslices").Name(s.Name).
		VersionedParams(&metav1.PatchOptions{FieldManager: ManagedBy, Force: &force}, metav1.ParameterCodec).Body(body.Bytes()).Do(ctx).Into(&written)
	return &written, err
}

// mirrorEndpoint is a backend of another cluster, and whether its node is down.
type mirrorEndpoint struct {
	lb.Backend
	down bool
}

// mirrorSlices returns what is mirrored of a service, by name: an EndpointSlice for each slice that another cluster has stored, so at most 100 endpoints, and for each family and set of ports in
// it: an endpoint stays where it is, whatever becomes of others. They go with the Service that owns them.
func mirrorSlices(service lb.Name, owner types.UID, endpoints []mirrorEndpoint) map[string]*discoveryv1.EndpointSlice {
	out := map[string]*discoveryv1.EndpointSlice{}
	slices.SortFunc(endpoints, func(a, b mirrorEndpoint) int { return a.Address.Compare(b.Address) })
	for _, e := range endpoints {
		name := mirrorName(service, e.Backend)
		s := out[name]
		if s == nil {
			s = &discoveryv1.EndpointSlice{
				TypeMeta: metav1.TypeMeta{APIVersion: discoveryv1.SchemeGroupVersion.String(), Kind: "EndpointSlice"},
				ObjectMeta: metav1.ObjectMeta{
					Namespace: service.Namespace, Name: name,
					Labels:          map[string]string{discoveryv1.LabelServiceName: service.Name, discoveryv1.LabelManagedBy: ManagedBy, LabelSourceCluster: e.Cluster},
					OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: service.Name, UID: owner}},
				},
				AddressType: addressType(e.Address),
				Ports:       mirrorPorts(e.Ports),
			}
			out[name] = s
		}
		ready, serving, terminating := !e.down && !e.Terminating, !e.down, e.Terminating
		endpoint := discoveryv1.Endpoint{
			Addresses:  []string{e.Address.String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		}
		if e.Hostname != "" {
			endpoint.Hostname = &e.Hostname
		}
		s.Endpoints = append(s.Endpoints, endpoint) // without a node's name: it would be taken for one of this cluster's
	}
	return out
}

func addressType(a netip.Addr) discoveryv1.AddressType {
	if a.Is4() {
		return discoveryv1.AddressTypeIPv4
	}
	return discoveryv1.AddressTypeIPv6
}

func mirrorPorts(ports []lb.BackendPort) []discoveryv1.EndpointPort {
	out := []discoveryv1.EndpointPort{}
	for _, p := range sortedPorts(ports) {
		name, number, protocol := p.Name, int32(p.Port), corev1.Protocol(p.Protocol)
		out = append(out, discoveryv1.EndpointPort{Name: &name, Port: &number, Protocol: &protocol})
	}
	return out
}

func sortedPorts(ports []lb.BackendPort) []lb.BackendPort {
	return slices.SortedFunc(slices.Values(ports), func(a, b lb.BackendPort) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
}

// mirrorName names the EndpointSlice that a backend belongs into.
func mirrorName(service lb.Name, b lb.Backend) string {
	hash := fnv.New64a()
	fmt.Fprintf(hash, "%s\x00%s\x00%v", b.Slice, addressType(b.Address), sortedPorts(b.Ports))
	return fmt.Sprintf("%s-%s-%016x", service.Name, b.Cluster, hash.Sum64())
}

// hashOf is of what mirrorSlices says in an EndpointSlice, with the API server's defaults or without.
func hashOf(s *discoveryv1.EndpointSlice) uint64 {
	hash := fnv.New64a()
	put := func(format string, args ...any) { fmt.Fprintf(hash, format+"\x00", args...) }
	put("%s %s", s.AddressType, s.Labels[LabelSourceCluster])
	for _, o := range s.OwnerReferences {
		put("%s", o.UID)
	}
	for _, p := range s.Ports {
		put("%s %s %d", value(p.Name), value(p.Protocol), value(p.Port))
	}
	for _, e := range s.Endpoints {
		c := e.Conditions
		put("%s %s %t %t %t %s", strings.Join(e.Addresses, ","), value(e.Hostname), value(c.Ready), value(c.Serving), value(c.Terminating), value(e.NodeName))
	}
	return hash.Sum64()
}

// value is what p points at, or nothing.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
