package datapath

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"sync"

	"causeway/identity"
)

// EndpointMap connects the node's pods: it attaches the pod program to their veths and tells
// the programs where they are. Its methods are safe for concurrent use; they act on the
// network namespace of the calling thread.
type EndpointMap struct {
	mu     sync.Mutex
	t      *table[bpfEndpointKey, bpfEndpoint]
	owner  identity.ClusterID
	attach func(ifindex int) error
	detach func(ifindex int) error
}

// Update connects the endpoint, at each of its addresses. The program is attached first: an
// endpoint that can be reached can't spoof.
func (m *EndpointMap) Update(_ context.Context, ep identity.Endpoint) error {
	value, err := m.entry(ep)
	if err != nil {
		return fmt.Errorf("endpoint %s: %w", ep.ID(), err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.attach(ep.IfIndex); err != nil {
		return fmt.Errorf("endpoint %s: %w", ep.ID(), err)
	}
	replaced := make(map[uint32]bool)
	for _, key := range endpointKeys(ep) {
		old, existed, err := m.t.get(key)
		if err == nil {
			err = m.t.put(key, value)
		}
		if err != nil {
			return err
		}
		if existed && old.Ifindex != value.Ifindex {
			replaced[old.Ifindex] = true
		}
	}
	return m.detachAll(replaced)
}

// Delete disconnects the endpoint. Its veth stays, and nothing passes it any more. If
// another endpoint has taken over an address, that one stays.
func (m *EndpointMap) Delete(_ context.Context, ep identity.Endpoint) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var stale []bpfEndpointKey
	for _, key := range endpointKeys(ep) {
		value, ok, err := m.t.get(key)
		if err != nil {
			return err
		}
		if ok && value.Ifindex == uint32(ep.IfIndex) {
			stale = append(stale, key)
		}
	}
	if len(stale) == 0 {
		return nil
	}
	return m.remove(stale, map[uint32]bool{uint32(ep.IfIndex): true})
}

// Prune disconnects the endpoints that aren't desired, if this node's cluster has synced.
func (m *EndpointMap) Prune(_ context.Context, desired iter.Seq[identity.Endpoint], synced func(identity.ClusterID) bool) error {
	keep := make(map[bpfEndpointKey]bool)
	for ep := range desired {
		for _, key := range endpointKeys(ep) {
			keep[key] = true
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	var stale []bpfEndpointKey
	used, unused := make(map[uint32]bool), make(map[uint32]bool)
	for k, v := range m.t.all(&err) {
		if keep[k] || !synced(identity.ClusterID(v.Owner)) {
			used[v.Ifindex] = true
			continue
		}
		stale = append(stale, k)
		unused[v.Ifindex] = true
	}
	// A pod may have lost one address of two.
	maps.DeleteFunc(unused, func(ifindex uint32, _ bool) bool { return used[ifindex] })
	return errors.Join(err, m.remove(stale, unused))
}

// remove takes the entries away first: what the pods send until their links are down is dropped as spoofed.
func (m *EndpointMap) remove(keys []bpfEndpointKey, ifindexes map[uint32]bool) error {
	var errs []error
	for _, key := range keys {
		errs = append(errs, m.t.del(key))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return m.detachAll(ifindexes)
}

func (m *EndpointMap) detachAll(ifindexes map[uint32]bool) error {
	var errs []error
	for ifindex := range ifindexes {
		errs = append(errs, m.detach(int(ifindex)))
	}
	return errors.Join(errs...)
}

func (m *EndpointMap) entry(ep identity.Endpoint) (value bpfEndpoint, err error) {
	if !ep.Address.IsValid() {
		return value, errors.New("it has no address")
	}
	if ep.IfIndex <= 0 {
		return value, fmt.Errorf("its link %q has no interface index", ep.HostLink)
	}
	value = bpfEndpoint{Ifindex: uint32(ep.IfIndex), Identity: uint32(ep.Identity), Owner: uint8(m.owner)}
	if value.Mac, err = toMAC(ep.MAC); err != nil {
		return value, err
	}
	value.HostMac, err = toMAC(ep.HostMAC)
	return value, err
}

func endpointKeys(ep identity.Endpoint) (keys []bpfEndpointKey) {
	for _, a := range ep.Addresses() {
		keys = append(keys, bpfEndpointKey{Address: toIP(a), Cluster: addressSpace})
	}
	return keys
}
