package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"time"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/tunnel"
)

// wireGuard is what the agent needs of a node's WireGuard: tunnel.WireGuard, which documents it.
type wireGuard interface {
	Target[identity.Tunnel]
	Keys() []identity.TunnelKey
	Changed() <-chan struct{}
	Shaken(node identity.NodeName, local, remote uint8) bool
	Begin(ctx context.Context) (identity.TunnelKey, error)
	Prefer(slot uint8) error
	End(ctx context.Context, slot uint8) error
	Received(slot uint8) (uint64, error)
	Status() (tunnel.WireGuardStatus, error)
	Run(ctx context.Context) error
	Close() error
}

var _ wireGuard = (*tunnel.WireGuard)(nil)

// reopenPause is how long after a failure WireGuard is opened again, or its upkeep begun again: a problem that is mended is gone in 5 s.
const reopenPause = 2 * time.Second

// encryption is this node's part in encryption: its WireGuard, which is opened again until it is there, and its keys. It is the tunnels
// table's first target. Safe for concurrent use.
type encryption struct {
	tables *clustermesh.Tables
	// node is this one, with the address and the ranges that its tunnels end at.
	node identity.Node
	mode identity.Encryption
	mtu  podMTUs
	// every is the time after which the key is changed; 0 is never.
	every time.Duration
	open  func(context.Context) (wireGuard, error)
	// publish tells the other nodes of this one's keys. published tells whether this cluster's store has them, and
	// has been read in full.
	publish   func(context.Context, []identity.TunnelKey)
	published func() bool
	// opened is told that WireGuard is there after all: what it holds of earlier may be stale.
	opened func()
	log    *slog.Logger

	mu sync.Mutex
	// wg is nil while there is none; missing says why, if there should be one.
	wg      wireGuard
	missing error
	rotator *rotator
	changes chan struct{}
}

func newEncryption(tables *clustermesh.Tables, node identity.Node, mode identity.Encryption, log *slog.Logger) *encryption {
	return &encryption{
		tables: tables, node: node, mode: mode, log: log, missing: errNotOpened, changes: make(chan struct{}),
		publish: func(context.Context, []identity.TunnelKey) {}, published: func() bool { return true }, opened: func() {},
	}
}

var errNotOpened = errors.New("it has not been made yet")

// Open opens WireGuard for the first time. That it fails ends nothing: what must be encrypted is dropped until it is there, and Run goes on trying.
func (e *encryption) Open(ctx context.Context) {
	if e.mode == identity.EncryptOff {
		return
	}
	wg, err := e.open(ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		if e.missing.Error() != err.Error() {
			e.log.Error("WireGuard cannot be opened: what must be encrypted is dropped until it can", "error", err)
		}
		e.missing = err
		return
	}
	e.wg, e.missing = wg, nil
	e.rotator = newRotator(e, wg)
	e.notify()
}

// notify tells who derives from this node's keys that they have changed. The caller holds e.mu.
func (e *encryption) notify() {
	close(e.changes)
	e.changes = make(chan struct{})
}

// keysChanged has what follows from this node's keys follow: the tunnels, and what is published.
func (e *encryption) keysChanged(ctx context.Context) {
	e.mu.Lock()
	e.notify()
	e.mu.Unlock()
	e.publish(ctx, e.keys())
}

// changed returns a channel that is closed when this node's keys have changed since.
func (e *encryption) changed() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.changes
}

// sessionsChanged returns a channel that is closed when a session came or went since; nil if there can be none.
func (e *encryption) sessionsChanged() <-chan struct{} {
	if wg, _, _ := e.current(); wg != nil {
		return wg.Changed()
	}
	return nil
}

// current returns WireGuard, or why there is none.
func (e *encryption) current() (wireGuard, *rotator, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.wg, e.rotator, e.missing
}

func (e *encryption) shaken(node identity.NodeName, p pair) bool {
	wg, _, _ := e.current()
	return wg != nil && wg.Shaken(node, p.local, p.remote)
}

// keys are this node's that others may reach it with, the one that it prefers first.
func (e *encryption) keys() []identity.TunnelKey {
	if wg, _, _ := e.current(); wg != nil {
		return wg.Keys()
	}
	return nil
}

// rules are what tunnels follow from as it is now.
func (e *encryption) rules() tunnelRules {
	wg, rotator, missing := e.current()
	r := tunnelRules{self: e.node, mode: e.mode, mtu: e.mtu}
	if missing != nil {
		r.missing = missing.Error()
	}
	if wg != nil {
		r.slots = slotsOf(wg.Keys())
		wanted := rotator.wantedSlot()
		slices.SortStableFunc(r.slots, func(a, b uint8) int { return -compareBool(a == wanted, b == wanted) })
	}
	return r
}

// Run keeps WireGuard in order and changes its key until ctx ends.
func (e *encryption) Run(ctx context.Context) error {
	if e.mode == identity.EncryptOff {
		return nil
	}
	for ctx.Err() == nil {
		wg, rotator, _ := e.current()
		if wg == nil {
			pause(ctx, reopenPause)
			if e.Open(ctx); len(e.keys()) > 0 {
				e.publish(ctx, e.keys())
				e.opened()
			}
			continue
		}
		e.upkeep(ctx, wg, rotator)
	}
	return nil
}

// upkeep runs until ctx ends.
func (e *encryption) upkeep(ctx context.Context, wg wireGuard, rotator *rotator) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		rotator.Run(ctx)
	}()
	for ctx.Err() == nil {
		if err := wg.Run(ctx); err != nil && ctx.Err() == nil {
			e.log.Error("WireGuard is not looked after, will be tried again", "error", err)
		}
		pause(ctx, reopenPause)
	}
	<-done
}

// Close lets go of WireGuard; what it has put into the kernel stays.
func (e *encryption) Close() error {
	if wg, _, _ := e.current(); wg != nil {
		return wg.Close()
	}
	return nil
}

// Update implements Target.
func (e *encryption) Update(ctx context.Context, t identity.Tunnel) error {
	wg, _, missing := e.current()
	switch {
	case wg != nil:
		return wg.Update(ctx, t)
	case t.Mode == identity.TunnelWireGuard:
		return fmt.Errorf("WireGuard: %w", cmp.Or(missing, errNotOpened))
	}
	return nil
}

// Delete implements Target.
func (e *encryption) Delete(ctx context.Context, t identity.Tunnel) error {
	if wg, _, _ := e.current(); wg != nil {
		return wg.Delete(ctx, t)
	}
	return nil
}

// Prune implements Target.
func (e *encryption) Prune(ctx context.Context, desired iter.Seq[identity.Tunnel], synced func(identity.ClusterID) bool) error {
	if wg, _, _ := e.current(); wg != nil {
		return wg.Prune(ctx, desired, synced)
	}
	return nil
}
