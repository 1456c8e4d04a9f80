package clustermesh

import (
	"context"
	"slices"

	"causeway/identity"
)

// SetTunnelKeys has all other nodes told that this one is reached with these keys, the one that it prefers first. It returns before that is so:
// the publication's row says when the store has it.
func (l *Local) SetTunnelKeys(ctx context.Context, keys []identity.TunnelKey) {
	keys = slices.Clone(keys)
	l.After(ctx, func() {
		if slices.Equal(l.Node.TunnelKeys, keys) {
			return
		}
		l.Node.TunnelKeys, l.Node.Version = keys, l.next()
		if err := l.putNode(); err != nil {
			l.Log.Error("the other nodes are not told of this node's new keys", "error", err)
		}
	})
}
