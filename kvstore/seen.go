package kvstore

import (
	"hash/maphash"
	"slices"
	"strings"
)

// seen is what one watch has delivered of its prefix. It turns events and listings into what is
// really new to the reader. Values are kept as 64-bit hashes: enough to tell a change, at a fixed size a key.
type seen struct {
	seed maphash.Seed
	keys map[string]version
}

type version struct {
	revision int64
	hash     uint64
}

func newSeen() *seen {
	return &seen{seed: maphash.MakeSeed(), keys: make(map[string]version)}
}

func (s *seen) version(e Entry) version {
	return version{revision: e.Revision, hash: maphash.Bytes(s.seed, e.Value)}
}

// apply takes an event of a watch and tells whether the reader needs it: one
// that was delivered already, as may happen when a watch is resumed, is not needed.
func (s *seen) apply(ev Event) bool {
	old, known := s.keys[ev.Key]
	if known && ev.Revision <= old.revision {
		return false
	}
	if ev.Kind == EventDelete {
		delete(s.keys, ev.Key)
		return known
	}
	s.keys[ev.Key] = s.version(ev.Entry)
	return true
}

// replace takes a complete listing, made at revision, and returns the difference to what was
// delivered: first what vanished, then what is new or changed, each ordered by key. If the store is
// the same as before, a key has changed when its revision has. If it is another one (wiped,
// restored), revisions mean nothing and the values are compared.
func (s *seen) replace(entries []Entry, revision int64, sameStore bool) []Event {
	var puts []Event
	now := make(map[string]version, len(entries))
	for _, e := range entries {
		v := s.version(e)
		old, known := s.keys[e.Key]
		if !known || old.hash != v.hash || sameStore && old.revision != v.revision {
			puts = append(puts, Event{Kind: EventPut, Entry: e})
		}
		now[e.Key] = v
	}
	var deletes []Event
	for key := range s.keys {
		if _, still := now[key]; !still {
			deletes = append(deletes, Event{Kind: EventDelete, Entry: Entry{Key: key, Revision: revision}})
		}
	}
	byKey := func(a, b Event) int { return strings.Compare(a.Key, b.Key) }
	slices.SortFunc(deletes, byKey)
	slices.SortFunc(puts, byKey)
	s.keys = now
	return append(deletes, puts...)
}
