package kvstore

import (
	"testing"
)

func TestSeen(t *testing.T) {
	entry := func(key, value string, rev int64) Entry { return Entry{Key: key, Value: []byte(value), Revision: rev} }
	before := []Entry{entry("a", "1", 5), entry("b", "1", 6), entry("c", "1", 7)}
	for name, c := range map[string]struct {
		now       []Entry
		sameStore bool
		want      string
	}{
		"nothing changed":             {before, true, ""},
		"one gone, one new":           {[]Entry{entry("a", "1", 5), entry("c", "1", 7), entry("d", "2", 9)}, true, "delete b, put d=2"},
		"written with the same value": {[]Entry{entry("a", "1", 9), entry("b", "1", 6), entry("c", "1", 7)}, true, "put a=1"},
		"another store, same values":  {[]Entry{entry("a", "1", 2), entry("b", "1", 3), entry("c", "1", 4)}, false, ""},
		"another store, older value":  {[]Entry{entry("a", "0", 2), entry("b", "1", 3)}, false, "delete c, put a=0"},
		"same revision, other value":  {[]Entry{entry("a", "x", 5), entry("b", "1", 6), entry("c", "1", 7)}, false, "put a=x"},
		"empty":                       {nil, true, "delete a, delete b, delete c"},
	} {
		s := newSeen(Quota{})
		s.replace(before, 8, true)
		if got := describe(Batch{Events: s.replace(c.now, 10, c.sameStore)}); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		if again := s.replace(c.now, 10, true); len(again) > 0 {
			t.Errorf("%s: the same listing again yields %v", name, again)
		}
	}
}

func TestSeenDropsRepeatedEvents(t *testing.T) {
	s := newSeen(Quota{})
	put := Event{Kind: EventPut, Entry: Entry{Key: "a", Revision: 5}}
	del := Event{Kind: EventDelete, Entry: Entry{Key: "a", Revision: 6}}
	for i, c := range []struct {
		ev   Event
		want bool
	}{{put, true}, {put, false}, {del, true}, {del, false}, {Event{Kind: EventDelete, Entry: Entry{Key: "never", Revision: 7}}, false}} {
		if _, got := s.apply(c.ev, true); got != c.want {
			t.Errorf("event %d: needed %t, want %t", i, got, c.want)
		}
	}
}
