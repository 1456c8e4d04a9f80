package k8s

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/cilium/statedb"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"causeway/clustermesh"
	"causeway/lb"
)

// endpointSlices writes the EndpointSlices into the backends table. The rows are all that is kept of endpoints: what a slice said before is what the
// table has of it. Needs Source.mu.
type endpointSlices struct {
	*Source
	known map[types.NamespacedName]knownSlice
	// doubles are what other slices say of an address than that which the row is of, by service.
	doubles map[lb.Name]map[netip.Addr][]lb.Backend
	// nodes are the names of nodes, so that all rows share them.
	nodes map[string]string
}

// knownSlice says where the rows of an EndpointSlice are.
type knownSlice struct {
	service lb.Name
	// parts of it that have or had rows.
	parts int
}

func (e *endpointSlices) all(txn statedb.WriteTxn, objects []*discoveryv1.EndpointSlice) error {
	gone := make(map[types.NamespacedName]struct{}, len(e.known))
	for key := range e.known {
		gone[key] = struct{}{}
	}
	for _, object := range objects {
		delete(gone, types.NamespacedName{Namespace: object.Namespace, Name: object.Name})
		if err := e.put(txn, object); err != nil {
			return err
		}
	}
	for key := range gone {
		if err := e.remove(txn, key); err != nil {
			return err
		}
	}
	return nil
}

// put brings the rows of a slice into step. It costs as much as the slice has endpoints, whatever the size of the service, and touches no row
// but those that change.
func (e *endpointSlices) put(txn statedb.WriteTxn, object *discoveryv1.EndpointSlice) error {
	key := types.NamespacedName{Namespace: object.Namespace, Name: object.Name}
	now := parseSlice(object, e.node)
	old, known := e.known[key]
	if known && old.service != now.service {
		if err := e.remove(txn, key); err != nil {
			return err
		}
		known = false
	}
	if !known {
		if len(now.backends) == 0 {
			return nil
		}
		old = knownSlice{service: now.service}
	}
	now.service = old.service
	return e.write(txn, key, old, now)
}

func (e *endpointSlices) drop(txn statedb.WriteTxn, object *discoveryv1.EndpointSlice) error {
	return e.remove(txn, types.NamespacedName{Namespace: object.Namespace, Name: object.Name})
}

func (e *endpointSlices) remove(txn statedb.WriteTxn, key types.NamespacedName) error {
	old, known := e.known[key]
	if !known {
		return nil
	}
	return e.write(txn, key, old, parsedSlice{service: old.service})
}

// write replaces what a slice has said by what it says now.
func (e *endpointSlices) write(txn statedb.WriteTxn, key types.NamespacedName, old knownSlice, now parsedSlice) error {
	said := e.said(txn, key.Name, old)
	addresses := make([]netip.Addr, 0, len(now.backends))
	for a := range now.backends {
		addresses = append(addresses, a)
	}
	parts := lb.Parts(addresses, func(a netip.Addr) (int, bool) { was, ok := said[a]; return was.part, ok })
	var names []string
	for i, a := range addresses {
		for len(names) <= parts[i] {
			names = append(names, partName(key.Name, len(names)))
		}
		b := now.backends[a]
		b.Cluster, b.ClusterID, b.Service, b.Slice = e.cfg.Cluster, e.cfg.ClusterID, now.service, names[parts[i]]
		was, had := said[a]
		delete(said, a)
		if had && sameBackend(was.Backend, b) {
			continue
		}
		if had && slices.Equal(was.Ports, b.Ports) {
			b.Ports = was.Ports // which the slice's other rows have too
		}
		if err := e.settle(txn, key.Name, a, now.service, &b); err != nil {
			return err
		}
	}
	for a := range said {
		if err := e.settle(txn, key.Name, a, now.service, nil); err != nil {
			return err
		}
	}
	if len(addresses) == 0 {
		delete(e.known, key)
	} else {
		e.known[key] = knownSlice{service: now.service, parts: max(old.parts, len(names))}
	}
	return nil
}

// saying is what a slice has said of an address, and in which of its parts.
type saying struct {
	lb.Backend
	part int
}

// said returns what a slice has said of each address so far.
func (e *endpointSlices) said(txn statedb.ReadTxn, object string, old knownSlice) map[netip.Addr]saying {
	said := map[netip.Addr]saying{}
	for part := range old.parts {
		for _, b := range e.cfg.Tables.BackendsIn(txn, e.cfg.Cluster, old.service, partName(object, part)) {
			said[b.Address] = saying{b, part}
		}
	}
	for a, others := range e.doubles[old.service] {
		for _, b := range others {
			if part, ok := partOf(object, b.Slice); ok {
				said[a] = saying{b, part}
			}
		}
	}
	return said
}

// settle has the best of what slices say of an address stand in the table: the slice of the given name says mine from now on, or nothing.
func (e *endpointSlices) settle(txn statedb.WriteTxn, object string, a netip.Addr, service lb.Name, mine *lb.Backend) error {
	t := e.cfg.Tables
	key := clustermesh.BackendKey(lb.Backend{Cluster: e.cfg.Cluster, Service: service, Address: a})
	words := slices.DeleteFunc(slices.Clone(e.doubles[service][a]), ofSlice(object))
	if row, _, ok := t.Backends.Get(txn, t.Backends.ByKey(key)); ok && !ofSlice(object)(row.Object) {
		words = append(words, row.Object)
	}
	if mine != nil {
		words = append(words, *mine)
	}
	slices.SortFunc(words, compareWords)
	e.setDoubles(service, a, words)
	if len(words) == 0 {
		return clustermesh.Remove(txn, t.Backends, key)
	}
	_, err := clustermesh.Put(txn, t.Backends, words[0], sameBackend)
	return err
}

// setDoubles keeps all but the first of what is said of an address.
func (e *endpointSlices) setDoubles(service lb.Name, a netip.Addr, words []lb.Backend) {
	of := e.doubles[service]
	switch {
	case len(words) > 1 && of == nil:
		e.doubles[service] = map[netip.Addr][]lb.Backend{a: words[1:]}
	case len(words) > 1:
		of[a] = words[1:]
	case of != nil:
		if delete(of, a); len(of) == 0 {
			delete(e.doubles, service)
		}
	}
}

// compareWords orders what slices say of one address, the best first: that it gets connections, else by the slices' names, so that all nodes agree.
func compareWords(a, b lb.Backend) int {
	switch {
	case a.Terminating == b.Terminating:
		return cmp.Compare(a.Slice, b.Slice)
	case b.Terminating:
		return -1
	}
	return 1
}

// ofSlice tells of backends whether they are those of an EndpointSlice of a name.
func ofSlice(object string) func(lb.Backend) bool {
	return func(b lb.Backend) bool {
		_, ok := partOf(object, b.Slice)
		return ok
	}
}

// node returns a node's name as the other rows have it.
func (e *endpointSlices) node(name string) string {
	if kept, ok := e.nodes[name]; ok {
		return kept
	}
	e.nodes[name] = name
	return name
}

// sameBackend compares rows in full.
func sameBackend(a, b lb.Backend) bool {
	return a.Address == b.Address && a.Service == b.Service && a.Node == b.Node && a.Endpoint == b.Endpoint && a.Terminating == b.Terminating &&
		a.Hostname == b.Hostname && a.Slice == b.Slice && a.Cluster == b.Cluster && a.ClusterID == b.ClusterID && slices.Equal(a.Ports, b.Ports)
}
