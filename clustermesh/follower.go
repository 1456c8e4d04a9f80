package clustermesh

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"causeway/identity"
	"causeway/kvstore"
)

// orphanGrace is how long entries of a node outlive the loss of a whole store once the
// node has published anew, so that what it is still writing is not taken for gone.
const orphanGrace = 30 * time.Second

// FollowerConfig says whose store to follow, and into which tables.
type FollowerConfig struct {
	// Cluster and ID that the channel speaks for, and for nobody else.
	Cluster string
	ID      identity.ClusterID
	// Self is the node that this agent runs on. What the channel of its own cluster
	// says about it is not followed (the node knows better) but collected: see Own.
	Self   identity.NodeName
	Store  kvstore.Store
	Tables *Tables
	// Refusals collects what is refused, of all channels.
	Refusals *Refusals
	// Synced is called once, when what is not in the tables is not in the store either: after the first complete
	// listing has been applied, but only a while later if the store was empty then, as its owners are still writing.
	Synced func()
	// Own is called after every listing of the own cluster's store with the keys
	// that the store holds in this node's name. Before the cluster's own entry is there, complete is false: what
	// the cluster declares is not known, and so neither what is left over; it is called again then.
	Own func(keys []string, complete bool)
	// Disputed is called with keys of this node's that somebody else has changed or deleted in the store.
	Disputed func(keys []string)
	// Exported is set where the cluster's services, and slices that are the cluster's, come from Kubernetes: what the own cluster's store has of them is
	// for others. It is not followed, but for its versions; instead it is handed to Exported, as are the batches that end a listing.
	Exported func(kvstore.Batch)
	// Changed is called when the cluster's announced ranges may have changed.
	Changed func()
	// Claims knows what the other channels hold, so that two clusters cannot have one range.
	Claims *Claims
	Log    *slog.Logger
}

// Follower follows one cluster's store into the tables. All of its state belongs to the
// goroutine of Run; what others may ask for is behind mu.
type Follower struct {
	FollowerConfig
	local bool

	// info is what the cluster says about itself; nothing else is accepted before it is known.
	info *identity.ClusterInfo
	// accepted are the keys whose rows are in the tables.
	accepted map[string]struct{}
	// waiting are entries that were not accepted, refused or too early, with their values, so
	// that they can be judged again when what they depend on changes.
	waiting      map[string]waitingEntry
	waitingBytes int
	// own are the keys that the own cluster's store holds in this node's name.
	own map[string]struct{}
	// changed is set when something that waiting entries may depend on has changed; others has changed when that
	// came from elsewhere.
	changed bool
	others  others
	// slices are the versions of accepted slices; rows of nodes and addresses have their own.
	slices map[string]identity.Version
	// revision of the store that the last batch brought, listing: the batch being applied is one.
	revision int64
	listing  bool
	// disputed are own keys that the batch shows as somebody else left them.
	disputed []string
	// ownDue: Own has not been told about the last listing with the cluster known.
	ownDue bool
	// empty: the first listing did not even have the cluster's entry. syncAt is when it counts as read in full then.
	empty  bool
	syncAt time.Time
	// marks are the nodes whose synced mark is in the store, and identity.ServicesMark if the cluster's is.
	marks map[string]time.Time
	// orphans are entries whose store was lost: gone from it, but not by their owner's will.
	orphans map[string]struct{}

	// news wakes the loop when gossip has offered something.
	news chan struct{}

	mu sync.Mutex
	// offered is what gossip has brought and nobody has looked at; pending what the store has not shown yet; gone what
	// was deleted lately. slices, above, is written under mu too, since Known asks for it.
	offered   []News
	pending   map[string]pendingNews
	gone      map[string]goneEntry
	listed    bool
	synced    bool
	count     int
	held      int
	heartbeat time.Time
	ahead     time.Duration
	cluster   *identity.ClusterInfo
	lost      bool
}

// NewFollower returns a follower that does nothing until Run.
func NewFollower(cfg FollowerConfig) *Follower {
	return &Follower{
		FollowerConfig: cfg,
		local:          cfg.Cluster == cfg.Self.Cluster,
		accepted:       map[string]struct{}{},
		waiting:        map[string]waitingEntry{},
		own:            map[string]struct{}{},
		marks:          map[string]time.Time{},
		orphans:        map[string]struct{}{},
		slices:         map[string]identity.Version{},
		news:           make(chan struct{}, 1),
		pending:        map[string]pendingNews{},
		gone:           map[string]goneEntry{},
	}
}

// State of a follower, for status.
type State struct {
	Synced    bool
	Accepted  int
	Heartbeat time.Time
	// Ahead is how much the clock of who wrote that is ahead of this node's, less the way of the heartbeat.
	Ahead time.Duration
	// Lost is true while the store has been emptied and its entries are held from memory; Held counts those.
	Lost bool
	Held int
	Info *identity.ClusterInfo
}

// State returns the follower's state as of the last batch.
func (f *Follower) State() State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return State{Synced: f.synced, Accepted: f.count, Heartbeat: f.heartbeat, Ahead: f.ahead, Lost: f.lost, Held: f.held, Info: f.cluster}
}

// Run follows the store until ctx ends. Losing the store loses nothing: the tables stay as they are.
func (f *Follower) Run(ctx context.Context) error {
	watch := f.Store.Watch(ctx, kvstore.Prefix)
	tick := time.NewTicker(waitPatience / 2)
	defer tick.Stop()
	for {
		select {
		case batch, ok := <-watch:
			if !ok {
				if ctx.Err() == nil {
					return fmt.Errorf("following the store of cluster %s: %w", f.Cluster, kvstore.ErrClosed)
				}
				return nil
			}
			f.apply(batch)
		case <-f.news:
			f.applyNews(time.Now())
		case now := <-tick.C:
			f.forget(now)
			f.dropOrphans(now)
			f.judgeForOthers()
			f.showWaiting(now)
			f.settle(now)
		}
	}
}

// apply brings the tables to what the batch says, in one transaction.
func (f *Follower) apply(batch kvstore.Batch) {
	lost := f.noteLoss(batch)
	f.listing = batch.Listed
	f.reportExported(batch)

	txn := f.write()
	defer txn.Abort()
	for _, c := range newest(batch.Events) {
		f.noteDispute(c)
		switch {
		case c.Kind == kvstore.EventPut && !f.storePut(c.Key, c.Value):
			// Gossip has said meanwhile that it is gone, and the store is about to.
		case c.Kind == kvstore.EventPut:
			if c.renewed && !lost && f.info != nil {
				f.delete(txn, c.Key) // the owner's older word counts no more, whatever its version
			}
			delete(f.orphans, c.Key)
			f.put(txn, c.Key, c.Value)
		case (lost || f.info == nil) && f.holds(c.Key):
			// The store was emptied or restored. Its owners have withdrawn nothing.
			f.orphans[c.Key] = struct{}{}
		case f.storeDelete(c.Key, time.Now()):
			f.delete(txn, c.Key)
		}
	}
	f.judgeAgain(txn)
	txn.Commit()
	f.report(batch)
}

// reportExported hands on what the store says of what the cluster has for others.
func (f *Follower) reportExported(batch kvstore.Batch) {
	if f.Exported == nil {
		return
	}
	batch.Events = slices.DeleteFunc(slices.Clone(batch.Events), func(ev kvstore.Event) bool { return !exported(f.Cluster, ev.Key) })
	if batch.Listed || len(batch.Events) > 0 {
		f.Exported(batch)
	}
}

// holds tells whether the tables have the key's rows.
func (f *Follower) holds(key string) bool {
	_, ok := f.accepted[key]
	return ok
}

// noteLoss tells, before anything of a batch is applied, whether the store was emptied or restored, which decides
// how the batch's deletions are read: its revision went back, or it lost its own name.
func (f *Follower) noteLoss(batch kvstore.Batch) bool {
	lost := batch.Listed && batch.Revision < f.revision
	f.revision = batch.Revision
	for _, ev := range batch.Events {
		if ev.Key == identity.ClusterKey && ev.Kind == kvstore.EventDelete && f.info != nil {
			lost, f.info = true, nil
		}
	}
	if lost {
		f.Log.Warn("the store was emptied or restored; what is missing in it is held until its owners publish again", "cluster", f.Cluster, "entries", len(f.accepted))
		clear(f.marks)
	}
	return lost
}

// noteDispute notes a key that this node has written, and that somebody else has changed or deleted since.
func (f *Follower) noteDispute(c change) {
	if !f.local || f.Disputed == nil {
		return
	}
	row, _, ok := f.Tables.Publications.Get(f.Tables.DB.ReadTxn(), f.Tables.Publications.ByKey(c.Key))
	if !ok || row.Status.Kind != Done {
		return
	}
	if c.Kind == kvstore.EventDelete || row.Object.Value != string(c.Value) && f.isOwn(c.Key, c.Value) {
		f.disputed = append(f.disputed, c.Key)
	}
}

// dropOrphans removes what nodes, and whoever publishes the cluster's services, have not renewed although they have published again after the loss of
// their store.
func (f *Follower) dropOrphans(now time.Time) {
	if len(f.orphans) == 0 || f.info == nil {
		return
	}
	txn := f.write()
	defer txn.Abort()
	for key := range f.orphans {
		mark, ok := f.markOf(key)
		if !ok {
			continue
		}
		if at, marked := f.marks[mark]; marked && now.Sub(at) > orphanGrace {
			delete(f.orphans, key)
			f.delete(txn, key)
		}
	}
	txn.Commit()
	f.report(kvstore.Batch{})
}

// settle says that the store has been read in full, once its owners had time to fill it.
func (f *Follower) settle(now time.Time) {
	if f.syncAt.IsZero() || now.Before(f.syncAt) {
		return
	}
	f.syncAt = time.Time{}
	if f.Synced != nil {
		f.Synced()
	}
}

// report says what has come of a batch, to status and to whom it concerns. No locks are held.
func (f *Follower) report(batch kvstore.Batch) {
	f.mu.Lock()
	announced := f.cluster != f.info
	// An empty store has said nothing: there is no sync without the cluster's own entry.
	f.empty = f.empty || batch.Listed && !f.listed && f.info == nil
	f.listed = f.listed || batch.Listed
	first := !f.synced && f.listed && f.info != nil
	f.synced = f.synced || first
	f.count, f.held = len(f.accepted), len(f.orphans)
	f.cluster = f.info
	f.lost = f.info == nil && len(f.orphans) > 0
	f.mu.Unlock()

	if announced && f.Changed != nil {
		f.Changed()
	}
	f.reportOwn(batch.Listed)
	switch {
	case first && f.empty:
		f.syncAt = time.Now().Add(orphanGrace)
	case first && f.Synced != nil:
		f.Synced()
	}
}

// reportOwn says what the own cluster's store holds in this node's name.
func (f *Follower) reportOwn(listed bool) {
	if !f.local {
		return
	}
	if complete := f.info != nil; f.Own != nil && (listed || f.ownDue && complete) {
		f.ownDue = !complete
		f.Own(f.ownKeys(), complete)
	}
	if len(f.disputed) > 0 {
		keys := f.disputed
		f.disputed = nil
		f.Disputed(keys)
	}
}

// ownKeys lists the keys that the store holds in this node's name.
func (f *Follower) ownKeys() []string {
	keys := slices.Sorted(maps.Keys(f.own))
	if f.info != nil {
		keys = append(keys, identity.ClusterKey)
	}
	return keys
}

// acceptHeartbeat notes when the channel last carried a new heartbeat, by this node's own clock.
func (f *Follower) acceptHeartbeat(key string, value []byte) error {
	beat, err := identity.DecodeHeartbeat(key, value)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.heartbeat = time.Now()
	if !f.listing { // one that was there before may have been for long
		f.ahead = beat.At.Sub(f.heartbeat)
	}
	f.mu.Unlock()
	return nil
}

// change is what has become of a key in a batch.
type change struct {
	kvstore.Event
	// renewed: an entry that belongs to a node was deleted, and then written anew.
	renewed bool
}

// newest keeps the last event of every key, in an order in which what others depend on comes
// first: the cluster, its nodes, then the rest.
func newest(events []kvstore.Event) []change {
	last := make(map[string]int, len(events))
	deleted := map[string]bool{}
	for i, ev := range events {
		last[ev.Key] = i
		if ev.Kind == kvstore.EventDelete {
			deleted[ev.Key] = true
		}
	}
	out := make([]change, 0, len(last))
	for i, ev := range events {
		if last[ev.Key] == i {
			out = append(out, change{Event: ev, renewed: deleted[ev.Key] && ofNode(ev.Key)})
		}
	}
	slices.SortStableFunc(out, func(a, b change) int { return rank(a.Event) - rank(b.Event) })
	return out
}

// ofNode tells whether an entry has a version.
func ofNode(key string) bool {
	kind, _, _ := strings.Cut(strings.TrimPrefix(key, kvstore.Prefix), "/")
	return kind == "nodes" || kind == "addresses" || kind == "slices"
}

// rank orders puts from the cluster down to addresses and deletions the other way round, puts first.
func rank(ev kvstore.Event) int {
	if ev.Kind == kvstore.EventDelete {
		return 20 - rankKey(ev.Key)
	}
	return rankKey(ev.Key)
}

// rankKey orders keys by what others depend on.
func rankKey(key string) int {
	kind, _, _ := strings.Cut(strings.TrimPrefix(key, kvstore.Prefix), "/")
	r, ok := map[string]int{"cluster": 0, "nodes": 1, "identities": 2, "services": 3, "addresses": 4, "slices": 5, "synced": 6}[kind]
	if !ok {
		return 7
	}
	return r
}
