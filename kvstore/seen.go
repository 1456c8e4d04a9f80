package kvstore

import (
	"hash/maphash"
	"slices"
	"strings"
)

// seen is what one watch has delivered of its prefix. It turns events and listings into what is
// really new to the reader, and leaves out what is over the quota: the first ones to come in stay in, and of the others nothing is kept but how many there are. Values
// are kept as 64-bit hashes: enough to tell a change, at a fixed size a key.
type seen struct {
	seed  maphash.Seed
	quota Quota
	keys  map[string]version
	bytes int64 // of the keys and values that were delivered
	// excess counts the keys that are left out.
	excess int
	// freed is true if there may be room for some of them since the last listing.
	freed bool
}

type version struct {
	revision int64
	hash     uint64
	size     int // of key and value, in bytes
}

func newSeen(quota Quota) *seen {
	return &seen{seed: maphash.MakeSeed(), quota: quota, keys: make(map[string]version)}
}

func (s *seen) version(e Entry) version {
	return version{revision: e.Revision, hash: maphash.Bytes(s.seed, e.Value), size: len(e.Key) + len(e.Value)}
}

// holds tells whether so much is within the quota.
func (q Quota) holds(entries int, bytes int64) bool {
	return (q.Entries <= 0 || entries <= q.Entries) && (q.Bytes <= 0 || bytes <= q.Bytes)
}

// apply takes an event of a watch and tells what the reader needs to hear of it: nothing of one
// that was delivered already, as may happen when a watch is resumed, or that is over the quota; and that a key is gone whose new value
// is too large for the quota. Created tells of a put whether the key is new.
func (s *seen) apply(ev Event, created bool) (Event, bool) {
	old, known := s.keys[ev.Key]
	if known && ev.Revision <= old.revision {
		return Event{}, false
	}
	if ev.Kind == EventDelete {
		if !known {
			s.excess = max(0, s.excess-1)
			return Event{}, false
		}
		s.drop(ev.Key)
		return ev, true
	}
	now := s.version(ev.Entry)
	entries := len(s.keys)
	if !known {
		entries++
	}
	if s.quota.holds(entries, s.bytes-int64(old.size)+int64(now.size)) {
		s.freed = s.freed || now.size < old.size
		s.bytes += int64(now.size - old.size)
		s.keys[ev.Key] = now
		if !known && !created {
			s.excess = max(0, s.excess-1)
		}
		return ev, true
	}
	if known || created {
		s.excess++
	}
	if !known {
		return Event{}, false
	}
	s.drop(ev.Key)
	return Event{Kind: EventDelete, Entry: Entry{Key: ev.Key, Revision: ev.Revision}}, true
}

func (s *seen) drop(key string) {
	s.bytes -= int64(s.keys[key].size)
	delete(s.keys, key)
	s.freed = true
}

// wantsListing tells whether keys that are left out may have room now, which only a listing can tell.
func (s *seen) wantsListing() bool { return s.excess > 0 && s.freed }

// listing compares a listing of the store, which comes page by page, with what was delivered. Keys that were delivered keep
// their place in the quota as long as they are there; in another store nothing does.
type listing struct {
	seen      *seen
	sameStore bool
	now       map[string]version
	puts      []Event
	confirmed int // keys of seen that are still there
	// entries and bytes of the quota are taken: by what is in now, and by what is in seen and may still come.
	entries int
	bytes   int64
	full    bool // a key had no room, so no new one after it gets any
	excess  int
}

// list begins a listing. If the store is the same as before, a key has changed when its revision has. If it is another
// one (wiped, restored), revisions mean nothing and the values are compared.
func (s *seen) list(sameStore bool) *listing {
	l := &listing{seen: s, sameStore: sameStore, now: make(map[string]version)}
	if sameStore {
		l.entries, l.bytes = len(s.keys), s.bytes
	}
	return l
}

// add takes the next entry, in the order of keys.
func (l *listing) add(e Entry) {
	v := l.seen.version(e)
	old, known := l.seen.keys[e.Key]
	if known {
		l.confirmed++
	}
	kept := known && l.sameStore
	if kept {
		l.entries--
		l.bytes -= int64(old.size)
	}
	if l.full && !kept || !l.seen.quota.holds(l.entries+1, l.bytes+int64(v.size)) {
		l.full = l.full || !kept
		l.excess++
		return
	}
	l.entries++
	l.bytes += int64(v.size)
	l.now[e.Key] = v
	if !known || old.hash != v.hash || l.sameStore && old.revision != v.revision {
		l.puts = append(l.puts, Event{Kind: EventPut, Entry: e})
	}
}

// enough tells whether all further entries would only be counted.
func (l *listing) enough() bool { return l.full && l.confirmed == len(l.seen.keys) }

// finish ends a complete listing, made at revision, of which the last rest entries were not added. It returns the difference to what was
// delivered: first what vanished, then what is new or changed, each ordered by key.
func (l *listing) finish(revision int64, rest int) []Event {
	s := l.seen
	var deletes []Event
	for key := range s.keys {
		if _, still := l.now[key]; !still {
			deletes = append(deletes, Event{Kind: EventDelete, Entry: Entry{Key: key, Revision: revision}})
		}
	}
	byKey := func(a, b Event) int { return strings.Compare(a.Key, b.Key) }
	slices.SortFunc(deletes, byKey)
	slices.SortFunc(l.puts, byKey)
	// What has vanished kept its place until now.
	s.freed = l.sameStore && len(deletes) > 0
	s.keys, s.excess, s.bytes = l.now, l.excess+rest, 0
	for _, v := range s.keys {
		s.bytes += int64(v.size)
	}
	return append(deletes, l.puts...)
}

// replace takes a complete listing at once.
func (s *seen) replace(entries []Entry, revision int64, sameStore bool) []Event {
	l := s.list(sameStore)
	for _, e := range entries {
		l.add(e)
	}
	return l.finish(revision, 0)
}
