package kvstore

import (
	"context"
	"slices"
	"sort"
	"strings"
)

// Watch implements Store.
func (m *Memory) Watch(ctx context.Context, prefix string) <-chan Batch {
	out := make(chan Batch)
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	if m.closed {
		close(out)
		return out
	}
	m.wg.Go(func() {
		defer close(out)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(m.ctx, cancel)()
		w := &memoryWatch{Memory: m, prefix: prefix, seen: newSeen(m.quota), generation: -1}
		defer w.forget()
		w.run(ctx, out)
	})
	return out
}

type memoryWatch struct {
	*Memory
	prefix     string
	seen       *seen
	generation int // of the store that was listed, -1 before
	revision   int64
}

func (w *memoryWatch) run(ctx context.Context, out chan<- Batch) {
	for ctx.Err() == nil {
		batch, ready, changed := w.next()
		if !ready {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		select {
		case out <- batch:
		case <-ctx.Done():
		}
	}
}

// next returns what is to be delivered now, or a channel that is closed when it's worth asking again.
func (w *memoryWatch) next() (b Batch, ready bool, changed <-chan struct{}) {
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case w.disconnected:
		return Batch{}, false, s.changed
	case w.generation != s.generation || w.revision < s.compacted:
		b = w.list()
		return b, true, nil
	}
	from := sort.Search(len(s.history), func(i int) bool { return s.history[i].Revision > w.revision })
	b.Revision = s.revision
	w.revision = s.revision
	for _, ev := range s.history[from:] {
		if !strings.HasPrefix(ev.Key, w.prefix) {
			continue
		}
		if ev, needed := w.seen.apply(ev.Event, ev.created); needed {
			ev.Value = slices.Clone(ev.Value)
			b.Events = append(b.Events, ev)
		}
	}
	w.excess[w] = w.seen.excess
	if len(b.Events) == 0 && w.seen.wantsListing() {
		b = w.list()
	}
	return b, len(b.Events) > 0, s.changed
}

func (w *memoryWatch) list() Batch {
	s := w.store
	sameStore := w.generation == -1 || w.generation == s.generation
	w.generation, w.revision = s.generation, s.revision
	b := Batch{Events: w.seen.replace(s.list(w.prefix), s.revision, sameStore), Listed: true, Revision: s.revision}
	w.excess[w] = w.seen.excess
	return b
}

func (w *memoryWatch) forget() {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	delete(w.excess, w)
}
