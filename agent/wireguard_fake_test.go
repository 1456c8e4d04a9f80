package agent

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"causeway/identity"
	"causeway/tunnel"
)

// fakeWireGuard is a node's WireGuard without devices. A test says which sessions there are, and can have each call fail.
type fakeWireGuard struct {
	mu       sync.Mutex
	keys     []identity.TunnelKey
	made     [identity.TunnelSlots]time.Time
	received [identity.TunnelSlots]uint64
	sessions map[identity.NodeName]map[pair]bool
	changed  chan struct{}
	// fail is returned by Begin, Prefer and End, failUpdate by Update.
	fail, failUpdate error
	// calls are those that change keys, in order.
	calls []string
	rows  map[identity.NodeName]identity.Tunnel
	peers []tunnel.WireGuardPeer
	// problems of Status.
	problems []string
	// asked counts Shaken.
	asked int
}

func newFakeWireGuard(slots ...uint8) *fakeWireGuard {
	f := &fakeWireGuard{sessions: map[identity.NodeName]map[pair]bool{}, changed: make(chan struct{}), rows: map[identity.NodeName]identity.Tunnel{}}
	for _, slot := range slots {
		f.keys = append(f.keys, f.key(slot))
	}
	return f
}

func (f *fakeWireGuard) key(slot uint8) identity.TunnelKey {
	f.made[slot] = time.Now()
	return identity.TunnelKey{Slot: slot, Key: identity.WireGuardKey{slot + 1, byte(len(f.calls))}, Port: tunnel.DefaultWireGuardPort + uint16(slot)}
}

// shake makes sessions come, or go.
func (f *fakeWireGuard) shake(node identity.NodeName, there bool, pairs ...pair) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sessions[node] == nil {
		f.sessions[node] = map[pair]bool{}
	}
	for _, p := range pairs {
		f.sessions[node][p] = there
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeWireGuard) receive(slot uint8, bytes uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.received[slot] += bytes
}

func (f *fakeWireGuard) done() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.calls...)
}

func (f *fakeWireGuard) failWith(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

func (f *fakeWireGuard) Keys() []identity.TunnelKey {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]identity.TunnelKey(nil), f.keys...)
}

func (f *fakeWireGuard) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *fakeWireGuard) Shaken(node identity.NodeName, local, remote uint8) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return f.sessions[node][pair{local, remote}]
}

func (f *fakeWireGuard) Begin(context.Context) (identity.TunnelKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.fail != nil:
		return identity.TunnelKey{}, f.fail
	case len(f.keys) != 1:
		return identity.TunnelKey{}, errors.New("two keys are in use")
	}
	f.calls = append(f.calls, "begin")
	key := f.key(1 - f.keys[0].Slot)
	f.keys = append(f.keys, key)
	return key, nil
}

func (f *fakeWireGuard) Prefer(slot uint8) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	f.calls = append(f.calls, "prefer")
	if len(f.keys) == 2 && f.keys[1].Slot == slot {
		f.keys[0], f.keys[1] = f.keys[1], f.keys[0]
	}
	return nil
}

func (f *fakeWireGuard) End(_ context.Context, slot uint8) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	f.calls = append(f.calls, "end")
	if f.keys[0].Slot == slot {
		f.keys = f.keys[1:]
	} else {
		f.keys = f.keys[:1]
	}
	return nil
}

func (f *fakeWireGuard) Received(slot uint8) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.received[slot], nil
}

func (f *fakeWireGuard) Status() (tunnel.WireGuardStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := tunnel.WireGuardStatus{Peers: f.peers, Problems: f.problems, Repairs: map[string]uint64{"route": 2}}
	for node, sessions := range f.sessions {
		for p, shaken := range sessions {
			s.Peers = append(s.Peers, tunnel.WireGuardPeer{Node: node, Slot: p.local, Remote: p.remote, Shaken: shaken})
		}
	}
	for _, k := range f.keys {
		s.Devices = append(s.Devices, tunnel.WireGuardDevice{
			Slot: k.Slot, Name: tunnel.DefaultWireGuardName + string('0'+rune(k.Slot)), Kind: tunnel.KindKernel, Key: k.Key, Port: k.Port, Made: f.made[k.Slot],
		})
	}
	return s, nil
}

func (f *fakeWireGuard) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

func (f *fakeWireGuard) Close() error { return nil }

func (f *fakeWireGuard) Update(_ context.Context, t identity.Tunnel) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failUpdate == nil {
		f.rows[t.NodeName()] = t
	}
	return f.failUpdate
}

func (f *fakeWireGuard) Delete(_ context.Context, t identity.Tunnel) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.rows, t.NodeName())
	return nil
}

func (f *fakeWireGuard) Prune(context.Context, iter.Seq[identity.Tunnel], func(identity.ClusterID) bool) error {
	return nil
}
