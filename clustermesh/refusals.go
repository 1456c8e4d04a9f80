package clustermesh

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxRefusals bounds how many refused keys are remembered of each channel; more are only counted,
// so that a peer cannot fill an agent's memory.
const maxRefusals = 1000

// maxRefusalText bounds the key and the reason that are kept of a refusal, in bytes each; the longest key of ours has
// less than 300.
const maxRefusalText = 600

// Refusal is an entry that was refused, and why.
type Refusal struct {
	Cluster string // the channel that brought it
	Key     string
	Reason  string
	Count   int // how many different refusals of the key there were in a row
	Last    time.Time
}

// Refusals is what was refused and still stands in some store. Safe for concurrent use.
type Refusals struct {
	mu    sync.Mutex
	byKey map[string]map[string]Refusal
	total map[string]int
}

// NewRefusals returns an empty record.
func NewRefusals() *Refusals {
	return &Refusals{byKey: map[string]map[string]Refusal{}, total: map[string]int{}}
}

// Add records that the channel's key was refused. It tells whether that is news: the same refusal again, when
// something else has changed, is not.
func (r *Refusals) Add(cluster, key string, reason error) bool {
	key, text := shorten(key), shorten(reason.Error())
	r.mu.Lock()
	defer r.mu.Unlock()
	keys := r.byKey[cluster]
	if keys == nil {
		keys = map[string]Refusal{}
		r.byKey[cluster] = keys
	}
	old, known := keys[key]
	if known && old.Reason == text {
		old.Last = time.Now()
		keys[key] = old
		return false
	}
	r.total[cluster]++
	if !known && len(keys) >= maxRefusals {
		return true
	}
	keys[key] = Refusal{Cluster: cluster, Key: key, Reason: text, Count: old.Count + 1, Last: time.Now()}
	return true
}

// Clear forgets a key that is acceptable now, or gone.
func (r *Refusals) Clear(cluster, key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byKey[cluster], shorten(key))
}

// Forget forgets all of a channel that is followed no more.
func (r *Refusals) Forget(cluster string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byKey, cluster)
	delete(r.total, cluster)
}

func shorten(s string) string {
	if len(s) <= maxRefusalText {
		return s
	}
	return strings.ToValidUTF8(s[:maxRefusalText], "") + "…"
}

// Total counts the refusals of a channel since the start.
func (r *Refusals) Total(cluster string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.total[cluster]
}

// List returns what stands refused, ordered by channel and key.
func (r *Refusals) List() []Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Refusal
	for _, keys := range r.byKey {
		for _, refusal := range keys {
			out = append(out, refusal)
		}
	}
	slices.SortFunc(out, func(a, b Refusal) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Key, b.Key))
	})
	return out
}
