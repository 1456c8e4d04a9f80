package testbed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Partition is a loss of packets between two places of the bed, both ways.
type Partition struct {
	// A and B are each a cluster (its nodes and its store) or CLUSTER/NODE.
	A string `json:"a"`
	B string `json:"b"`
	// OneWay loses only the packets from A to B.
	OneWay bool `json:"oneWay,omitempty"`
	// Loss in percent, above 0 up to 100.
	Loss float64 `json:"loss"`
	// Lost counts the packets lost so far, in both directions.
	Lost uint64 `json:"lost"`
}

func (p Partition) String() string {
	arrow := "<->"
	if p.OneWay {
		arrow = "->"
	}
	return fmt.Sprintf("%s %s %s loses %g %%", p.A, arrow, p.B, p.Loss)
}

// Partition loses packets between two places. One that is there already between the same two is replaced.
func (b *Bed) Partition(ctx context.Context, p Partition) error {
	if !(p.Loss > 0 && p.Loss <= 100) {
		return fmt.Errorf("a loss of %g %% makes no sense; it is above 0 and at most 100", p.Loss)
	}
	return b.changePartitions(ctx, func(s *State) error {
		for _, pair := range [][2]string{{p.A, p.B}, {p.B, p.A}} {
			if _, err := s.addresses(pair[0]); err != nil {
				return err
			}
		}
		if losses, err := s.losses([]Partition{p}); err != nil {
			return err
		} else if len(losses) == 0 {
			return fmt.Errorf("%s and %s are the same place; name two", p.A, p.B)
		}
		s.Partitions = slices.DeleteFunc(s.Partitions, func(q Partition) bool {
			same := q.A == p.A && q.B == p.B && (q.OneWay == p.OneWay || !p.OneWay)
			reverse := q.A == p.B && q.B == p.A && !p.OneWay
			return same || reverse
		})
		s.Partitions = append(s.Partitions, p)
		return nil
	})
}

// Heal takes back every partition between two places, in whichever order they were named.
func (b *Bed) Heal(ctx context.Context, x, y string) error {
	return b.changePartitions(ctx, func(s *State) error {
		before := len(s.Partitions)
		s.Partitions = slices.DeleteFunc(s.Partitions, func(q Partition) bool {
			return q.A == x && q.B == y || q.A == y && q.B == x
		})
		if len(s.Partitions) < before {
			return nil
		}
		var there []string
		for _, q := range s.Partitions {
			there = append(there, q.String())
		}
		if there == nil {
			there = []string{"none"}
		}
		return fmt.Errorf("there is no partition between %s and %s; there is: %s", x, y, strings.Join(there, ", "))
	})
}

// HealAll takes back every partition.
func (b *Bed) HealAll(ctx context.Context) error {
	return b.changePartitions(ctx, func(s *State) error {
		s.Partitions = nil
		return nil
	})
}

// changePartitions changes the recorded partitions, then makes the underlay lose what they say.
func (b *Bed) changePartitions(ctx context.Context, change func(*State) error) error {
	return b.within(ctx, func(*State) error {
		return b.update(ctx, func(s *State) error {
			before := slices.Clone(s.Partitions)
			if err := change(s); err != nil {
				return err
			}
			want, err := s.losses(s.Partitions)
			if err != nil {
				return err
			}
			// What may have been set must be on record, should this process end here.
			if err := b.writeState(s); err != nil {
				return err
			}
			if err := b.applyLosses(want); err != nil {
				s.Partitions = before
				return errors.Join(err, b.writeState(s))
			}
			return nil
		})
	})
}

// direction of packets on the underlay.
type direction struct{ from, to netip.Addr }

// losses returns what partitions mean for each pair of addresses; where several meet, the worst counts.
func (s *State) losses(partitions []Partition) (map[direction]float64, error) {
	losses := map[direction]float64{}
	for _, p := range partitions {
		as, err := s.addresses(p.A)
		if err != nil {
			return nil, err
		}
		bs, err := s.addresses(p.B)
		if err != nil {
			return nil, err
		}
		for _, from := range as {
			for _, to := range bs {
				if from == to || slices.Contains(as, to) && slices.Contains(bs, from) {
					continue // both are in both places, as when a cluster is named with itself
				}
				losses[direction{from, to}] = max(losses[direction{from, to}], p.Loss)
				if !p.OneWay {
					losses[direction{to, from}] = max(losses[direction{to, from}], p.Loss)
				}
			}
		}
	}
	return losses, nil
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
