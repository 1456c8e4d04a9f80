package kvstore

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// roomPause is the least time between a listing and one that is only made because there is room in the quota.
const roomPause = 3 * time.Second

// Watch implements Store.
func (e *etcd) Watch(ctx context.Context, prefix string) <-chan Batch {
	out := make(chan Batch)
	started := e.spawn(func() {
		defer close(out)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(e.ctx, cancel)()
		w := &watch{etcd: e, prefix: prefix, out: out, seen: newSeen(e.quota)}
		defer e.contact.forget(w)
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
	// listed is the generation of the store that was last listed, at listedAt.
	listed   <-chan struct{}
	listedAt time.Time
	// listAnew ends follow; room does that when there is room in the quota, and is nil if there is none to be had.
	listAnew func()
	room     *time.Timer
}

func (w *watch) run(ctx context.Context) {
	forRoom := false // the listing is only made because there may be room in the quota
	for ctx.Err() == nil {
		generation := w.contact.current()
		l, revision, rest, ok := w.listUntil(ctx, w.listed == nil || w.listed == generation)
		if !ok {
			return
		}
		if generation != w.contact.current() {
			continue // the listing may mix two stores
		}
		w.listed, w.listedAt, w.revision = generation, time.Now(), revision
		batch := Batch{Events: l.finish(revision, rest), Listed: true, Revision: revision}
		w.contact.leftOut(w, w.seen.excess)
		// The reader need not hear of a listing that was only made in case there is room.
		if (!forRoom || len(batch.Events) > 0) && !w.deliver(ctx, batch) {
			return
		}
		forRoom = w.follow(ctx, generation)
	}
}

// listUntil lists until it works; false means that ctx ended.
func (w *watch) listUntil(ctx context.Context, sameStore bool) (l *listing, revision int64, rest int, ok bool) {
	pause := minBackoff
	for {
		l = w.seen.list(sameStore)
		revision, rest, err := w.list(ctx, w.prefix, func(page []Entry) (enough bool) {
			for _, entry := range page {
				l.add(entry)
			}
			return l.enough()
		})
		w.contact.watchDenied(w, err)
		if err == nil {
			return l, revision, rest, true
		}
		if pause, ok = w.rest(ctx, pause, err); !ok {
			return nil, 0, 0, false
		}
	}
}

// rest pauses after err, and returns how long the next pause is to be; false means that ctx ended. A watch that is denied gets ever
// rarer, up to deniedInterval, but goes on at once when the health check is let in.
func (w *watch) rest(ctx context.Context, pause time.Duration, err error) (next time.Duration, ok bool) {
	most := maxBackoff
	var admitted <-chan struct{}
	if denied(err) {
		most, admitted = deniedInterval, w.contact.admission()
		w.ask()
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return 0, false
	case <-admitted:
		return minBackoff, true
	case <-timer.C:
		return min(2*pause, most), true
	}
}

// follow delivers changes until the prefix must be listed anew (the history that is needed was compacted, there is room in the quota,
// or the store is another one, which closes generation) or ctx ends. Everything else, such as lost connections,
// it survives by going on from where it was. It returns whether it ended for the room.
func (w *watch) follow(ctx context.Context, generation <-chan struct{}) (forRoom bool) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	w.spawn(func() {
		select {
		case <-generation:
			cancel()
		case <-ctx.Done():
		}
	})
	w.listAnew, w.room = cancel, nil
	defer func() { forRoom = w.room != nil && !w.room.Stop() }()
	w.lookForRoom()
	for pause := minBackoff; ; {
		start := w.revision
		err := w.stream(ctx, generation)
		if ctx.Err() != nil || errors.Is(err, rpctypes.ErrCompacted) || tooLarge(err) {
			return false
		}
		if w.revision != start {
			pause = minBackoff
		}
		w.contact.watchDenied(w, err)
		ok := false
		if pause, ok = w.rest(ctx, pause, err); !ok {
			return false
		}
	}
}

// lookForRoom makes follow end, now or in a while, if keys that are left out may have room by then.
func (w *watch) lookForRoom() {
	if w.room == nil && w.seen.wantsListing() {
		w.room = time.AfterFunc(max(0, roomPause-time.Since(w.listedAt)), w.listAnew)
	}
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
