package clustermesh

import (
	"context"
	"time"

	"causeway/identity"
	"causeway/kvstore"
)

// heartbeatInterval is how old a cluster's heartbeat may get before some node writes the next one. A
// follower that is connected but sees none for a few of them knows that what it reads is stale.
const heartbeatInterval = 5 * time.Second

// Beat keeps the heartbeat of this node's own cluster young, until ctx ends. Every node would, but
// each writes only if nobody else has: age tells how old the newest one seen is, now what
// the time is.
func Beat(ctx context.Context, store kvstore.Store, node string, now func() time.Time, age func() time.Duration) error {
	tick := time.NewTicker(heartbeatInterval / 5)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if age() < heartbeatInterval {
				continue
			}
			// A failure shows as the store's own status; the next tick tries again.
			_ = store.Put(ctx, identity.HeartbeatKey, identity.EncodeHeartbeat(identity.Heartbeat{At: now(), Node: node}))
		case <-ctx.Done():
			return nil
		}
	}
}
