package clustermesh

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/statedb"

	"causeway/kvstore"
)

// maxWaiting bounds the values kept of entries that were not accepted, in bytes for each channel,
// so that a peer cannot fill an agent's memory with entries that nobody will ever accept.
const maxWaiting = 16 << 20

// waitPatience is how long an entry may wait in silence: entries that are written together may arrive in any
// order. One that waits for longer is shown among the refusals.
const waitPatience = 2 * time.Second

// errWaits says that an entry cannot be judged yet: what it depends on has not been seen.
var errWaits = errors.New("waits for an entry that has not come")

// waitingEntry is an entry that was not accepted.
type waitingEntry struct {
	value []byte
	// reason to show if it is early and still waits after a while; nil once it is shown.
	reason error
	since  time.Time
}

// wait keeps an entry that was not accepted, to be judged again.
func (f *Follower) wait(key string, value []byte, reason error) {
	if f.waitingBytes+len(key)+len(value) > maxWaiting {
		f.Refusals.Add(f.Cluster, key, fmt.Errorf("more than %d MiB of entries of this channel are refused or wait; this one is judged again when it changes", maxWaiting>>20))
		return
	}
	f.waiting[key] = waitingEntry{value: value, reason: reason, since: time.Now()}
	f.waitingBytes += len(key) + len(value)
}

// showWaiting says of entries that have waited for long what they wait for.
func (f *Follower) showWaiting(now time.Time) {
	for key, w := range f.waiting {
		if w.reason == nil || now.Sub(w.since) < waitPatience {
			continue
		}
		f.Refusals.Add(f.Cluster, key, w.reason)
		w.reason = nil
		f.waiting[key] = w
	}
}

func (f *Follower) forgetWaiting(key string) {
	if w, ok := f.waiting[key]; ok {
		f.waitingBytes -= len(key) + len(w.value)
		delete(f.waiting, key)
	}
}

// judgeAgain looks once more at what was not accepted, if something that it may depend on has changed. What that
// changes in turn is seen by the next tick.
func (f *Follower) judgeAgain(txn statedb.WriteTxn) {
	if !f.changed {
		return
	}
	f.changed = false
	events := make([]kvstore.Event, 0, len(f.waiting))
	for key, w := range f.waiting {
		events = append(events, kvstore.Event{Kind: kvstore.EventPut, Entry: kvstore.Entry{Key: key, Value: w.value}})
	}
	for _, c := range newest(events) {
		f.put(txn, c.Key, c.Value)
	}
}

// judgeForOthers judges again what stood against nodes or ranges of other clusters, if those have changed.
func (f *Follower) judgeForOthers() {
	seen := others{nodes: f.Tables.Nodes.Revision(f.Tables.DB.ReadTxn()), claims: f.Claims.Changes()}
	if seen == f.others && !f.changed {
		return
	}
	f.others, f.changed = seen, true
	if len(f.waiting) == 0 {
		f.changed = false
		return
	}
	txn := f.write()
	defer txn.Abort()
	f.judgeAgain(txn)
	txn.Commit()
	f.report(kvstore.Batch{})
}

// others is how far what the channels of all clusters share had come.
type others struct {
	nodes  statedb.Revision
	claims int
}
