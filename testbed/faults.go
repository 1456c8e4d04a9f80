package testbed

import (
	"errors"
	"fmt"

	"causeway/datapath"
)

// applyLosses makes the underlay lose what want says and nothing else.
func (b *Bed) applyLosses(want map[direction]float64) (err error) {
	f, err := b.openFaults()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	now, err := f.List()
	if err != nil {
		return err
	}
	have := map[direction]float64{}
	for _, fault := range now {
		d := direction{fault.From, fault.To}
		have[d] = fault.Percent
		if _, keep := want[d]; keep {
			continue
		}
		if err := f.SetLoss(d.from, d.to, 0); err != nil {
			return fmt.Errorf("healing %v -> %v: %w", d.from, d.to, err)
		}
	}
	for d, loss := range want {
		if have[d] == loss {
			continue
		}
		if err := f.SetLoss(d.from, d.to, loss); err != nil {
			return fmt.Errorf("losing packets %v -> %v: %w", d.from, d.to, err)
		}
	}
	return nil
}

// openFaults makes sure that every port of the underlay has the program that loses packets. It is
// there only in a bed that has been partitioned.
func (b *Bed) openFaults() (*datapath.Faults, error) {
	if err := mountBPF(b.faultsDir()); err != nil {
		return nil, err
	}
	f, err := datapath.OpenFaults(b.faultsDir())
	if err != nil {
		return nil, err
	}
	ports, err := b.ports()
	if err == nil {
		err = inNS(b.underlayNS(), func() error {
			for _, port := range ports {
				if err := f.Attach(port); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("preparing the underlay to lose packets: %w", err), f.Close())
	}
	return f, nil
}

// partitions returns the recorded partitions with what each has lost.
func (b *Bed) partitions(s *State) ([]Partition, error) {
	list := append([]Partition{}, s.Partitions...)
	if len(list) == 0 {
		return list, nil
	}
	f, err := datapath.OpenFaults(b.faultsDir())
	if err != nil {
		return nil, err
	}
	now, err := f.List()
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	lost := map[direction]uint64{}
	for _, fault := range now {
		lost[direction{fault.From, fault.To}] = fault.Lost
	}
	for i := range list {
		losses, err := s.losses(list[i : i+1])
		if err != nil {
			return nil, err
		}
		for d := range losses {
			list[i].Lost += lost[d]
		}
	}
	return list, nil
}
