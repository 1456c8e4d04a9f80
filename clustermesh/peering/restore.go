package peering

import (
	"context"
	"errors"
	"fmt"

	"causeway/kvstore"
)

// Restore puts records and users back into a store that has lost them, from what the agents know. Records that are there
// are left as they are. Every agent may do it.
func (s *Service) Restore(ctx context.Context, peers []Peer) error {
	return s.administer(ctx, func(access Administrator) error {
		for _, p := range peers {
			if p.State != Left {
				if err := access.GrantRead(ctx, p.User, kvstore.Prefix); err != nil {
					return fmt.Errorf("make user %s again in the own store: %w", p.User, err)
				}
			}
			if err := s.Store.Create(ctx, PeerKey(p.Name()), EncodePeer(p)); err != nil && !errors.Is(err, kvstore.ErrConflict) {
				return fmt.Errorf("write the record of peer %s again: %w", p.Name(), err)
			}
		}
		return nil
	})
}
