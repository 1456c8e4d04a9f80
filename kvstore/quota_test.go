package kvstore

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"
)

// testQuota fills a store beyond what a watch may hold.
func testQuota(t *testing.T, h *harness) {
	s := h.open(t)
	limited := h.limited(t, Quota{Entries: 3})
	ctx := t.Context()
	for i := range 5 {
		must(t, s.Put(ctx, fmt.Sprintf("p/%d", i), []byte("x")))
	}
	w := follow(t, limited, "p/")
	w.want("listed: put p/0=x, put p/1=x, put p/2=x")
	wantExcess(t, limited, 2)
	must(t, s.Put(ctx, "p/4", []byte("y")))
	must(t, s.Put(ctx, "p/5", []byte("y")))
	must(t, s.Put(ctx, "p/1", []byte("y")))
	w.want("put p/1=y") // what is in stays in, and changes
	wantExcess(t, limited, 3)
	must(t, s.Delete(ctx, "p/5"))
	must(t, s.Delete(ctx, "p/0"))
	w.want("delete p/0")
	w.want("listed: put p/3=x") // there is room for one
	wantExcess(t, limited, 1)
	must(t, s.Delete(ctx, "p/1"))
	must(t, s.Delete(ctx, "p/4"))
	w.want("delete p/1")
	must(t, s.Put(ctx, "p/6", []byte("z")))
	w.want("put p/6=z")
	wantExcess(t, limited, 0)
	// A watch of the same store without a quota is not concerned.
	follow(t, s, "p/").want("listed: put p/2=x, put p/3=x, put p/6=z")
}

func wantExcess(t *testing.T, s Store, want int) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("%d keys are left out", want), func() bool { return s.Status().Excess == want })
}

// testQuotaBytes has values grow and shrink.
func testQuotaBytes(t *testing.T, h *harness) {
	s := h.open(t)
	limited := h.limited(t, Quota{Bytes: 30})
	ctx := t.Context()
	value := func(n int) []byte { return bytes.Repeat([]byte("x"), n) }
	must(t, s.Put(ctx, "p/a", value(7)))
	must(t, s.Put(ctx, "p/b", value(7)))
	w := follow(t, limited, "p/")
	w.want("listed: put p/a=xxxxxxx, put p/b=xxxxxxx")
	must(t, s.Put(ctx, "p/c", value(8))) // 31 bytes
	must(t, s.Put(ctx, "p/b", value(1)))
	w.want("put p/b=x")
	w.want("listed: put p/c=xxxxxxxx")
	wantExcess(t, limited, 0)
	must(t, s.Put(ctx, "p/a", value(13)))
	w.want("delete p/a") // it no longer has room
	wantExcess(t, limited, 1)
	must(t, s.Put(ctx, "p/a", value(2)))
	w.want("put p/a=xx")
	wantExcess(t, limited, 0)
}

// testQuotaCompacted changes much behind the back of a full watch.
func testQuotaCompacted(t *testing.T, h *harness) {
	s := h.open(t)
	limited := h.limited(t, Quota{Entries: 2})
	ctx := t.Context()
	for _, key := range []string{"p/a", "p/b", "p/c"} {
		must(t, s.Put(ctx, key, []byte("x")))
	}
	w := follow(t, limited, "p/")
	w.want("listed: put p/a=x, put p/b=x")
	h.cut(t, func(s Store) {
		must(t, s.Delete(ctx, "p/b"))
		must(t, s.Put(ctx, "p/0", []byte("x")))
		must(t, s.Put(ctx, "p/d", []byte("x")))
	})
	// The one that is still there keeps its place; who takes the other's is found by the next listing.
	state := map[string]string{"p/a": "x", "p/b": "x"}
	for len(state) != 2 || state["p/0"] == "" || state["p/a"] == "" {
		for _, ev := range w.next().Events {
			applyTo(state, ev)
		}
		if len(state) > 2 {
			t.Fatalf("the watch holds %v", state)
		}
	}
	wantExcess(t, limited, 2)
}

// TestQuotaOfALargeStore is about what it costs to look at a store that has far more than we take.
func TestQuotaOfALargeStore(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	s := p.dial(t, nil)
	ctx := t.Context()
	const n, per = 6000, 100
	for i := 0; i < n; i += per {
		var ops []Op
		for j := range per {
			ops = append(ops, putOp(fmt.Sprintf("p/%05d", i+j), []byte("x"), nil))
		}
		must(t, s.Txn(ctx, nil, ops))
	}
	limited := p.dial(t, func(c *Config) { c.Quota = Quota{Entries: 1500} })
	w := follow(t, limited, "p/")
	if b := w.next(); len(b.Events) != 1500 || !b.Listed {
		t.Fatalf("%d events", len(b.Events))
	}
	wantExcess(t, limited, n-1500)
}

// TestLargeValuesAreListedInSmallPages has values of which not all fit into one answer. It runs alone: it moves 200 MB, and no request may take longer than its timeout.
func TestLargeValuesAreListedInSmallPages(t *testing.T) {
	p := startProcess(t)
	s := p.dial(t, nil)
	ctx := t.Context()
	const n = 40
	value := bytes.Repeat([]byte("x"), 1<<20)
	for i := range n {
		must(t, s.Put(ctx, fmt.Sprintf("p/%02d", i), value))
	}
	if got := listKeys(t, s, "p/"); len(got) != n || got[0] != "p/00" || got[n-1] != "p/39" {
		t.Fatalf("listed %v", got)
	}
	limited := p.dial(t, func(c *Config) { c.Quota = Quota{Bytes: 10 << 20} })
	if b := follow(t, limited, "p/").next(); len(b.Events) != 9 {
		t.Errorf("%d events", len(b.Events))
	}
	wantExcess(t, limited, n-9)

	// A watch that has missed more than fits into one message catches up.
	link := startLink(t, p.config.ListenClient)
	behind := p.dial(t, func(c *Config) { c.Endpoints = []string{link.address} })
	w := follow(t, behind, "p/")
	if b := w.next(); len(b.Events) != n {
		t.Fatalf("%d events", len(b.Events))
	}
	link.cut()
	for i := range n {
		must(t, s.Put(ctx, fmt.Sprintf("p/%02d", i), value[1:]))
	}
	link.heal()
	for missing := n; missing > 0; {
		b := w.next()
		for _, ev := range b.Events {
			if len(ev.Value) != len(value)-1 {
				t.Fatalf("%s has %d bytes", ev.Key, len(ev.Value))
			}
		}
		missing -= len(b.Events)
	}
}

// TestSlowReaderHoldsBackTheServer: what a watch's reader does not take stays with the server.
func TestSlowReaderHoldsBackTheServer(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	s := p.dial(t, nil)
	slow := p.dial(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := slow.Watch(ctx, "p/")
	<-out
	value := bytes.Repeat([]byte("x"), 1<<20)
	for i := range 20 {
		must(t, s.Put(t.Context(), "p/a", append(value, byte(i))))
	}
	for last := byte(0); last != 19; {
		b, open := <-out
		if !open {
			t.Fatal("the watch has ended")
		}
		for _, ev := range b.Events {
			last = ev.Value[len(value)]
		}
	}
}
