package kvstore

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Watch implements Store.
func (e *etcd) Watch(ctx context.Context, prefix string) <-chan Batch {
	out := make(chan Batch)
	started := e.spawn(func() {
		defer close(out)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(e.ctx, cancel)()
		w := &watch{etcd: e, prefix: prefix, out: out, seen: newSeen()}
		w.run(ctx)
	})
	if !started {
		close(out)
	}
	return out
}

// watch is one Watch: it lists, follows the changes from there on, and starts over when it can't.
type watch struct {
	*etcd
	prefix string
	out    chan<- Batch
	seen   *seen
	// revision up to which everything was delivered.
	revision int64
}

func (w *watch) run(ctx context.Context) {
	var listed <-chan struct{} // the generation of the store that was last listed
	for ctx.Err() == nil {
		generation := w.contact.current()
		entries, revision, ok := w.listUntil(ctx)
		if !ok {
			return
		}
		if generation != w.contact.current() {
			continue // the listing may mix two stores
		}
		w.revision = revision
		events := w.seen.replace(entries, revision, listed == nil || listed == generation)
		listed = generation
		if !w.deliver(ctx, Batch{Events: events, Listed: true, Revision: revision}) {
			return
		}
		w.follow(ctx, generation)
	}
}

// listUntil lists until it works; false means that ctx ended.
func (w *watch) listUntil(ctx context.Context) (entries []Entry, revision int64, ok bool) {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, maxBackoff) {
		entries, revision, err := w.list(ctx, w.prefix)
		if err == nil {
			return entries, revision, true
		}
		if !sleep(ctx, pause) {
			return nil, 0, false
		}
	}
}

// follow delivers changes until the prefix must be listed anew (the history that is needed was compacted,
// or the store is another one, which closes generation) or ctx ends. Everything else, such as lost connections,
// it survives by going on from where it was.
func (w *watch) follow(ctx context.Context, generation <-chan struct{}) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	w.spawn(func() {
		select {
		case <-generation:
			cancel()
		case <-ctx.Done():
		}
	})
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, maxBackoff) {
		start := w.revision
		err := w.stream(ctx, generation)
		if ctx.Err() != nil || errors.Is(err, rpctypes.ErrCompacted) {
			return
		}
		if w.revision != start {
			pause = 50 * time.Millisecond
		}
		if !sleep(ctx, pause) {
			return
		}
	}
}

// stream delivers what one watch of etcd's client brings, until that ends.
func (w *watch) stream(ctx context.Context, generation <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	opts := []clientv3.OpOption{clientv3.WithRev(w.revision + 1), clientv3.WithProgressNotify(), clientv3.WithFragment(), clientv3.WithPrefix()}
	for resp := range w.client.Watch(ctx, w.prefix, opts...) {
		if err := resp.Err(); err != nil {
			return err
		}
		w.contact.answered(resp.Header)
		select {
		case <-generation: // not the store that was listed: its events must be seen as a difference
			return nil
		default:
		}
		if !w.changes(ctx, resp) {
			return nil
		}
	}
	return nil
}

// changes delivers the events of one response; false means that ctx ended.
func (w *watch) changes(ctx context.Context, resp clientv3.WatchResponse) bool {
	if len(resp.Events) == 0 {
		w.revision = max(w.revision, resp.Header.Revision)
		return true
	}
	w.revision = max(w.revision, resp.Events[len(resp.Events)-1].Kv.ModRevision)
	batch := Batch{Revision: w.revision}
	for _, raw := range resp.Events {
		ev := Event{Kind: EventPut, Entry: Entry{Key: string(raw.Kv.Key), Value: raw.Kv.Value, Revision: raw.Kv.ModRevision}}
		if raw.Type == clientv3.EventTypeDelete {
			ev.Kind, ev.Value = EventDelete, nil
		}
		if w.seen.apply(ev) {
			batch.Events = append(batch.Events, ev)
		}
	}
	return len(batch.Events) == 0 || w.deliver(ctx, batch)
}

func (w *watch) deliver(ctx context.Context, b Batch) bool {
	select {
	case w.out <- b:
		return true
	case <-ctx.Done():
		return false
	}
}

// sleep pauses for d; false means that ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
