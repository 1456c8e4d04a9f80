package agent

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/identity"
)

// How a change of the key goes on.
const (
	// rotationQuiet is how long nothing may have come in by the old key before it is taken to be out of use.
	rotationQuiet = 3 * time.Second
	// rotationLook is how often it is looked whether anything came in.
	rotationLook = 500 * time.Millisecond
	// rotationRetry is the time after which what failed is tried again.
	rotationRetry = 5 * time.Second
	// rotationPatience is how long a change may wait for other nodes before that is a problem.
	rotationPatience = 5 * time.Minute
	// rotationJitter is the part of the time between two changes by which they are early or late, so that the nodes of a mesh spread.
	rotationJitter = 10 // percent
)

// Steps of a change, as the API names them.
const (
	stepMoving   = "moving"   // tunnels move to the new key, each as soon as it has a session
	stepQuieting = "quieting" // the others move to it too, until nothing comes in by the old one
)

// rotator changes this node's key without losing a packet: a new one beside the old one, published; each tunnel moves when it has a session;
// then the new one is preferred, so that the others move too; and when nothing comes in by the old one any more, that ends. What it has
// to do next follows from the keys there are, so a restart at any point changes nothing.
type rotator struct {
	enc *encryption
	wg  wireGuard

	// acting serializes what changes keys.
	acting sync.Mutex

	mu     sync.Mutex
	wanted uint8 // slot of the key that tunnels are to use
	state  rotationState
	wake   chan struct{}
}

// rotationState is what is known of a change.
type rotationState struct {
	// step is empty if none is going on.
	step  string
	since time.Time
	// waiting says whom the change waits for, and since when.
	waiting map[identity.NodeName]waiting
	store   bool // it waits for the store to have the keys
	// received is what the old slot's device had received when that last changed, at quiet; byPeer the same of each peer.
	received uint64
	quiet    time.Time
	byPeer   map[identity.NodeName]uint64
	// problem is what failed, to be tried again at retry.
	problem string
	retry   time.Time
	done    uint64
}

type waiting struct {
	why   string
	since time.Time
}

func newRotator(enc *encryption, wg wireGuard) *rotator {
	r := &rotator{enc: enc, wg: wg, wake: make(chan struct{}, 1)}
	keys := wg.Keys()
	if len(keys) == 0 {
		return r
	}
	r.wanted = keys[0].Slot
	if made := r.made(); len(keys) > 1 {
		newest := slices.MaxFunc(keys, func(a, b identity.TunnelKey) int { return made[a.Slot].Compare(made[b.Slot]) })
		r.wanted = newest.Slot
		r.state.step, r.state.since = stepMoving, cmp.Or(made[newest.Slot], time.Now())
	}
	return r
}

// made returns when each slot's key was made.
func (r *rotator) made() map[uint8]time.Time {
	made := map[uint8]time.Time{}
	status, err := r.wg.Status()
	if err != nil {
		return made
	}
	for _, d := range status.Devices {
		made[d.Slot] = d.Made
	}
	return made
}

func (r *rotator) wantedSlot() uint8 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.wanted
}

// Run changes the key when it is time to, and goes on with a change that has begun, until ctx ends.
func (r *rotator) Run(ctx context.Context) {
	for ctx.Err() == nil {
		rows, look := r.advance(ctx)
		select {
		case <-r.wake:
		case <-rows:
		case <-time.After(look):
		case <-ctx.Done():
		}
	}
}

// Rotate begins a change, or joins one that goes on, and returns the new key.
func (r *rotator) Rotate(ctx context.Context) (key identity.TunnelKey, joined bool, err error) {
	r.acting.Lock()
	defer r.acting.Unlock()
	for _, k := range r.wg.Keys() {
		if k.Slot == r.wantedSlot() {
			key = k
		}
	}
	if len(r.wg.Keys()) > 1 {
		return key, true, nil
	}
	key, err = r.begin(ctx)
	wakeUp(r.wake)
	return key, false, err
}

// begin makes the new key. The caller holds acting.
func (r *rotator) begin(ctx context.Context) (identity.TunnelKey, error) {
	key, err := r.wg.Begin(ctx)
	if err != nil {
		return key, fmt.Errorf("making a new key beside the one in use: %w", err)
	}
	r.mu.Lock()
	r.wanted = key.Slot
	r.state = rotationState{step: stepMoving, since: time.Now(), waiting: map[identity.NodeName]waiting{}, done: r.state.done}
	r.mu.Unlock()
	r.enc.log.Info("the WireGuard key is being changed", "slot", key.Slot, "key", key.Key)
	r.enc.keysChanged(ctx)
	return key, nil
}

// advance does what can be done now. It returns a channel that closes when tunnels have changed, if that matters, and how long it takes at
// most until there is something to do again.
func (r *rotator) advance(ctx context.Context) (rows <-chan struct{}, look time.Duration) {
	r.acting.Lock()
	defer r.acting.Unlock()
	r.mu.Lock()
	retry := time.Until(r.state.retry)
	r.mu.Unlock()
	if retry > 0 {
		return nil, retry
	}
	var err error
	switch keys := r.wg.Keys(); len(keys) {
	case 0:
		return nil, rotationRetry
	case 1:
		if due := r.due(keys[0]); due.IsZero() || time.Until(due) > 0 {
			r.ended()
			if due.IsZero() {
				return nil, time.Hour
			}
			return nil, min(time.Until(due), time.Hour)
		}
		_, err = r.begin(ctx)
		look = rotationLook
	default:
		rows, look, err = r.goOn(ctx, keys)
	}
	r.note(err)
	return rows, look
}

// note keeps what failed for status.
func (r *rotator) note(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.problem, r.state.retry = "", time.Time{}
	if err != nil {
		r.enc.log.Error("the change of the WireGuard key does not go on, will be tried again", "error", err)
		r.state.problem, r.state.retry = "changing the WireGuard key: "+err.Error(), time.Now().Add(rotationRetry)
	}
}

func (r *rotator) ended() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.step != "" || r.state.problem != "" {
		r.state = rotationState{done: r.state.done}
	}
}

// goOn goes on with a change: two keys are in use.
func (r *rotator) goOn(ctx context.Context, keys []identity.TunnelKey) (rows <-chan struct{}, look time.Duration, err error) {
	wanted := r.wantedSlot()
	old := 1 - wanted
	lag, rows, err := r.lagging(old)
	if store := !r.enc.published(); err != nil || store || len(lag) > 0 {
		r.wait(stepMoving, lag, store)
		return rows, time.Second, err
	}
	if keys[0].Slot != wanted {
		if err := r.wg.Prefer(wanted); err != nil {
			return nil, 0, fmt.Errorf("preferring the new key: %w", err)
		}
		r.enc.keysChanged(ctx)
	}
	if !r.quiet(old) {
		return rows, rotationLook, nil
	}
	if err := r.wg.End(ctx, old); err != nil {
		return nil, 0, fmt.Errorf("ending the old key: %w", err)
	}
	r.mu.Lock()
	r.state = rotationState{done: r.state.done + 1}
	r.mu.Unlock()
	r.enc.log.Info("the WireGuard key has been changed", "slot", wanted)
	r.enc.keysChanged(ctx)
	return nil, rotationLook, nil
}

// lagging returns the nodes that this one still sends to by the old key, and why. Those that have no session by it either are dead, and
// will find the new key in the store when they come back. An agent that has just begun may not have read of some nodes yet; WireGuard knows them.
func (r *rotator) lagging(old uint8) (map[identity.NodeName]string, <-chan struct{}, error) {
	lag := map[identity.NodeName]string{}
	t := r.enc.tables
	txn := t.DB.ReadTxn()
	all, changed := t.Tunnels.AllWatch(txn)
	status, err := r.wg.Status()
	if err != nil {
		return nil, changed, fmt.Errorf("reading the WireGuard devices: %w", err)
	}
	for _, p := range status.Peers {
		if _, _, known := t.Tunnels.Get(txn, t.Tunnels.ByKey(p.Node.String())); !known && p.Slot == old && p.Shaken {
			lag[p.Node] = "its cluster's store has not been read yet"
		}
	}
	for row := range all {
		o := row.Object
		if o.Self || o.Mode != identity.TunnelWireGuard {
			continue
		}
		name := o.NodeName()
		moved := o.Local != r.enc.node.TunnelAddress(old)
		switch {
		case moved && row.Status.Kind == clustermesh.Done:
		case r.dead(name, o.Keys, old):
		case moved && row.Status.Kind == clustermesh.Failed:
			lag[name] = "the tunnel by the new key is not in force: " + row.Status.Error
		case moved:
			lag[name] = "the tunnel by the new key is not in force yet"
		default:
			lag[name] = "there is no session by the new key yet: its agent has to learn of it from this cluster's store, and the UDP port of the key's slot has to be open"
		}
	}
	return lag, changed, nil
}

func (r *rotator) dead(name identity.NodeName, keys []identity.TunnelKey, old uint8) bool {
	t := r.enc.tables
	if life, _, ok := t.Liveness.Get(t.DB.ReadTxn(), t.Liveness.ByKey(name.String())); ok {
		if s := life.Object.State; s == identity.NodeDead || s == identity.NodeLeft {
			return true
		}
	}
	return !slices.ContainsFunc(keys, func(k identity.TunnelKey) bool { return r.wg.Shaken(name, old, k.Slot) })
}

// quiet tells whether nothing has come in by the old key for long enough, since the others could know that the new one is preferred.
func (r *rotator) quiet(old uint8) bool {
	lag := map[identity.NodeName]string{}
	t := r.enc.tables
	for row := range t.Liveness.All(t.DB.ReadTxn()) {
		name := identity.NodeName{Cluster: row.Object.Cluster, Node: row.Object.Node}
		if _, _, ok := t.Tunnels.Get(t.DB.ReadTxn(), t.Tunnels.ByKey(name.String())); ok && row.Object.State == identity.NodeAgentDown {
			lag[name] = "its agent is down, so it would go on with the old key"
		}
	}
	received, err := r.wg.Received(old)
	now := time.Now()
	store := !r.enc.published()
	r.mu.Lock()
	if err != nil || store || len(lag) > 0 || received != r.state.received || r.state.quiet.IsZero() {
		r.state.received, r.state.quiet = received, now
	}
	calm := now.Sub(r.state.quiet)
	r.mu.Unlock()
	if calm < rotationQuiet {
		for name := range r.senders(old) {
			lag[name] = cmp.Or(lag[name], "it still sends by the old key")
		}
	}
	r.wait(stepQuieting, lag, store)
	return calm >= rotationQuiet
}

// senders are the nodes of which something has come in by a slot since the last call.
func (r *rotator) senders(slot uint8) map[identity.NodeName]struct{} {
	now, out := map[identity.NodeName]uint64{}, map[identity.NodeName]struct{}{}
	status, err := r.wg.Status()
	if err != nil {
		return out
	}
	for _, p := range status.Peers {
		if p.Slot == slot {
			now[p.Node] += p.Received
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, received := range now {
		if before, ok := r.state.byPeer[name]; ok && before != received {
			out[name] = struct{}{}
		}
	}
	r.state.byPeer = now
	return out
}

// wait notes whom the change waits for; who was waited for before has the same since.
func (r *rotator) wait(step string, lag map[identity.NodeName]string, store bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	next := make(map[identity.NodeName]waiting, len(lag))
	for name, why := range lag {
		since := now
		if before, ok := r.state.waiting[name]; ok {
			since = before.since
		}
		next[name] = waiting{why, since}
	}
	r.state.step, r.state.waiting, r.state.store = step, next, store
	if r.state.since.IsZero() {
		r.state.since = now
	}
	if step == stepMoving {
		r.state.quiet = time.Time{}
	}
}

// due is when a key is changed; zero: never. The jitter follows from the key, so that it is the same after a restart.
func (r *rotator) due(key identity.TunnelKey) time.Time {
	made := r.made()[key.Slot]
	if r.enc.every == 0 || made.IsZero() {
		return time.Time{}
	}
	span := r.enc.every * 2 * rotationJitter / 100
	part := time.Duration(float64(span) * float64(binary.BigEndian.Uint32(key.Key[:])) / (1 << 32))
	return made.Add(r.enc.every - span/2 + part)
}

// status says how a change goes, nil if there is none, and what is wrong.
func (r *rotator) status() (rotation *api.Rotation, done uint64, problems []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.state
	if s.problem != "" {
		problems = append(problems, s.problem)
	}
	if s.step == "" {
		return nil, s.done, problems
	}
	rotation = &api.Rotation{Step: s.step, Since: s.since, Waiting: []api.RotationWait{}, Store: s.store}
	for name, w := range s.waiting {
		rotation.Waiting = append(rotation.Waiting, api.RotationWait{Cluster: name.Cluster, Node: name.Node, Why: w.why, Since: w.since})
	}
	slices.SortFunc(rotation.Waiting, func(a, b api.RotationWait) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Node, b.Node))
	})
	if len(rotation.Waiting) > 0 && time.Since(rotation.Waiting[0].Since) > rotationPatience {
		w := rotation.Waiting[0]
		problems = append(problems, fmt.Sprintf("the change of this node's WireGuard key waits for %d nodes, for %s/%s since %s: %s",
			len(rotation.Waiting), w.Cluster, w.Node, w.Since.UTC().Format(time.RFC3339), w.Why))
	}
	return rotation, s.done, problems
}
