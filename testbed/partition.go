package testbed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"causeway/datapath"
)

// Partition is a loss of packets between two places of the bed, both ways.
type Partition struct {
	// A and B are each a cluster (its nodes and its store) or CLUSTER/NODE.
	A string `json:"a"`
	B string `json:"b"`
	// Port narrows it to the packets that go to a port or come from it; zero: all packets.
	Port Port `json:"port,omitzero"`
	// OneWay loses only the packets from A to B.
	OneWay bool `json:"oneWay,omitempty"`
	// Loss in percent, above 0 up to 100.
	Loss float64 `json:"loss"`
	// Lost counts the packets lost so far, in both directions.
	Lost uint64 `json:"lost"`
}

func (p Partition) String() string {
	of := ""
	if p.Port != (Port{}) {
		of = fmt.Sprintf(" of %v", p.Port)
	}
	return fmt.Sprintf("%s %s %s loses %g %%%s", p.A, arrow(p.OneWay), p.B, p.Loss, of)
}

// Loss is the loss of packets on every link of the underlay.
type Loss struct {
	// Percent of the packets between any two nodes or stores, in each direction by itself.
	Percent float64 `json:"percent"`
	// Lost counts the packets lost so far.
	Lost uint64 `json:"lost"`
}

func checkLoss(percent float64) error {
	if !(percent > 0 && percent <= 100) {
		return fmt.Errorf("a loss of %g %% makes no sense; it is above 0 and at most 100", percent)
	}
	return nil
}

// Partition loses packets between two places. One that is there already between the same two, of the same port, is replaced.
func (b *Bed) Partition(ctx context.Context, p Partition) error {
	if err := checkLoss(p.Loss); err != nil {
		return err
	}
	return b.changeFaults(ctx, func(s *State) error {
		if err := s.checkPlaces(p.A, p.B); err != nil {
			return err
		}
		s.Partitions = slices.DeleteFunc(s.Partitions, func(q Partition) bool {
			same := q.A == p.A && q.B == p.B && (q.OneWay == p.OneWay || !p.OneWay)
			reverse := q.A == p.B && q.B == p.A && !p.OneWay
			return (same || reverse) && q.Port == p.Port
		})
		s.Partitions = append(s.Partitions, p)
		return nil
	})
}

// Heal takes back every partition and MTU between two places, in whichever order they were named.
func (b *Bed) Heal(ctx context.Context, x, y string) error {
	return b.changeFaults(ctx, func(s *State) error {
		between := func(a, b string) bool { return a == x && b == y || a == y && b == x }
		before := len(s.Partitions) + len(s.PathMTUs)
		s.Partitions = slices.DeleteFunc(s.Partitions, func(q Partition) bool { return between(q.A, q.B) })
		s.PathMTUs = slices.DeleteFunc(s.PathMTUs, func(q PathMTU) bool { return between(q.A, q.B) })
		if len(s.Partitions)+len(s.PathMTUs) < before {
			return nil
		}
		var there []string
		for _, q := range s.Partitions {
			there = append(there, q.String())
		}
		for _, q := range s.PathMTUs {
			there = append(there, q.String())
		}
		if there == nil {
			there = []string{"none"}
		}
		return fmt.Errorf("there is no partition and no MTU between %s and %s; there is: %s", x, y, strings.Join(there, ", "))
	})
}

// HealAll takes back every partition and MTU, the loss on all links, and what is wrong with the agents' clocks: their agents are
// started again.
func (b *Bed) HealAll(ctx context.Context) error {
	err := b.changeFaults(ctx, func(s *State) error {
		s.Partitions, s.PathMTUs, s.Loss = nil, nil, 0
		return nil
	})
	return errors.Join(err, b.healClocks(ctx))
}

// LoseEverywhere loses so many percent of the packets on every link of the underlay, in each direction by itself; 0 ends it.
// Where a partition loses more, that counts.
func (b *Bed) LoseEverywhere(ctx context.Context, percent float64) error {
	if percent != 0 {
		if err := checkLoss(percent); err != nil {
			return err
		}
	}
	return b.changeFaults(ctx, func(s *State) error {
		s.Loss = percent
		return nil
	})
}

// changeFaults changes the recorded partitions, MTUs and loss, then makes the underlay lose what they say.
func (b *Bed) changeFaults(ctx context.Context, change func(*State) error) error {
	return b.within(ctx, func(*State) error {
		return b.update(ctx, func(s *State) error {
			before := *s
			before.Partitions, before.PathMTUs = slices.Clone(s.Partitions), slices.Clone(s.PathMTUs)
			if err := change(s); err != nil {
				return err
			}
			want, err := s.losses(s.Partitions)
			if err != nil {
				return err
			}
			if s.Loss > 0 {
				want[everywhere] = s.Loss
			}
			mtus, err := s.mtus(s.PathMTUs)
			if err != nil {
				return err
			}
			// What may have been set must be on record, should this process end here.
			if err := b.writeState(s); err != nil {
				return err
			}
			if err := b.applyFaults(want, mtus); err != nil {
				return errors.Join(err, b.writeState(&before))
			}
			return nil
		})
	})
}

// everywhere is what a loss on all links is about: one entry, whatever the number of nodes.
var everywhere = datapath.Flow{}

// losses returns what partitions mean for each flow; where several meet, the worst counts.
func (s *State) losses(partitions []Partition) (map[datapath.Flow]float64, error) {
	losses := map[datapath.Flow]float64{}
	for _, p := range partitions {
		paths, err := s.paths(p.A, p.B, p.OneWay)
		if err != nil {
			return nil, err
		}
		for _, flow := range paths {
			flow.Protocol, flow.Port = p.Port.Protocol, p.Port.Number
			losses[flow] = max(losses[flow], p.Loss)
		}
	}
	return losses, nil
}

// checkPlaces checks that two places are in the bed, and not one.
func (s *State) checkPlaces(x, y string) error {
	paths, err := s.paths(x, y, true)
	if err == nil && len(paths) == 0 {
		err = fmt.Errorf("%s and %s are the same place; name two", x, y)
	}
	return err
}

// paths returns the ways from every address of a place to every one of another, and back.
func (s *State) paths(x, y string, oneWay bool) (paths []path, err error) {
	as, err := s.addresses(x)
	if err != nil {
		return nil, err
	}
	bs, err := s.addresses(y)
	if err != nil {
		return nil, err
	}
	for _, a := range as {
		for _, b := range bs {
			if a == b || slices.Contains(as, b) && slices.Contains(bs, a) {
				continue // both are in both places, as when a cluster is named with itself
			}
			paths = append(paths, path{From: a, To: b})
			if !oneWay {
				paths = append(paths, path{From: b, To: a})
			}
		}
	}
	return paths, nil
}

// addresses returns the underlay addresses of a cluster or of CLUSTER/NODE.
func (s *State) addresses(place string) ([]netip.Addr, error) {
	if !strings.Contains(place, "/") {
		c, err := s.cluster(place)
		if err != nil {
			return nil, err
		}
		all := []netip.Addr{c.KVStore.Address}
		for _, n := range c.Nodes {
			all = append(all, n.Address)
		}
		return all, nil
	}
	name, err := ParseNode(place)
	if err != nil {
		return nil, err
	}
	if name.Node == kvstoreName {
		c, err := s.cluster(name.Cluster)
		if err != nil {
			return nil, err
		}
		return []netip.Addr{c.KVStore.Address}, nil
	}
	n, err := s.node(name.Cluster, name.Node)
	if err != nil {
		return nil, err
	}
	return []netip.Addr{n.Address}, nil
}
