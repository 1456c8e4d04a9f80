// Package kvstore is the only place that talks to a cluster's store. It defines
// the Store interface that the rest of Causeway uses, implements it on an etcd
// client (etcd.go) and in memory for tests that need faults (memory.go), holds
// the embedded etcd server behind "clustermesh kvstore" (server.go), and
// administers who may do what there (access.go).
//
// Both implementations pass the same contract test (contract_test.go).
package kvstore

import (
	"context"
	"errors"
	"time"
)

// Prefix starts every key of Causeway; docs/formats.md lists what follows it.
const Prefix = "causeway/v1/"

// PrivatePrefix starts the keys that are for the cluster's own agents alone, while Prefix is what its peers may read.
const PrivatePrefix = "causeway/private/v1/"

// Errors returned by every Store; test with errors.Is.
var (
	// ErrNotFound says that the key does not exist.
	ErrNotFound = errors.New("key not found")
	// ErrConflict says that a condition of a write did not hold: the key
	// exists already (Create), or has changed since (CompareAndSwap), or a
	// condition of a Txn failed. Nothing was written.
	ErrConflict = errors.New("key conflicts with what is stored")
	// ErrUnavailable says that the store could not be reached in time. The
	// write may or may not have happened.
	ErrUnavailable = errors.New("store unavailable")
	// ErrDenied says that the store does not let us do that: we have no user there, or it lacks the right.
	ErrDenied = errors.New("the store denies it")
	// ErrClosed says that the Store was closed.
	ErrClosed = errors.New("store closed")
)

// Entry is a key with its value as of Revision.
type Entry struct {
	Key   string
	Value []byte
	// Revision is the store's revision at which the key was last written;
	// it grows with every write to the store. It starts over in a store that
	// was wiped or restored from a copy.
	Revision int64
}

// EventKind tells what happened to a key.
type EventKind uint8

const (
	// EventPut says that the key was created or changed.
	EventPut EventKind = iota + 1
	// EventDelete says that the key is gone; the Entry has no Value, and its
	// Revision is that of the deletion or of the listing that missed the key.
	EventDelete
)

// Event is one change seen by a watch.
type Event struct {
	Kind EventKind
	Entry
}

// Batch is what a watch delivers at once: the changes of one store revision
// (or several), or the difference that a new listing made.
type Batch struct {
	Events []Event
	// Listed is true for a batch that ends a complete listing: the first one
	// of every watch (even if it is empty), and again after each reconnect
	// or compaction that forced listing anew. Every key that existed at that time has
	// been delivered by then, and every key that vanished meanwhile is in
	// the batch as EventDelete, before the puts. A connection that was lost
	// and found again forces no listing if the store still has the history. What is over Config.Quota is left out; when there
	// is room again a listing brings it, if there is anything.
	Listed bool
	// Revision of the store that this batch brings the watcher to.
	Revision int64
}

// PutOption changes how a key is written.
type PutOption uint8

const (
	// Leased hangs the key on this Store's session lease: the key vanishes
	// a lease TTL after the process does. If the lease was lost (the store was
	// away for longer, or was wiped), the Store takes a new one and writes all its leased
	// keys again: those that this Store has written last, as leased, and not deleted since. Keys
	// written with a condition on themselves (Create, CompareAndSwap, Txn) are
	// left alone if somebody else has them by then. Writes of one key must
	// not run at the same time, or it is open which one is remembered.
	Leased PutOption = iota + 1
)

// Condition is one comparison of a Txn.
type Condition struct {
	// Key, or with Prefix true, all keys starting with Key.
	Key    string
	Prefix bool
	// Revision that the key must have; 0 means that it must not exist. With
	// Prefix it must be 0: no key with the prefix exists.
	Revision int64
}

// OpKind is what an Op does.
type OpKind uint8

const (
	OpPut OpKind = iota + 1
	OpDelete
)

// Op is one write of a Txn.
type Op struct {
	Kind   OpKind
	Key    string
	Value  []byte
	Leased bool
}

// Store is a cluster's store. All methods are safe for concurrent use, honour
// their context, and return ErrUnavailable (wrapped, with the endpoint and the cause) when
// the store does not answer before the context's deadline or the Store's request
// timeout, whichever comes first.
type Store interface {
	// Get returns the entry of key, or ErrNotFound.
	Get(ctx context.Context, key string) (Entry, error)
	// List returns all entries under prefix, ordered by key.
	List(ctx context.Context, prefix string) ([]Entry, error)
	// Put writes key unconditionally.
	Put(ctx context.Context, key string, value []byte, opts ...PutOption) error
	// Create writes key if it does not exist, otherwise returns ErrConflict.
	Create(ctx context.Context, key string, value []byte, opts ...PutOption) error
	// CompareAndSwap writes key if it is still at revision, otherwise returns ErrConflict.
	CompareAndSwap(ctx context.Context, key string, revision int64, value []byte, opts ...PutOption) error
	// Delete removes key; a key that does not exist is no error.
	Delete(ctx context.Context, key string) error
	// Txn does all ops at once if all conditions hold, otherwise returns ErrConflict. There may
	// be at most 128 of each, and no two ops on one key.
	Txn(ctx context.Context, conds []Condition, ops []Op) error
	// Hold creates key, if it does not exist, on a lease of its own: it vanishes a ttl after this process does, or loses the store, and is then not
	// written again. Otherwise it returns ErrConflict. It is for keys that say who does something on behalf of all.
	Hold(ctx context.Context, key string, value []byte, ttl time.Duration) (*Held, error)
	// Watch delivers everything under prefix and then its changes, in
	// order and without gaps, until ctx ends or the Store is closed, whereupon the
	// channel is closed. It survives disconnection, compaction and a restarted
	// or restored server, if need be by listing again and delivering the difference:
	// an unchanged key is not delivered twice. In a restored server unchanged means the same value;
	// the revision may differ from the one delivered, so after ErrConflict Get the key anew.
	// The channel is unbuffered; a slow reader slows only itself.
	Watch(ctx context.Context, prefix string) <-chan Batch
	// Status says how the connection is.
	Status() Status
	// Close ends watches and revokes nothing: leased keys stay until their
	// lease runs out, so that a restarting agent finds its keys in place.
	Close() error
}

// Held is a key that Store.Hold has created.
type Held struct {
	// Revision that the key was created at. Whatever is written on the condition that the key still has it is written by who holds it, however long the
	// writer was stopped before.
	Revision int64
	// Lost is closed when the key is known, or has to be taken, to be held no more: its lease is gone, or could not be renewed for its whole time. That
	// somebody deletes or overwrites the key does not show here.
	Lost <-chan struct{}

	release func(context.Context) error
}

// Release gives the key up: it is gone when Release returns without an error, and soon otherwise.
func (h *Held) Release(ctx context.Context) error { return h.release(ctx) }

// Status of a Store's connection, as of now.
type Status struct {
	// Connected is true from the last time that the store answered until it is found not to. A
	// broken connection is found at once, a silent one within about 4 s, without any request being made.
	Connected bool `json:"connected"`
	// Endpoints that the store was configured with.
	Endpoints []string `json:"endpoints"`
	// LastContact is when the store last answered.
	LastContact time.Time `json:"lastContact,omitzero"`
	// LastError is the newest failure, with the endpoint and the cause; empty while connected, unless a watch is denied what others may read.
	LastError string `json:"lastError,omitempty"`
	// Revision is the newest revision seen.
	Revision int64 `json:"revision"`
	// Denied is true while LastError is that the store knows no user of ours, or does not let it read.
	Denied bool `json:"denied,omitempty"`
	// Excess counts the keys that the watches leave out now since they are more than the quota.
	Excess int `json:"excess,omitempty"`
	// Lease is the session lease's ID in hex, empty without one.
	Lease string `json:"lease,omitempty"`
	// Reconnects counts how often contact was lost and found again.
	Reconnects int `json:"reconnects"`
}
