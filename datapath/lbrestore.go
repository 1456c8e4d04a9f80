package datapath

import "errors"

// newBalancer takes over what a former agent left in the kernel, and puts right what it left
// half done: a slot beyond the count, a backend in no slot or in two, a service without a frontend.
// Whatever was whole stays as it is.
func newBalancer(maps *Maps) (*balancer, error) {
	b := &balancer{
		maps:       maps,
		frontends:  make(map[frontendID]bpfFrontend),
		services:   make(map[portID]*service),
		byID:       make(map[uint32]*service),
		wanted:     make(map[portID]map[backendKey]target),
		backendIDs: make(map[uint32]bool),
		l7:         make(map[bpfL7AddressKey]int),
	}
	return b, b.restore()
}

func (b *balancer) restore() (err error) {
	for _, outside := range []bool{false, true} {
		for key, value := range b.maps.frontendsOf(outside).all(&err) {
			b.frontends[frontendID{key, outside}] = value
		}
	}
	records := make(map[uint32]bpfService)
	for id, record := range b.maps.services.all(&err) {
		records[id] = record
		b.lastService = max(b.lastService, id)
	}
	slots := make(map[bpfSlotKey]uint32)
	for key, id := range b.maps.slots.all(&err) {
		slots[key] = id
	}
	values := make(map[uint32]bpfBackend)
	for id, value := range b.maps.backends.all(&err) {
		values[id] = value
		b.lastBackend = max(b.lastBackend, id)
	}
	if err != nil {
		return err
	}
	for id, record := range records {
		b.restoreService(id, record, slots, values)
	}
	return errors.Join(b.restoreFrontends(), b.restoreL7(), b.repair(records, slots, values))
}

// restoreService collects the service's backends, each once. The active ones come first: where a backend is in two
// slots, a change that was half done had yet to overwrite the quarantined one.
func (b *balancer) restoreService(id uint32, record bpfService, slots map[bpfSlotKey]uint32, values map[uint32]bpfBackend) {
	svc := &service{id: id, port: portID(record.PortId), backends: make(map[backendKey]*backend)}
	collect := func(group int, first, n uint32) {
		for i := range n {
			backendID, ok := slots[slotKey(id, group, int(first+i))]
			value, known := values[backendID]
			if !ok || !known || svc.backends[value.key()] != nil {
				continue
			}
			be := &backend{id: backendID, group: group, index: len(svc.slots[group]), value: value}
			svc.slots[group] = append(svc.slots[group], be)
			svc.backends[value.key()] = be
			b.backendIDs[backendID] = true
		}
	}
	for group, count := range record.Count {
		collect(group, 0, count)
		svc.active[group] = len(svc.slots[group])
	}
	for group, n := range record.Quarantined {
		collect(group, record.Count[group], n)
	}
	b.byID[id] = svc
	b.services[svc.port] = svc
}

// restoreFrontends counts the frontends of each service.
func (b *balancer) restoreFrontends() error {
	var errs []error
	for key, value := range b.frontends {
		if svc := b.byID[value.Service]; svc != nil {
			svc.frontends++
			continue
		}
		errs = append(errs, b.maps.frontendsOf(key.outside).del(key.bpfFrontendKey))
		delete(b.frontends, key)
	}
	return errors.Join(errs...)
}

// repair makes the kernel's maps hold what the services hold, and nothing else.
func (b *balancer) repair(records map[uint32]bpfService, slots map[bpfSlotKey]uint32, values map[uint32]bpfBackend) error {
	var errs []error
	used := make(map[bpfSlotKey]bool)
	for id := range records {
		svc := b.byID[id]
		if svc.frontends == 0 || b.services[svc.port] != svc {
			errs = append(errs, b.destroyUnused(svc))
			continue
		}
		for group, backends := range svc.slots {
			for i := range backends {
				used[slotKey(id, group, i)] = true
			}
		}
		errs = append(errs, b.write(svc))
	}
	for key := range slots {
		if !used[key] {
			errs = append(errs, b.maps.slots.del(key))
		}
	}
	for id := range values {
		if !b.backendIDs[id] {
			errs = append(errs, b.maps.backends.del(id))
		}
	}
	return errors.Join(errs...)
}
