package testbed

import (
	"context"
	"fmt"
	"slices"

	"causeway/datapath"
)

// PathMTU is the largest packet that is carried between two places of the bed, both ways. Larger ones are lost, and nobody is told.
type PathMTU struct {
	// A and B are each a cluster (its nodes and its store) or CLUSTER/NODE.
	A string `json:"a"`
	B string `json:"b"`
	// Size of the IP packet on the underlay in bytes, headers of the tunnel included.
	Size int `json:"size"`
	// OneWay limits only the packets from A to B.
	OneWay bool `json:"oneWay,omitempty"`
	// Lost counts the larger packets so far, in both directions.
	Lost uint64 `json:"lost"`
}

func (p PathMTU) String() string {
	return fmt.Sprintf("%s %s %s loses packets over %d bytes", p.A, arrow(p.OneWay), p.B, p.Size)
}

func arrow(oneWay bool) string {
	if oneWay {
		return "->"
	}
	return "<->"
}

func checkMTU(size int) error {
	if size < datapath.MinMTU || size > datapath.MaxMTU {
		return fmt.Errorf("an MTU of %d bytes makes no sense; it is %d to %d, and the underlay's is 1500", size, datapath.MinMTU, datapath.MaxMTU)
	}
	return nil
}

// SetMTU loses what is larger than so many bytes between two places, both ways, until they are healed.
func (b *Bed) SetMTU(ctx context.Context, x, y string, size int) error {
	return b.SetPathMTU(ctx, PathMTU{A: x, B: y, Size: size})
}

// SetPathMTU is SetMTU, which can be for one direction alone. One that is there already between the same two is replaced.
func (b *Bed) SetPathMTU(ctx context.Context, p PathMTU) error {
	if err := checkMTU(p.Size); err != nil {
		return err
	}
	return b.changeFaults(ctx, func(s *State) error {
		if err := s.checkPlaces(p.A, p.B); err != nil {
			return err
		}
		s.PathMTUs = slices.DeleteFunc(s.PathMTUs, func(q PathMTU) bool {
			same := q.A == p.A && q.B == p.B && (q.OneWay == p.OneWay || !p.OneWay)
			return same || q.A == p.B && q.B == p.A && !p.OneWay
		})
		s.PathMTUs = append(s.PathMTUs, p)
		return nil
	})
}

// path is one direction between two addresses of the underlay; it has no port.
type path = datapath.Flow

// mtus returns what limits mean for each path; where several meet, the smallest counts.
func (s *State) mtus(limits []PathMTU) (map[path]int, error) {
	mtus := map[path]int{}
	for _, p := range limits {
		paths, err := s.paths(p.A, p.B, p.OneWay)
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			if now, ok := mtus[path]; !ok || p.Size < now {
				mtus[path] = p.Size
			}
		}
	}
	return mtus, nil
}

// applyMTUs makes the underlay's paths carry what want says, and the others everything.
func applyMTUs(f *datapath.Faults, want map[path]int) error {
	now, err := f.ListMTUs()
	if err != nil {
		return err
	}
	have := map[path]int{}
	for _, p := range now {
		path := path{From: p.From, To: p.To}
		have[path] = p.MTU
		if _, keep := want[path]; keep {
			continue
		}
		if err := f.SetMTU(p.From, p.To, 0); err != nil {
			return fmt.Errorf("healing %v: %w", path, err)
		}
	}
	for path, mtu := range want {
		if have[path] == mtu {
			continue
		}
		if err := f.SetMTU(path.From, path.To, mtu); err != nil {
			return fmt.Errorf("losing large packets %v: %w", path, err)
		}
	}
	return nil
}

// pathMTUs returns the recorded limits with what each has lost.
func (b *Bed) pathMTUs(s *State) ([]PathMTU, error) {
	list := append([]PathMTU{}, s.PathMTUs...)
	if len(list) == 0 {
		return list, nil
	}
	f, err := datapath.OpenFaults(b.faultsDir())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	now, err := f.ListMTUs()
	if err != nil {
		return nil, err
	}
	for i := range list {
		paths, err := s.paths(list[i].A, list[i].B, list[i].OneWay)
		if err != nil {
			return nil, err
		}
		for _, p := range now {
			if slices.Contains(paths, path{From: p.From, To: p.To}) {
				list[i].Lost += p.Lost
			}
		}
	}
	return list, nil
}
