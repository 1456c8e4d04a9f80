package testbed

import (
	"errors"
	"fmt"

	"causeway/datapath"
)

// applyFaults makes the underlay lose what losses and mtus say and nothing else.
func (b *Bed) applyFaults(losses map[datapath.Flow]float64, mtus map[path]int) (err error) {
	f, err := b.openFaults()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return errors.Join(applyLosses(f, losses), applyMTUs(f, mtus))
}

// applyLosses makes flows lose what want says, and the others nothing.
func applyLosses(f *datapath.Faults, want map[datapath.Flow]float64) error {
	now, err := f.List()
	if err != nil {
		return err
	}
	have := map[datapath.Flow]float64{}
	for _, fault := range now {
		have[fault.Flow] = fault.Percent
		if _, keep := want[fault.Flow]; keep {
			continue
		}
		if err := f.SetLoss(fault.Flow, 0); err != nil {
			return fmt.Errorf("healing %v: %w", fault.Flow, err)
		}
	}
	for flow, loss := range want {
		if have[flow] == loss {
			continue
		}
		if err := f.SetLoss(flow, loss); err != nil {
			return fmt.Errorf("losing packets %v: %w", flow, err)
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

// partitions returns the recorded partitions, and the loss on all links, with what each has lost.
func (b *Bed) partitions(s *State) ([]Partition, Loss, error) {
	list, everyLink := append([]Partition{}, s.Partitions...), Loss{Percent: s.Loss}
	if len(list) == 0 && s.Loss == 0 {
		return list, everyLink, nil
	}
	lost, err := b.lost()
	if err != nil {
		return nil, everyLink, err
	}
	everyLink.Lost = lost[everywhere]
	for i := range list {
		losses, err := s.losses(list[i : i+1])
		if err != nil {
			return nil, everyLink, err
		}
		for flow := range losses {
			list[i].Lost += lost[flow]
		}
	}
	return list, everyLink, nil
}

// lost returns how many packets of each flow the underlay has lost.
func (b *Bed) lost() (map[datapath.Flow]uint64, error) {
	f, err := datapath.OpenFaults(b.faultsDir())
	if err != nil {
		return nil, err
	}
	now, err := f.List()
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	lost := map[datapath.Flow]uint64{}
	for _, fault := range now {
		lost[fault.Flow] = fault.Lost
	}
	return lost, nil
}
