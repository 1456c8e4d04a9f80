package clustermesh

import (
	"errors"
	"fmt"

	"github.com/cilium/statedb"

	"causeway/kvstore"
)

// maxWaiting bounds the values kept of entries that were not accepted, in bytes for each channel,
// so that a peer cannot fill an agent's memory with entries that nobody will ever accept.
const maxWaiting = 16 << 20

// errWaits says that an entry cannot be judged yet: what it depends on has not been seen.
var errWaits = errors.New("waits")

// wait keeps an entry that was not accepted, to be judged again.
func (f *Follower) wait(key string, value []byte) {
	if f.waitingBytes+len(key)+len(value) > maxWaiting {
		f.Refusals.Add(f.Cluster, key, fmt.Errorf("more than %d MiB of entries of this channel are refused or wait; this one is judged again when it changes", maxWaiting>>20))
		return
	}
	f.waiting[key] = value
	f.waitingBytes += len(key) + len(value)
}

func (f *Follower) forgetWaiting(key string) {
	if value, ok := f.waiting[key]; ok {
		f.waitingBytes -= len(key) + len(value)
		delete(f.waiting, key)
	}
}

// judgeAgain looks once more at what was not accepted, if something that it may depend on has changed.
func (f *Follower) judgeAgain(txn statedb.WriteTxn) {
	if !f.changed {
		return
	}
	f.changed = false
	events := make([]kvstore.Event, 0, len(f.waiting))
	for key, value := range f.waiting {
		events = append(events, kvstore.Event{Kind: kvstore.EventPut, Entry: kvstore.Entry{Key: key, Value: value}})
	}
	for _, ev := range newest(events) {
		f.put(txn, ev.Key, ev.Value)
	}
	f.changed = false
}
