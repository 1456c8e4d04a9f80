package agent

import (
	"context"
	"iter"
	"log/slog"
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
	log    *slog.Logger

	failed map[string]*failure[T]
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
		prune: make(chan struct{}, 1), log: log.With("target", name), failed: map[string]*failure[T]{},
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
		if err := r.target.Delete(ctx, row.Object); err != nil {
			r.fail(key, row.Object, true, err)
		}
		return done
	}
	if row.Status.Kind != clustermesh.Pending {
		return done // this reconciler's own answer
	}
	if old := r.failed[key]; old != nil && old.deleted {
		// What could not be deleted is wanted again; the update overwrites it.
		delete(r.failed, key)
	}
	return append(done, r.update(ctx, row, revision))
}

func (r *reconciler[T]) update(ctx context.Context, row *clustermesh.Row[T], revision statedb.Revision) outcome[T] {
	key := r.table.Key(row.Object)
	err := r.target.Update(ctx, row.Object)
	if err != nil {
		r.fail(key, row.Object, false, err)
	} else {
		delete(r.failed, key)
	}
	return outcome[T]{row, revision, err}
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

// untilRetry is how long it is until the next retry is due.
func (r *reconciler[T]) untilRetry() time.Duration {
	wait := time.Hour
	for _, f := range r.failed {
		wait = min(wait, time.Until(f.next))
	}
	return max(wait, 0)
}

func (r *reconciler[T]) retry(ctx context.Context) []outcome[T] {
	var done []outcome[T]
	read := r.db.ReadTxn()
	now := time.Now()
	for key, f := range r.failed {
		if f.next.After(now) {
			continue
		}
		if f.deleted {
			if err := r.target.Delete(ctx, f.object); err != nil {
				r.fail(key, f.object, true, err)
			} else {
				delete(r.failed, key)
			}
			continue
		}
		row, revision, ok := r.table.Get(read, r.table.ByKey(key))
		if !ok {
			delete(r.failed, key)
			continue
		}
		done = append(done, r.update(ctx, row, revision))
	}
	return done
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
	if err := r.target.Prune(ctx, desired, r.synced); err != nil {
		r.log.Warn("stale entries remain, will be retried", "error", err)
		time.AfterFunc(longestRetry, r.Prune)
	}
}

// both is two targets that must agree with one table.
type both[T any] struct{ first, second Target[T] }

func (b both[T]) Update(ctx context.Context, object T) error {
	if err := b.first.Update(ctx, object); err != nil {
		return err
	}
	return b.second.Update(ctx, object)
}

func (b both[T]) Delete(ctx context.Context, object T) error {
	if err := b.second.Delete(ctx, object); err != nil {
		return err
	}
	return b.first.Delete(ctx, object)
}

func (b both[T]) Prune(ctx context.Context, desired iter.Seq[T], synced func(identity.ClusterID) bool) error {
	if err := b.first.Prune(ctx, desired, synced); err != nil {
		return err
	}
	return b.second.Prune(ctx, desired, synced)
}
