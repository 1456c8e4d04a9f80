package kvstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// harness is an implementation of Store under the contract test.
type harness struct {
	// open returns a client of the one store, which is empty at first.
	open func(t *testing.T) Store
	// limited is open with a quota for watches.
	limited func(t *testing.T, q Quota) Store
	// expire takes the store away from all clients for longer than the leases last, does
	// during to the store, and gives it back.
	expire func(t *testing.T, during func(Store))
	// cut takes the store away from all clients, does during to the store, compacts its history, and gives it back.
	cut func(t *testing.T, during func(Store))
	// wipe replaces the store by an empty one.
	wipe func(t *testing.T)
}

func TestEtcd(t *testing.T) {
	testContract(t, etcdHarness)
}

func TestMemory(t *testing.T) {
	testContract(t, memoryHarness)
}

func testContract(t *testing.T, start func(t *testing.T) *harness) {
	for name, test := range map[string]func(*testing.T, *harness){
		"get, put, delete":                  testBasics,
		"create and compare-and-swap":       testConditionalWrites,
		"transaction":                       testTxn,
		"transaction on a free prefix":      testTxnPrefix,
		"bad transactions are refused":      testBadTxn,
		"list is ordered and complete":      testList,
		"watch lists, then follows":         testWatch,
		"watch ends with its context":       testWatchEnds,
		"watch after compaction":            testWatchCompacted,
		"watch of a wiped store":            testWatchWiped,
		"leased keys come back":             testLeaseExpiry,
		"leased keys in a wiped store":      testLeaseWiped,
		"close keeps leased keys":           testClose,
		"a claimed key stays with the next": testClaimed,
		"a held key goes with its lease":    testHold,
		"a held key is given up":            testRelease,
		"a held key in a wiped store":       testHoldWiped,
		"quota of entries":                  testQuota,
		"quota of bytes":                    testQuotaBytes,
		"quota after compaction":            testQuotaCompacted,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, start(t))
		})
	}
}

func testBasics(t *testing.T, h *harness) {
	s := h.open(t)
	ctx := t.Context()
	if _, err := s.Get(ctx, "a"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), `"a"`) {
		t.Fatalf("get of a missing key: %v", err)
	}
	must(t, s.Put(ctx, "a", []byte("1")))
	first := get(t, s, "a")
	must(t, s.Put(ctx, "a", []byte("2")))
	second := get(t, s, "a")
	if string(first.Value) != "1" || string(second.Value) != "2" || second.Revision <= first.Revision {
		t.Fatalf("got %+v, then %+v", first, second)
	}
	must(t, s.Put(ctx, "empty", nil))
	if e := get(t, s, "empty"); len(e.Value) != 0 {
		t.Fatalf("empty value came back as %q", e.Value)
	}
	must(t, s.Delete(ctx, "a"))
	must(t, s.Delete(ctx, "a"))
	if _, err := s.Get(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("get of a deleted key: %v", err)
	}
	status := s.Status()
	if !status.Connected || status.LastError != "" || status.Revision < second.Revision || time.Since(status.LastContact) > time.Minute {
		t.Fatalf("status %+v", status)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.Put(canceled, "b", nil); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
		t.Fatalf("put with a canceled context: %v", err)
	}
}

func testConditionalWrites(t *testing.T, h *harness) {
	s, other := h.open(t), h.open(t)
	ctx := t.Context()
	must(t, s.Create(ctx, "a", []byte("1")))
	if err := other.Create(ctx, "a", []byte("2")); !errors.Is(err, ErrConflict) {
		t.Fatalf("second create: %v", err)
	}
	e := get(t, other, "a")
	must(t, other.CompareAndSwap(ctx, "a", e.Revision, []byte("3")))
	if err := s.CompareAndSwap(ctx, "a", e.Revision, []byte("4")); !errors.Is(err, ErrConflict) {
		t.Fatalf("swap from an old revision: %v", err)
	}
	if e := get(t, s, "a"); string(e.Value) != "3" {
		t.Fatalf("value is %q", e.Value)
	}
	must(t, s.CompareAndSwap(ctx, "new", 0, []byte("5")))
	if err := s.CompareAndSwap(ctx, "missing", 7, nil); !errors.Is(err, ErrConflict) {
		t.Fatalf("swap of a missing key: %v", err)
	}
}

func testTxn(t *testing.T, h *harness) {
	s := h.open(t)
	ctx := t.Context()
	must(t, s.Put(ctx, "old", []byte("x")))
	rev := get(t, s, "old").Revision
	conds := []Condition{{Key: "old", Revision: rev}, {Key: "new"}}
	ops := []Op{{Kind: OpPut, Key: "new", Value: []byte("y")}, {Kind: OpDelete, Key: "old"}, {Kind: OpDelete, Key: "never"}}
	must(t, s.Txn(ctx, conds, ops))
	if keys := listKeys(t, s, ""); !slices.Equal(keys, []string{"new"}) {
		t.Fatalf("keys %v", keys)
	}
	if err := s.Txn(ctx, conds, []Op{{Kind: OpPut, Key: "half", Value: nil}}); !errors.Is(err, ErrConflict) {
		t.Fatalf("second transaction: %v", err)
	}
	if keys := listKeys(t, s, ""); !slices.Equal(keys, []string{"new"}) {
		t.Fatalf("a failed transaction left %v", keys)
	}
}

func testTxnPrefix(t *testing.T, h *harness) {
	s := h.open(t)
	ctx := t.Context()
	release := func() error {
		return s.Txn(ctx, []Condition{{Key: "refs/7/", Prefix: true}}, []Op{{Kind: OpDelete, Key: "ids/7"}})
	}
	must(t, s.Put(ctx, "ids/7", []byte("labels")))
	must(t, s.Put(ctx, "refs/7/node1", nil))
	must(t, s.Put(ctx, "refs/70/node1", nil))
	if err := release(); !errors.Is(err, ErrConflict) {
		t.Fatalf("release of a used identity: %v", err)
	}
	must(t, s.Delete(ctx, "refs/7/node1"))
	must(t, release())
	if keys := listKeys(t, s, ""); !slices.Equal(keys, []string{"refs/70/node1"}) {
		t.Fatalf("keys %v", keys)
	}
}

func testBadTxn(t *testing.T, h *harness) {
	s := h.open(t)
	put := Op{Kind: OpPut, Key: "a"}
	many := make([]Op, maxTxnOps+1)
	for i := range many {
		many[i] = Op{Kind: OpPut, Key: fmt.Sprint(i)}
	}
	for want, txn := range map[string]struct {
		conds []Condition
		ops   []Op
	}{
		"written twice":   {ops: []Op{put, put}},
		"empty key":       {ops: []Op{{Kind: OpPut}}},
		"kind":            {ops: []Op{{Key: "a"}}},
		"at most":         {ops: many},
		"prefix":          {conds: []Condition{{Key: "p", Prefix: true, Revision: 3}}, ops: []Op{put}},
		"on an empty key": {conds: []Condition{{}}, ops: []Op{put}},
	} {
		if err := s.Txn(t.Context(), txn.conds, txn.ops); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error with %q, got %v", want, err)
		}
	}
	if keys := listKeys(t, s, ""); len(keys) > 0 {
		t.Fatalf("refused transactions wrote %v", keys)
	}
}

func testList(t *testing.T, h *harness) {
	const n = 2*listPage + 500
	s := h.open(t)
	ctx := t.Context()
	must(t, s.Put(ctx, "a", nil))
	must(t, s.Put(ctx, "z", nil))
	for i := 0; i < n; i += 100 {
		var ops []Op
		for j := i; j < i+100; j++ {
			ops = append(ops, Op{Kind: OpPut, Key: fmt.Sprintf("many/%05d", j), Value: fmt.Append(nil, j)})
		}
		must(t, s.Txn(ctx, nil, ops))
	}
	entries, err := s.List(ctx, "many/")
	must(t, err)
	if len(entries) != n {
		t.Fatalf("listed %d of %d", len(entries), n)
	}
	for i, e := range entries {
		if e.Key != fmt.Sprintf("many/%05d", i) || string(e.Value) != fmt.Sprint(i) || e.Revision == 0 {
			t.Fatalf("entry %d is %+v", i, e)
		}
	}
	if all := listKeys(t, s, ""); len(all) != n+2 {
		t.Fatalf("listed %d of all %d", len(all), n+2)
	}
	w := follow(t, s, "many/")
	if b := w.next(); !b.Listed || len(b.Events) != n {
		t.Fatalf("watch listed %d of %d", len(b.Events), n)
	}
}

func testWatch(t *testing.T, h *harness) {
	s, other := h.open(t), h.open(t)
	ctx := t.Context()
	empty := follow(t, s, "none/")
	if b := empty.next(); !b.Listed || len(b.Events) > 0 {
		t.Fatalf("first batch of an empty prefix: %+v", b)
	}
	must(t, s.Put(ctx, "p/b", []byte("1")))
	must(t, s.Put(ctx, "p/a", []byte("1")))
	must(t, s.Put(ctx, "q/a", []byte("1")))
	w := follow(t, s, "p/")
	w.want("listed: put p/a=1, put p/b=1")
	before := w.revision

	must(t, other.Put(ctx, "p/c", []byte("2")))
	w.want("put p/c=2")
	must(t, other.Put(ctx, "q/b", []byte("2")))
	must(t, other.Delete(ctx, "p/a"))
	w.want("delete p/a")
	must(t, other.Put(ctx, "p/c", []byte("2"))) // the same value, written again: a change of revision
	w.want("put p/c=2")
	must(t, other.Txn(ctx, nil, []Op{{Kind: OpPut, Key: "p/a", Value: []byte("3")}, {Kind: OpDelete, Key: "p/b"}}))
	w.want("put p/a=3, delete p/b")
	if w.revision <= before {
		t.Fatalf("revision went from %d to %d", before, w.revision)
	}
	for i := range 200 {
		must(t, other.Put(ctx, "p/n", fmt.Append(nil, i)))
	}
	w.wantOrdered("p/n", 200)
}

func testWatchEnds(t *testing.T, h *harness) {
	s := h.open(t)
	ctx, cancel := context.WithCancel(t.Context())
	unread := s.Watch(t.Context(), "")
	ch := s.Watch(ctx, "")
	<-ch
	cancel()
	if _, open := <-ch; open {
		t.Fatal("a batch after the context ended")
	}
	must(t, s.Close())
	for range unread {
	}
	if _, open := <-s.Watch(t.Context(), ""); open {
		t.Fatal("a closed store watches")
	}
	if err := s.Put(t.Context(), "a", nil); !errors.Is(err, ErrClosed) {
		t.Fatalf("put to a closed store: %v", err)
	}
	if status := s.Status(); status.Connected || status.LastError == "" {
		t.Fatalf("status of a closed store: %+v", status)
	}
	must(t, s.Close())
}

func testWatchCompacted(t *testing.T, h *harness) {
	s := h.open(t)
	ctx := t.Context()
	for _, key := range []string{"p/changed", "p/deleted", "p/same"} {
		must(t, s.Put(ctx, key, []byte("1")))
	}
	w := follow(t, s, "p/")
	w.want("listed: put p/changed=1, put p/deleted=1, put p/same=1")
	h.cut(t, func(s Store) {
		must(t, s.Put(ctx, "p/changed", []byte("2")))
		must(t, s.Delete(ctx, "p/deleted"))
		must(t, s.Put(ctx, "p/gone again", nil))
		must(t, s.Delete(ctx, "p/gone again"))
		must(t, s.Put(ctx, "p/new", []byte("2")))
	})
	w.want("listed: delete p/deleted, put p/changed=2, put p/new=2")
	must(t, s.Put(ctx, "p/after", []byte("3")))
	w.want("put p/after=3")
}

func testWatchWiped(t *testing.T, h *harness) {
	s := h.open(t)
	ctx := t.Context()
	for i := range 20 {
		must(t, s.Put(ctx, fmt.Sprintf("p/%02d", i), []byte("1")))
	}
	w := follow(t, s, "p/1")
	if b := w.next(); len(b.Events) != 10 {
		t.Fatalf("listed %+v", b)
	}
	h.wipe(t)
	w.wantGone(10)
	must(t, s.Put(ctx, "p/12", []byte("1")))
	w.want("put p/12=1")
}

func testLeaseExpiry(t *testing.T, h *harness) {
	s, other := h.open(t), h.open(t)
	ctx := t.Context()
	if lease := s.Status().Lease; lease != "" {
		t.Fatalf("lease %s before a leased write", lease)
	}
	must(t, s.Put(ctx, "leased/put", []byte("1"), Leased))
	must(t, s.Put(ctx, "leased/put", []byte("2"), Leased))
	must(t, s.Create(ctx, "leased/created", []byte("3"), Leased))
	must(t, s.Txn(ctx, nil, []Op{{Kind: OpPut, Key: "leased/txn", Value: []byte("4"), Leased: true}}))
	must(t, s.Put(ctx, "leased/deleted", nil, Leased))
	must(t, s.Delete(ctx, "leased/deleted"))
	must(t, s.Put(ctx, "kept", []byte("5"), Leased))
	must(t, s.Put(ctx, "kept", []byte("6")))
	lease := s.Status().Lease
	if lease == "" {
		t.Fatal("no lease after leased writes")
	}
	h.expire(t, func(Store) {})
	eventually(t, 10*time.Second, "leased keys are back", func() bool {
		entries, err := other.List(ctx, "leased/")
		return err == nil && len(entries) == 3
	})
	for key, want := range map[string]string{"leased/put": "2", "leased/created": "3", "leased/txn": "4", "kept": "6"} {
		if e := get(t, other, key); string(e.Value) != want {
			t.Errorf("%s is %q, want %q", key, e.Value, want)
		}
	}
	if now := s.Status().Lease; now == lease || now == "" {
		t.Errorf("lease was %q and is %q", lease, now)
	}
	must(t, s.Put(ctx, "leased/more", nil, Leased))
}

func testLeaseWiped(t *testing.T, h *harness) {
	s, other := h.open(t), h.open(t)
	ctx := t.Context()
	must(t, s.Put(ctx, "leased", []byte("1"), Leased))
	must(t, s.Put(ctx, "lost", []byte("1")))
	h.wipe(t)
	eventually(t, 10*time.Second, "the leased key is back", func() bool {
		_, err := other.Get(ctx, "leased")
		return err == nil
	})
	if keys := listKeys(t, other, ""); !slices.Equal(keys, []string{"leased"}) {
		t.Fatalf("keys %v", keys)
	}
}

func testClose(t *testing.T, h *harness) {
	s, other := h.open(t), h.open(t)
	ctx := t.Context()
	must(t, s.Put(ctx, "leased", nil, Leased))
	must(t, s.Put(ctx, "kept", nil))
	must(t, s.Close())
	if keys := listKeys(t, other, ""); !slices.Equal(keys, []string{"kept", "leased"}) {
		t.Fatalf("keys after close: %v", keys)
	}
	h.expire(t, func(Store) {})
	eventually(t, 20*time.Second, "keys of a closed store expire", func() bool {
		entries, err := other.List(ctx, "")
		return err == nil && len(entries) == 1
	})
}

func testClaimed(t *testing.T, h *harness) {
	s := h.open(t)
	ctx := t.Context()
	must(t, s.Create(ctx, "claimed", []byte("first"), Leased))
	must(t, s.Put(ctx, "owned", []byte("first"), Leased))
	lost := s.Status().Lease
	h.expire(t, func(direct Store) {
		must(t, direct.Create(ctx, "claimed", []byte("second")))
		must(t, direct.Create(ctx, "owned", []byte("second")))
	})
	eventually(t, 10*time.Second, "there is a new lease", func() bool { return s.Status().Lease != lost })
	must(t, s.Put(ctx, "done", nil, Leased)) // waits until the keys are written again
	if claimed, owned := get(t, s, "claimed"), get(t, s, "owned"); string(claimed.Value) != "second" || string(owned.Value) != "first" {
		t.Fatalf("claimed is of the %s writer, owned of the %s", claimed.Value, owned.Value)
	}
}

const holdTTL = 2 * time.Second

func testHold(t *testing.T, h *harness) {
	s, other := h.open(t), h.open(t)
	ctx := t.Context()
	held, err := s.Hold(ctx, "leader", []byte("first"), holdTTL)
	must(t, err)
	if e := get(t, other, "leader"); string(e.Value) != "first" || e.Revision != held.Revision {
		t.Fatalf("it is there as %+v, held at revision %d", e, held.Revision)
	}
	if _, err := other.Hold(ctx, "leader", []byte("second"), holdTTL); !errors.Is(err, ErrConflict) {
		t.Fatalf("a second holder: %v", err)
	}
	fenced := func() error {
		return s.Txn(ctx, []Condition{{Key: "leader", Revision: held.Revision}}, []Op{{Kind: OpPut, Key: "work", Value: []byte("done")}})
	}
	must(t, fenced())
	if _, err := s.Hold(ctx, "short", nil, time.Millisecond); err == nil {
		t.Fatal("a lease that nobody could keep alive")
	}
	h.expire(t, func(direct Store) {
		if _, err := direct.Get(ctx, "leader"); !errors.Is(err, ErrNotFound) {
			t.Errorf("after its lease it is there: %v", err)
		}
	})
	select {
	case <-held.Lost:
	case <-time.After(20 * time.Second):
		t.Fatal("its holder does not know that it is lost")
	}
	again, err := other.Hold(ctx, "leader", []byte("second"), holdTTL)
	must(t, err)
	if err := fenced(); !errors.Is(err, ErrConflict) {
		t.Fatalf("a write of who held it before: %v", err)
	}
	must(t, held.Release(ctx))
	if e := get(t, s, "leader"); e.Revision != again.Revision {
		t.Fatalf("who held it before has given up what is another's: %+v", e)
	}
}

func testRelease(t *testing.T, h *harness) {
	s, other := h.open(t), h.open(t)
	ctx := t.Context()
	held, err := s.Hold(ctx, "leader", nil, time.Hour)
	must(t, err)
	must(t, held.Release(ctx))
	<-held.Lost
	next, err := other.Hold(ctx, "leader", nil, time.Hour)
	must(t, err)
	must(t, other.Close())
	<-next.Lost
	if keys := listKeys(t, s, ""); !slices.Equal(keys, []string{"leader"}) {
		t.Fatalf("keys %v after its holder was closed, want it to go with its lease", keys)
	}
}

func testHoldWiped(t *testing.T, h *harness) {
	s := h.open(t)
	held, err := s.Hold(t.Context(), "leader", nil, 3*time.Second)
	must(t, err)
	h.wipe(t)
	select {
	case <-held.Lost:
	case <-time.After(40 * time.Second):
		t.Fatal("its holder does not know that it is lost")
	}
	if keys := listKeys(t, s, ""); len(keys) > 0 {
		t.Fatalf("keys %v: it was written again", keys)
	}
}

// watcher reads a Watch in a test.
type watcher struct {
	t        *testing.T
	ch       <-chan Batch
	revision int64
}

func follow(t *testing.T, s Store, prefix string) *watcher {
	return &watcher{t: t, ch: s.Watch(t.Context(), prefix)}
}

func (w *watcher) next() Batch {
	w.t.Helper()
	select {
	case b, open := <-w.ch:
		if !open {
			w.t.Fatal("watch ended")
		}
		if !b.Listed && b.Revision <= w.revision {
			w.t.Fatalf("batch at revision %d after %d", b.Revision, w.revision)
		}
		w.revision = b.Revision
		return b
	case <-time.After(15 * time.Second):
		w.t.Fatal("nothing from the watch within 15 s")
		panic("unreachable")
	}
}

// want takes the next batch and compares it, written as "listed: put KEY=VALUE, delete KEY".
func (w *watcher) want(want string) {
	w.t.Helper()
	if got := describe(w.next()); got != want {
		w.t.Fatalf("watch delivered\n  %s\nwant\n  %s", got, want)
	}
}

// wantNothing asserts that nothing is delivered for a while.
func (w *watcher) wantNothing(during time.Duration) {
	w.t.Helper()
	select {
	case b := <-w.ch:
		w.t.Fatalf("watch delivered %s", describe(b))
	case <-time.After(during):
	}
}

// wantOrdered takes n puts of key, with values that count up from 0.
func (w *watcher) wantOrdered(key string, n int) {
	w.t.Helper()
	for i := 0; i < n; {
		for _, ev := range w.next().Events {
			if ev.Key != key || string(ev.Value) != fmt.Sprint(i) {
				w.t.Fatalf("event %d is %s=%s", i, ev.Key, ev.Value)
			}
			i++
		}
	}
}

// wantGone takes the deletion of n keys, by a new listing.
func (w *watcher) wantGone(n int) {
	w.t.Helper()
	b := w.next()
	if !b.Listed || len(b.Events) != n || slices.ContainsFunc(b.Events, func(ev Event) bool { return ev.Kind != EventDelete }) {
		w.t.Fatalf("watch delivered %s, want %d deletions", describe(b), n)
	}
}

func describe(b Batch) string {
	var parts []string
	for _, ev := range b.Events {
		if ev.Kind == EventDelete {
			parts = append(parts, "delete "+ev.Key)
		} else {
			parts = append(parts, fmt.Sprintf("put %s=%s", ev.Key, ev.Value))
		}
	}
	text := strings.Join(parts, ", ")
	if b.Listed {
		return "listed: " + text
	}
	return text
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, s Store, key string) Entry {
	t.Helper()
	e, err := s.Get(t.Context(), key)
	must(t, err)
	return e
}

func listKeys(t *testing.T, s Store, prefix string) []string {
	t.Helper()
	entries, err := s.List(t.Context(), prefix)
	must(t, err)
	var keys []string
	for _, e := range entries {
		keys = append(keys, e.Key)
	}
	return keys
}
