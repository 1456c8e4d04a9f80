package peering

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// tellFor is how long a peer has to acknowledge that it is disconnected.
	tellFor = 400 * time.Millisecond
	// forgetFor bounds waiting until nothing of the peer is in force. It goes on in the background whatever comes of it.
	forgetFor = 500 * time.Millisecond
)

// Disconnected is what came of a Disconnect.
type Disconnected struct {
	Cluster string `json:"cluster"`
	// Known is false if there was no such peer: nothing had to be done.
	Known bool `json:"known"`
	// Told: the peer has acknowledged it. If not, it finds out when it asks next; Reason says why it could not be told.
	Told   bool   `json:"told"`
	Reason string `json:"reason,omitempty"`
}

// Disconnect ends the connection with a cluster: its user and certificate are revoked, nothing of it stays in force. It takes less than a second, whether the peer can be reached or not; force
// does not even try to tell it.
func (s *Service) Disconnect(ctx context.Context, name string, force bool) (Disconnected, error) {
	done := Disconnected{Cluster: name}
	if err := checkClusterName(name); err != nil {
		return done, err
	}
	p, found, err := s.record(ctx, name)
	if err != nil {
		return done, fmt.Errorf("disconnect %s: the own store must be there for that, nothing has been changed: %w", name, err)
	}
	if !found {
		return done, nil
	}
	done.Known = true
	told := make(chan error, 1)
	go func() { told <- s.tellDisconnected(ctx, p.Peer, force) }()
	err = s.remove(ctx, p.Peer)
	if reason := <-told; reason == nil {
		done.Told = true
	} else {
		done.Reason = reason.Error()
	}
	if err != nil {
		return done, err
	}
	s.Log.Info("Disconnected", "cluster", name, "told", done.Told)
	if s.Forgotten == nil {
		return done, nil
	}
	forget, cancel := context.WithTimeout(ctx, forgetFor)
	defer cancel()
	if err := s.Forgotten(forget, name); err != nil {
		return done, fmt.Errorf("peer %s is disconnected, but not all of it is gone from this node yet: %w", name, err)
	}
	return done, nil
}

// remove takes the peer's rights first, so that a failure leaves a record to try again with.
func (s *Service) remove(ctx context.Context, p Peer) error {
	if err := s.revoke(ctx, p.User); err != nil {
		return fmt.Errorf("disconnect %s: the record stays, try again: %w", p.Name(), err)
	}
	if err := s.deleteRecord(ctx, p); err != nil {
		return fmt.Errorf("disconnect %s: its user is revoked, but the record could not be deleted, try again: %w", p.Name(), err)
	}
	return nil
}

func (s *Service) tellDisconnected(ctx context.Context, p Peer, force bool) error {
	if force {
		return errors.New("not asked to tell it")
	}
	if p.State == Left {
		return nil // it has left first, and knows
	}
	ctx, cancel := context.WithTimeout(ctx, tellFor)
	defer cancel()
	return s.tellLeave(ctx, p, false)
}

// tellLeave tells a peer that this cluster has disconnected it. That it knows of no connection is as well.
func (s *Service) tellLeave(ctx context.Context, p Peer, undo bool) error {
	err := s.call(ctx, p, func(l *link) error {
		_, err := l.Leave(ctx, &LeaveRequest{Undo: undo})
		return err
	})
	if errors.Is(err, ErrLeft) {
		return nil
	}
	return err
}
