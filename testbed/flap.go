package testbed

import (
	"context"
	"errors"
	"fmt"
	"time"

	"causeway/identity"
)

// FlapOptions say how a link goes down and up.
type FlapOptions struct {
	// Down and Up are how long the link is each, beginning with down.
	Down, Up time.Duration
	// Times that it goes down; zero: as often as Duration allows.
	Times int
	// Duration after which it goes down no more; zero: after so many Times.
	Duration time.Duration
}

func (o FlapOptions) validate() error {
	if o.Down <= 0 || o.Up <= 0 {
		return errors.New("say how long the link is down and how long it is up, each more than 0")
	}
	if o.Times <= 0 && o.Duration <= 0 {
		return errors.New("say how many times the link goes down, or for how long")
	}
	return nil
}

// again tells whether the link goes down once more, after so many times in so long.
func (o FlapOptions) again(times int, elapsed time.Duration) bool {
	return (o.Times <= 0 || times < o.Times) && (o.Duration <= 0 || elapsed < o.Duration)
}

// Flap takes a node's link to the underlay down and up again, and returns how many times. At the end the link is up, also
// if ctx ends early; a node that is killed meanwhile ends it and stays down.
func (b *Bed) Flap(ctx context.Context, node identity.NodeName, o FlapOptions) (times int, err error) {
	if err := o.validate(); err != nil {
		return 0, err
	}
	for began := time.Now(); o.again(times, time.Since(began)); times++ {
		if err := b.flapOnce(ctx, node, o); err != nil {
			return times, err
		}
	}
	return times, nil
}

func (b *Bed) flapOnce(ctx context.Context, node identity.NodeName, o FlapOptions) error {
	if err := b.setLink(ctx, node, false); err != nil {
		return err
	}
	early := pause(ctx, o.Down)
	if err := b.setLink(context.WithoutCancel(ctx), node, true); err != nil {
		return errors.Join(early, err)
	}
	if early != nil {
		return early
	}
	return pause(ctx, o.Up)
}

// setLink sets the link of a node that is not killed. It holds the state's lock, under which a kill is recorded before the
// link is cut, so that no link of a killed node comes up.
func (b *Bed) setLink(ctx context.Context, node identity.NodeName, up bool) error {
	return b.within(ctx, func(*State) error {
		return b.update(ctx, func(s *State) error {
			n, err := s.node(node.Cluster, node.Node)
			if err != nil {
				return err
			}
			if n.Down {
				return fmt.Errorf("node %v was killed: its link stays down; start it with: clustermesh testbed start node %[1]v", node)
			}
			return b.setPorts([]string{portName(node.Cluster, node.Node)}, up)
		})
	})
}
