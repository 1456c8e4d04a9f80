package datapath

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"causeway/lb"
)

// groups is how many groups of backends a service has: local and remote.
const groups = int(bpfBackendGroupGROUPS)

// portID names a service's port in the kernel: the first 8 bytes of the SHA-256 of its
// String. It is how a restarted agent finds out which service is whose.
type portID uint64

func newPortID(k lb.PortKey) portID {
	sum := sha256.Sum256([]byte(k.String()))
	return portID(binary.BigEndian.Uint64(sum[:8]))
}

// balancer is the state of the load balancer: what is in the kernel, and the targets that wait for a frontend.
// lbslots.go has the writes that change a service's backends.
type balancer struct {
	mu   sync.Mutex
	maps *Maps
	// frontends as they are in the kernel; services by what they are of, and by number.
	frontends map[frontendID]bpfFrontend
	services  map[portID]*service
	byID      map[uint32]*service
	// wanted has every target, also those of ports that no frontend has yet.
	wanted map[portID]map[backendKey]target
	// The last numbers given; freed ones come again only after all others.
	lastService, lastBackend uint32
	// l7 counts the L7 frontends at each address.
	l7         map[bpfL7AddressKey]int
	backendIDs map[uint32]bool
}

// frontendID is a frontend of one of two kinds, each with a map of its own.
type frontendID struct {
	bpfFrontendKey
	// outside: for packets from outside of the cluster, as against sockets on the node.
	outside bool
}

// service is a port of a service that has at least one frontend.
type service struct {
	id        uint32
	port      portID
	frontends int
	// slots by group: first those that are active, then those that are quarantined.
	slots    [groups][]*backend
	active   [groups]int
	backends map[backendKey]*backend
	// torn: a change failed half way, so the kernel may differ from this.
	torn bool
}

type backendKey struct {
	address netip.Addr
	port    uint16
}

// backend is a target in a slot.
type backend struct {
	id    uint32
	group int
	index int
	value bpfBackend
}

// target is a desired backend.
type target struct {
	group       int
	quarantined bool
	value       bpfBackend
}

func (b bpfBackend) key() backendKey {
	return backendKey{address: b.Address.addr(), port: toBE16(b.Port)}
}

// setFrontend makes the frontend choose among the targets of port.
func (b *balancer) setFrontend(key frontendID, policy bpfFrontend, port portID) error {
	svc, err := b.serviceOf(port)
	if err != nil {
		return err
	}
	old, existed := b.frontends[key]
	policy.Service = svc.id
	if existed && old == policy {
		return nil
	}
	if policy.l7() {
		// First: no connection shall come to an address that is not known to be the proxy's.
		if err := b.maps.l7Addresses.put(key.l7Address(), 1); err != nil {
			return errors.Join(err, b.destroyUnused(svc))
		}
	}
	if err := b.putFrontend(key, policy); err != nil {
		return errors.Join(err, b.releaseL7(key), b.destroyUnused(svc))
	}
	b.frontends[key] = policy
	err = b.countL7(key, old.l7(), policy.l7())
	if existed && old.Service == svc.id {
		return err
	}
	svc.frontends++
	if existed {
		err = errors.Join(err, b.release(old.Service))
	}
	return err
}

// putFrontend writes a frontend. The first one that is for packets from outside makes the programs look at them.
func (b *balancer) putFrontend(key frontendID, policy bpfFrontend) error {
	if err := b.maps.frontendsOf(key.outside).put(key.bpfFrontendKey, policy); err != nil || !key.outside {
		return err
	}
	return b.maps.outsideUsed.put(0, 1)
}

func (b *balancer) deleteFrontend(key frontendID) error {
	old, ok := b.frontends[key]
	if !ok {
		return nil
	}
	if err := b.maps.frontendsOf(key.outside).del(key.bpfFrontendKey); err != nil {
		return err
	}
	delete(b.frontends, key)
	return errors.Join(b.countL7(key, old.l7(), false), b.release(old.Service))
}

// serviceOf returns the service of port; a new one gets all targets wanted so far, so that
// its first frontend finds them there.
func (b *balancer) serviceOf(port portID) (*service, error) {
	if svc := b.services[port]; svc != nil {
		return svc, nil
	}
	svc := &service{id: b.newServiceID(), port: port, backends: make(map[backendKey]*backend)}
	if err := b.maps.services.put(svc.id, svc.record()); err != nil {
		return nil, err
	}
	b.services[port], b.byID[svc.id] = svc, svc
	for _, t := range b.wanted[port] {
		if err := b.put(svc, t); err != nil {
			return nil, errors.Join(err, b.destroyUnused(svc))
		}
	}
	return svc, nil
}

// release takes one frontend from the service, which goes with the last one.
func (b *balancer) release(id uint32) error {
	svc := b.byID[id]
	if svc == nil {
		return nil
	}
	svc.frontends--
	return b.destroyUnused(svc)
}

func (b *balancer) destroyUnused(svc *service) error {
	if svc.frontends > 0 {
		return nil
	}
	delete(b.services, svc.port)
	delete(b.byID, svc.id)
	errs := []error{b.maps.services.del(svc.id)}
	for group, slots := range svc.slots {
		for i, be := range slots {
			errs = append(errs, b.maps.slots.del(slotKey(svc.id, group, i)), b.maps.backends.del(be.id))
			delete(b.backendIDs, be.id)
		}
	}
	return errors.Join(errs...)
}

func (b *balancer) setTarget(port portID, t target) error {
	key := t.value.key()
	if b.wanted[port] == nil {
		b.wanted[port] = make(map[backendKey]target)
	}
	b.wanted[port][key] = t
	svc := b.services[port]
	if svc == nil {
		return nil
	}
	return b.change(svc, func() error { return b.put(svc, t) })
}

// put makes the service have the target, in its group and as quarantined as it is.
func (b *balancer) put(svc *service, t target) error {
	t.value.Service = svc.id
	be := svc.backends[t.value.key()]
	if be == nil {
		return b.add(svc, t)
	}
	if be.group != t.group {
		return errors.Join(b.add(svc, t), b.remove(svc, be))
	}
	if be.value != t.value {
		if err := b.maps.backends.put(be.id, t.value); err != nil {
			return err
		}
		be.value = t.value
	}
	switch {
	case t.quarantined && svc.isActive(be):
		return b.quarantine(svc, be)
	case !t.quarantined && !svc.isActive(be):
		return b.readmit(svc, be)
	}
	return nil
}

func (b *balancer) deleteTarget(port portID, key backendKey) error {
	delete(b.wanted[port], key)
	if len(b.wanted[port]) == 0 {
		delete(b.wanted, port)
	}
	svc := b.services[port]
	if svc == nil || svc.backends[key] == nil {
		return nil
	}
	return b.change(svc, func() error { return b.remove(svc, svc.backends[key]) })
}

func (b *balancer) newServiceID() uint32 {
	b.lastService = nextFree(b.lastService, func(id uint32) bool { return b.byID[id] != nil })
	return b.lastService
}

func (b *balancer) newBackendID() uint32 {
	b.lastBackend = nextFree(b.lastBackend, func(id uint32) bool { return b.backendIDs[id] })
	return b.lastBackend
}

// nextFree returns the number after last that isn't used; 0 is nobody's.
func nextFree(last uint32, used func(uint32) bool) uint32 {
	for {
		if last++; last != 0 && !used(last) {
			return last
		}
	}
}

func newTarget(t lb.Target) (target, error) {
	protocol, err := toProtocol(t.Port.Protocol)
	if err != nil {
		return target{}, fmt.Errorf("backend %s of %s: %w", t.Address, t.Port, err)
	}
	if !t.Address.IsValid() || t.Number == 0 {
		return target{}, fmt.Errorf("backend of %s has no valid address and port: %s, %d", t.Port, t.Address, t.Number)
	}
	group := int(bpfBackendGroupGROUP_REMOTE)
	if t.Local {
		group = int(bpfBackendGroupGROUP_LOCAL)
	}
	state := bpfBackendStateBACKEND_ACTIVE
	if t.Quarantined {
		state = bpfBackendStateBACKEND_QUARANTINED
	}
	return target{group: group, quarantined: t.Quarantined, value: bpfBackend{
		Address: toIP(t.Address), Port: toBE16(t.Number), Protocol: protocol, Cluster: addressSpace, Owner: t.ClusterID, State: uint8(state),
	}}, nil
}
