package peering

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"causeway/kvstore"
)

// connectingKey is there while a connect runs in this cluster, so that there is one at a time, whichever node runs it.
const connectingKey = kvstore.PrivatePrefix + "connecting"

// connecting is the value at connectingKey.
type connecting struct {
	Node string    `json:"node"`
	At   time.Time `json:"at"`
}

// connectLock is held by a connect. It hangs on no lease, since these outlive a process by far: one that is older than joiningFor is taken over.
type connectLock struct {
	s        *Service
	revision int64
}

func (s *Service) lockConnecting(ctx context.Context) (*connectLock, error) {
	entry, err := s.Store.Get(ctx, connectingKey)
	if err == nil {
		var other connecting
		if json.Unmarshal(entry.Value, &other) == nil && s.Now().Sub(other.At).Abs() < joiningFor {
			return nil, busy(other, s.Now())
		}
	} else if !errors.Is(err, kvstore.ErrNotFound) {
		return nil, fmt.Errorf("the own store cannot be read: %w", err)
	}
	l := &connectLock{s, entry.Revision}
	return l, l.refresh(ctx)
}

func busy(other connecting, now time.Time) error {
	return fmt.Errorf("node %s runs a connect already, since %s: wait until it has ended", plain(other.Node), now.Sub(other.At).Abs().Round(time.Second))
}

// refresh takes the lock, or says that it is still needed.
func (l *connectLock) refresh(ctx context.Context) error {
	value := encode(connecting{l.s.Self.Node, l.s.Now().UTC()})
	err := l.s.Store.Txn(ctx, []kvstore.Condition{{Key: connectingKey, Revision: l.revision}}, []kvstore.Op{{Kind: kvstore.OpPut, Key: connectingKey, Value: value}})
	if errors.Is(err, kvstore.ErrConflict) {
		return errors.New("another connect has begun at the same time: wait until it has ended")
	}
	if err != nil {
		return fmt.Errorf("the own store cannot be written: %w", err)
	}
	entry, err := l.s.Store.Get(ctx, connectingKey)
	if err != nil {
		return fmt.Errorf("the own store cannot be read: %w", err)
	}
	if string(entry.Value) != string(value) {
		return errors.New("another connect has begun at the same time: wait until it has ended")
	}
	l.revision = entry.Revision
	return nil
}

func (l *connectLock) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoing)
	defer cancel()
	err := l.s.Store.Txn(ctx, []kvstore.Condition{{Key: connectingKey, Revision: l.revision}}, []kvstore.Op{{Kind: kvstore.OpDelete, Key: connectingKey}})
	if err != nil && !errors.Is(err, kvstore.ErrConflict) {
		l.s.Log.Warn("Could not say that a connect has ended; others have to wait", "for", joiningFor, "error", err)
	}
}
