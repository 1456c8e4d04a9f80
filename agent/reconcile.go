package agent

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
)

// Retries of a row that its target refused: from the first pause, doubling, up to the longest.
const (
	firstRetry   = 50 * time.Millisecond
	longestRetry = 2 * time.Second
)

// Target is what a reconciler makes agree with a table: a BPF map, routes, a store. Its methods are
// called by one goroutine, and are idempotent.
type Target[T any] interface {
	Update(ctx context.Context, object T) error
	Delete(ctx context.Context, object T) error
	// Prune removes what is in the target but not desired, as far as it belongs to a cluster whose
	// channel has synced.
	Prune(ctx context.Context, desired iter.Seq[T], synced func(identity.ClusterID) bool) error
}

// reconciler makes one target agree with one table. StateDB's own is made for its dependency injection
// (its job group cannot be built by hand), so this is the same contract as one loop.
type reconciler[T any] struct {
	name   string
	table  clustermesh.Table[T]
	db     *statedb.DB
	target Target[T]
	// prune asks for a pruning; synced tells whose entries may go.
	prune  chan struct{}
	synced func(identity.ClusterID) bool
	// moved tells whether two objects of one row are different entries of the target, so that the old one has to
	// be deleted; nil if a row's key says it all. applied are the objects that the target has, then.
	moved   func(old, now T) bool
	applied map[string]T
	log     *slog.Logger

	failed map[string]*failure[T]
	// retried is when failures were last looked at.
	retried time.Time

	mu sync.Mutex
	// undone says what remains in the target although no row shows it: deletions and prunings that failed.
	undone, unpruned string
}

// failure is a row whose target did not agree yet.
type failure[T any] struct {
	object  T
	deleted bool
	pause   time.Duration
	next    time.Time
}

func newReconciler[T any](name string, tables *clustermesh.Tables, table clustermesh.Table[T], target Target[T], synced func(identity.ClusterID) bool, log *slog.Logger) *reconciler[T] {
	return &reconciler[T]{
		name: name, table: table, db: tables.DB, target: target, synced: synced,
		prune: make(chan struct{}, 1), log: log.With("target", name), failed: map[string]*failure[T]{}, applied: map[string]T{},
	}
}

// Prune asks for a pruning soon; it never blocks.
func (r *reconciler[T]) Prune() {
	select {
	case r.prune <- struct{}{}:
	default:
	}
}

// Run reconciles until ctx ends.
func (r *reconciler[T]) Run(ctx context.Context) error {
	txn := r.db.WriteTxn(r.table)
	changes, err := r.table.Changes(txn)
	if err != nil {
		txn.Abort()
		return err
	}
	txn.Commit()
	defer changes.Close()

	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	for {
		news, more := changes.Next(r.db.ReadTxn())
		var done []outcome[T]
		for change, revision := range news {
			done = r.change(ctx, change, revision, done)
		}
		r.answer(done)
		r.noteUndone()
		retry.Reset(r.untilRetry())
		select {
		case <-more:
		case <-retry.C:
			r.answer(r.retry(ctx))
		case <-r.prune:
			r.runPrune(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// outcome is what a target said of a row.
type outcome[T any] struct {
	row      *clustermesh.Row[T]
	revision statedb.Revision
	err      error
}

func (r *reconciler[T]) change(ctx context.Context, change statedb.Change[*clustermesh.Row[T]], revision statedb.Revision, done []outcome[T]) []outcome[T] {
	row := change.Object
	key := r.table.Key(row.Object)
	if change.Deleted {
		delete(r.failed, key)
		r.remove(ctx, key, row.Object)
		return done
	}
	if row.Status.Kind != clustermesh.Pending {
		return done // this reconciler's own answer
	}
	if old := r.failed[key]; old != nil && old.deleted {
		// What could not be deleted is wanted again; the update overwrites it, or deletes it if it has moved.
		delete(r.failed, key)
	}
	return append(done, r.update(ctx, row, revision))
}

func (r *reconciler[T]) update(ctx context.Context, row *clustermesh.Row[T], revision statedb.Revision) outcome[T] {
	key := r.table.Key(row.Object)
	err := r.leave(ctx, key, row.Object)
	if err == nil {
		err = r.target.Update(ctx, row.Object)
	}
	if err != nil {
		r.fail(key, row.Object, false, err)
	} else {
		delete(r.failed, key)
	}
	return outcome[T]{row, revision, err}
}

// remove deletes what a row was, and tries again later if that fails.
func (r *reconciler[T]) remove(ctx context.Context, key string, object T) {
	err := r.leave(ctx, key, object)
	if err == nil {
		err = r.target.Delete(ctx, object)
	}
	if err != nil {
		r.fail(key, object, true, err)
		return
	}
	delete(r.failed, key)
	delete(r.applied, key)
}

// leave deletes what the row was before in the target, if it has moved from there, and notes where it is now. Changes do
// not show that: a row that was deleted and inserted again meanwhile is one change.
func (r *reconciler[T]) leave(ctx context.Context, key string, now T) error {
	if r.moved == nil {
		return nil
	}
	if old, ok := r.applied[key]; ok && r.moved(old, now) {
		if err := r.target.Delete(ctx, old); err != nil {
			return err
		}
	}
	r.applied[key] = now
	return nil
}

func (r *reconciler[T]) fail(key string, object T, deleted bool, err error) {
	f := r.failed[key]
	if f == nil {
		f = &failure[T]{pause: firstRetry}
		r.failed[key] = f
		r.log.Warn("not reconciled, will be retried", "key", key, "error", err)
	}
	f.object, f.deleted = object, deleted
	f.next = time.Now().Add(f.pause)
	f.pause = min(2*f.pause, longestRetry)
}

// noteUndone says for status which deletions have failed so far.
func (r *reconciler[T]) noteUndone() {
	count, first := 0, ""
	for key, f := range r.failed {
		if f.deleted {
			count++
			first = key
		}
	}
	text := ""
	if count > 0 {
		text = fmt.Sprintf("%d %s are gone but could not be removed yet, among them %s", count, r.name, first)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.undone = text
}

// problems says in sentences what remains in the target although no row shows it.
func (r *reconciler[T]) problems() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc([]string{r.undone, r.unpruned}, func(s string) bool { return s == "" })
}

// untilRetry is how long it is until the next retry is due. Many failures are looked at together, at most every
// firstRetry, as each look costs as much as there are failures.
func (r *reconciler[T]) untilRetry() time.Duration {
	wait := time.Hour
	for _, f := range r.failed {
		wait = min(wait, time.Until(f.next))
	}
	return max(wait, time.Until(r.retried.Add(firstRetry)), 0)
}

func (r *reconciler[T]) retry(ctx context.Context) []outcome[T] {
	var done []outcome[T]
	read := r.db.ReadTxn()
	now := time.Now()
	r.retried = now
	before := len(r.failed)
	for key, f := range r.failed {
		if f.next.After(now) {
			continue
		}
		if f.deleted {
			r.remove(ctx, key, f.object)
			continue
		}
		row, revision, ok := r.table.Get(read, r.table.ByKey(key))
		if !ok {
			delete(r.failed, key)
			continue
		}
		done = append(done, r.update(ctx, row, revision))
	}
	if len(r.failed) < before {
		r.retrySoon(now)
	}
	return done
}

// retrySoon has every failure tried again at once: the target has begun to agree, and what some rows waited for
// (a store that answers, the node's name in it) is there for the others too.
func (r *reconciler[T]) retrySoon(now time.Time) {
	for _, f := range r.failed {
		f.next, f.pause = now, firstRetry
	}
}

// answer writes into rows how far they got, unless a source has changed them since.
func (r *reconciler[T]) answer(done []outcome[T]) {
	if len(done) == 0 {
		return
	}
	txn := r.db.WriteTxn(r.table)
	defer txn.Abort()
	for _, o := range done {
		status := clustermesh.Status{Kind: clustermesh.Done, At: time.Now()}
		if o.err != nil {
			status = clustermesh.Status{Kind: clustermesh.Failed, Error: o.err.Error(), At: status.At}
			if o.row.Status.Kind == status.Kind && o.row.Status.Error == status.Error {
				continue // as the row says already
			}
		}
		// A row that was changed or deleted meanwhile has its own turn coming.
		_, _, _ = r.table.CompareAndSwap(txn, o.revision, &clustermesh.Row[T]{Object: o.row.Object, Status: status})
	}
	txn.Commit()
}

func (r *reconciler[T]) runPrune(ctx context.Context) {
	desired := func(yield func(T) bool) {
		for row := range r.table.All(r.db.ReadTxn()) {
			if !yield(row.Object) {
				return
			}
		}
	}
	err, text := r.target.Prune(ctx, desired, r.synced), ""
	if err != nil {
		r.log.Warn("stale entries remain, will be retried", "error", err)
		text = fmt.Sprintf("stale %s remain: %v", r.name, err)
		time.AfterFunc(longestRetry, r.Prune)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unpruned = text
}

// chain is several targets that must agree with one table: each after those before it, and the last one first when something goes.
type chain[T any] []Target[T]

func (c chain[T]) Update(ctx context.Context, object T) error {
	for _, target := range c {
		if err := target.Update(ctx, object); err != nil {
			return err
		}
	}
	return nil
}

func (c chain[T]) Delete(ctx context.Context, object T) error {
	for _, target := range slices.Backward(c) {
		if err := target.Delete(ctx, object); err != nil {
			return err
		}
	}
	return nil
}

func (c chain[T]) Prune(ctx context.Context, desired iter.Seq[T], synced func(identity.ClusterID) bool) error {
	for _, target := range slices.Backward(c) {
		if err := target.Prune(ctx, desired, synced); err != nil {
			return err
		}
	}
	return nil
}
