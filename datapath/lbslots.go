package datapath

import (
	"errors"
	"slices"
)

// A service's slots are numbered from 0 in each group: first those of the active backends, then those of the
// quarantined ones. How many there are of each is in the service's record, which programs see change at once. One change
// costs the same few writes however large the service is, and they are ordered so that
//
//   - a connection made between any two of them finds a backend, and none that is quarantined while there is an
//     active one (but for a program that read the record just before);
//   - an agent that dies between any two of them leaves every backend but the one that the change is about in a
//     slot of its kind. Another slot may have it too: the first one counts, active before quarantined. That is what
//     restore goes by; the one backend that may be in none comes again with the agent's targets.

func slotKey(service uint32, group, index int) bpfSlotKey {
	return bpfSlotKey{Service: service, Group: uint8(group), Index: uint32(index)}
}

// record is what the kernel shall know of the service.
func (s *service) record() bpfService {
	r := bpfService{PortId: uint64(s.port)}
	for group, slots := range s.slots {
		r.Count[group] = uint32(s.active[group])
		r.Quarantined[group] = uint32(len(slots) - s.active[group])
	}
	return r
}

func (s *service) isActive(be *backend) bool { return be.index < s.active[be.group] }

// swap exchanges two backends of one group.
func (s *service) swap(x, y *backend) {
	slots := s.slots[x.group]
	x.index, y.index = y.index, x.index
	slots[x.index], slots[y.index] = x, y
}

// change makes one change to a service's slots. What an earlier one has left half done is put right first: the
// change that comes next need not be the same one again.
func (b *balancer) change(svc *service, do func() error) error {
	if svc.torn {
		if err := b.mend(svc); err != nil {
			return err
		}
	}
	err := do()
	svc.torn = err != nil
	return err
}

// mend makes the kernel hold what the service holds, and removes a backend that has been added to the other group.
func (b *balancer) mend(svc *service) error {
	if err := b.write(svc); err != nil {
		return err
	}
	for _, slots := range svc.slots {
		for _, be := range slices.Clone(slots) {
			if svc.backends[be.value.key()] == be {
				continue
			}
			if err := b.remove(svc, be); err != nil {
				return err
			}
		}
	}
	return nil
}

// write makes the kernel hold the service as it is here. It looks at every slot.
func (b *balancer) write(svc *service) error {
	var errs []error
	for group, slots := range svc.slots {
		for i, be := range slots {
			errs = append(errs, b.maps.slots.put(slotKey(svc.id, group, i), be.id))
		}
	}
	errs = append(errs, b.maps.services.put(svc.id, svc.record()))
	for group, slots := range svc.slots {
		// No change leaves more than one slot too many.
		errs = append(errs, b.maps.slots.del(slotKey(svc.id, group, len(slots))))
	}
	return errors.Join(errs...)
}

// add gives the target a slot of its kind, and counts it in.
func (b *balancer) add(svc *service, t target) error {
	be := &backend{id: b.newBackendID(), group: t.group, value: t.value}
	if err := b.maps.backends.put(be.id, be.value); err != nil {
		return err
	}
	if err := b.addSlot(svc, be, t.quarantined); err != nil {
		if undo := b.write(svc); undo != nil {
			return errors.Join(err, undo) // A slot may still name the backend.
		}
		return errors.Join(err, b.maps.backends.del(be.id))
	}
	svc.backends[be.value.key()] = be
	b.backendIDs[be.id] = true
	return nil
}

// addSlot puts a quarantined backend behind all others. For an active one the first that is quarantined makes room.
func (b *balancer) addSlot(svc *service, be *backend, quarantined bool) error {
	slots := svc.slots[be.group]
	record, at := svc.record(), len(slots)
	if quarantined {
		record.Quarantined[be.group]++
	} else {
		record.Count[be.group]++
		at = svc.active[be.group]
	}
	if at < len(slots) {
		if err := b.repeatSlot(svc, slots[at]); err != nil {
			return err
		}
	}
	if err := b.maps.slots.put(slotKey(svc.id, be.group, at), be.id); err != nil {
		return err
	}
	if err := b.maps.services.put(svc.id, record); err != nil {
		return err
	}
	be.index = len(slots)
	svc.slots[be.group] = append(slots, be)
	svc.swap(be, svc.slots[be.group][at])
	svc.active[be.group] = int(record.Count[be.group])
	return nil
}

// repeatSlot gives a quarantined backend a second slot, behind all others, and counts that in, so that its first one can
// be used for another.
func (b *balancer) repeatSlot(svc *service, be *backend) error {
	if err := b.maps.slots.put(slotKey(svc.id, be.group, len(svc.slots[be.group])), be.id); err != nil {
		return err
	}
	record := svc.record()
	record.Quarantined[be.group]++
	return b.maps.services.put(svc.id, record)
}

// quarantine moves an active backend to the quarantined ones.
func (b *balancer) quarantine(svc *service, be *backend) error {
	if err := b.demote(svc, be); err != nil {
		return err
	}
	return b.maps.slots.put(slotKey(svc.id, be.group, be.index), be.id)
}

// demote puts the last active backend into the slot of another one, and counts its former slot as quarantined. That
// one still names it, unless the two are the same.
func (b *balancer) demote(svc *service, be *backend) error {
	group := be.group
	last := svc.slots[group][svc.active[group]-1]
	if err := b.maps.slots.put(slotKey(svc.id, group, be.index), last.id); err != nil {
		return err
	}
	record := svc.record()
	record.Count[group]--
	record.Quarantined[group]++
	if err := b.maps.services.put(svc.id, record); err != nil {
		return err
	}
	svc.swap(be, last)
	svc.active[group]--
	return nil
}

// readmit moves a quarantined backend to the active ones: to the first quarantined slot, which then counts as active.
func (b *balancer) readmit(svc *service, be *backend) error {
	group := be.group
	first := svc.slots[group][svc.active[group]]
	if err := b.maps.slots.put(slotKey(svc.id, group, be.index), first.id); err != nil {
		return err
	}
	if err := b.maps.slots.put(slotKey(svc.id, group, first.index), be.id); err != nil {
		return err
	}
	record := svc.record()
	record.Count[group]++
	record.Quarantined[group]--
	if err := b.maps.services.put(svc.id, record); err != nil {
		return err
	}
	svc.swap(be, first)
	svc.active[group]++
	return nil
}

// remove moves the last slot into the backend's, then counts it out. An active backend that quarantined ones follow
// is first demoted, so that the last slot is one of its kind.
func (b *balancer) remove(svc *service, be *backend) error {
	group := be.group
	if svc.isActive(be) && svc.active[group] < len(svc.slots[group]) {
		if err := b.demote(svc, be); err != nil {
			return err
		}
	}
	slots := svc.slots[group]
	last := slots[len(slots)-1]
	if err := b.maps.slots.put(slotKey(svc.id, group, be.index), last.id); err != nil {
		return err
	}
	record := svc.record()
	if svc.isActive(be) {
		record.Count[group]--
	} else {
		record.Quarantined[group]--
	}
	if err := b.maps.services.put(svc.id, record); err != nil {
		return err
	}
	svc.swap(be, last)
	svc.slots[group], svc.active[group] = slots[:len(slots)-1], int(record.Count[group])
	if svc.backends[be.value.key()] == be {
		delete(svc.backends, be.value.key())
	}
	delete(b.backendIDs, be.id)
	return errors.Join(
		b.maps.slots.del(slotKey(svc.id, group, len(slots)-1)),
		b.maps.backends.del(be.id))
}
