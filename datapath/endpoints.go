package datapath

import (
	"context"
	"errors"
	"fmt"
	"iter"
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

// Update connects the endpoint. The program is attached first: an
// endpoint that can be reached can't spoof.
func (m *EndpointMap) Update(_ context.Context, ep identity.Endpoint) error {
	key, value, err := m.entry(ep)
	if err != nil {
		return fmt.Errorf("endpoint %s: %w", ep.ID(), err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old, existed, err := m.t.get(key)
	if err != nil {
		return err
	}
	if err := m.attach(ep.IfIndex); err != nil {
		return fmt.Errorf("endpoint %s: %w", ep.ID(), err)
	}
	if err := m.t.put(key, value); err != nil {
		return err
	}
	if existed && old.Ifindex != value.Ifindex {
		return m.detach(int(old.Ifindex))
	}
	return nil
}

// Delete disconnects the endpoint. Its veth stays, and nothing passes it any more. If
// another endpoint has taken over the address, that one stays.
func (m *EndpointMap) Delete(_ context.Context, ep identity.Endpoint) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := endpointKey(ep)
	value, ok, err := m.t.get(key)
	if err != nil || !ok || value.Ifindex != uint32(ep.IfIndex) {
		return err
	}
	return m.remove(key, value)
}

// Prune disconnects the endpoints that aren't desired, if this node's cluster has synced.
func (m *EndpointMap) Prune(_ context.Context, desired iter.Seq[identity.Endpoint], synced func(identity.ClusterID) bool) error {
	keep := make(map[bpfEndpointKey]bool)
	for ep := range desired {
		keep[endpointKey(ep)] = true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	stale := make(map[bpfEndpointKey]bpfEndpoint)
	for k, v := range m.t.all(&err) {
		if !keep[k] && synced(identity.ClusterID(v.Owner)) {
			stale[k] = v
		}
	}
	errs := []error{err}
	for k, v := range stale {
		errs = append(errs, m.remove(k, v))
	}
	return errors.Join(errs...)
}

// remove takes the entry away first: what the pod sends until its link is down is dropped as spoofed.
func (m *EndpointMap) remove(key bpfEndpointKey, value bpfEndpoint) error {
	if err := m.t.del(key); err != nil {
		return err
	}
	return m.detach(int(value.Ifindex))
}

func (m *EndpointMap) entry(ep identity.Endpoint) (key bpfEndpointKey, value bpfEndpoint, err error) {
	if !ep.Address.IsValid() {
		return key, value, errors.New("it has no address")
	}
	if ep.IfIndex <= 0 {
		return key, value, fmt.Errorf("its link %q has no interface index", ep.HostLink)
	}
	value = bpfEndpoint{Ifindex: uint32(ep.IfIndex), Identity: uint32(ep.Identity), Owner: uint8(m.owner)}
	if value.Mac, err = toMAC(ep.MAC); err != nil {
		return key, value, err
	}
	if value.HostMac, err = toMAC(ep.HostMAC); err != nil {
		return key, value, err
	}
	return endpointKey(ep), value, nil
}

func endpointKey(ep identity.Endpoint) bpfEndpointKey {
	return bpfEndpointKey{Address: toIP(ep.Address), Cluster: addressSpace}
}
