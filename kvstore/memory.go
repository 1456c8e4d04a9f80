package kvstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Memory is a Store in memory, for tests: it passes the same contract test as etcd's and can be told to fail.
// Several clients of one store, as of several agents, come from Client. Unlike etcd's it never waits:
// a disconnected client fails at once.
type Memory struct {
	store  *memoryStore
	ctx    context.Context
	cancel context.CancelFunc

	// Guarded by store.mu, as everything below.
	closed       bool
	wg           sync.WaitGroup
	fault        error
	disconnected bool
	lastContact  time.Time
	reconnects   int
	generation   int // of the store, as this client last knew it
	lease        int64
	holds        map[int64]chan struct{} // what this client holds, by its lease
	owned        map[string]ownedKey
	quota        Quota
	excess       map[*memoryWatch]int // keys that watches leave out
}

var _ Store = (*Memory)(nil)

// NewMemory returns a client of a new, empty store.
func NewMemory() *Memory {
	s := &memoryStore{keys: make(map[string]memoryKey), leases: make(map[int64]bool), changed: make(chan struct{}), revision: 1}
	return s.client()
}

// Client returns another client of the same store, with a lease of its own.
func (m *Memory) Client() *Memory {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	return m.store.client()
}

// SetQuota bounds what the watches of this client hold that begin from now on, like Config.Quota.
func (m *Memory) SetQuota(q Quota) {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	m.quota = q
}

// Fail makes every request of this client fail with err, until Fail(nil). Watches go on. With ErrDenied, Status says that too.
func (m *Memory) Fail(err error) {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	m.fault = err
}

// Disconnect cuts this client off: requests fail with ErrUnavailable, watches stand still.
func (m *Memory) Disconnect() {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	m.disconnected = true
}

// Reconnect ends Disconnect. Watches deliver what they have missed; if the lease was lost meanwhile,
// the client takes a new one and writes its leased keys again.
func (m *Memory) Reconnect() {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	if !m.disconnected {
		return
	}
	m.disconnected = false
	m.reconnects++
	m.lastContact = time.Now()
	m.recover()
	m.store.announce()
}

// ExpireLeases makes the store drop all leases with their keys, as after an outage longer than their
// TTL. Clients that are connected write their keys again, in revisions after that.
func (m *Memory) ExpireLeases() {
	s := m.store
	s.mu.Lock()
	defer s.mu.Unlock()
	revision := s.revision + 1
	for _, key := range slices.Sorted(maps.Keys(s.keys)) {
		if s.keys[key].lease != 0 {
			s.delete(key, revision)
		}
	}
	s.leases = make(map[int64]bool)
	s.recoverClients()
}

// Compact drops the history: a watch that stands still, for Disconnect, has to list anew.
func (m *Memory) Compact() {
	s := m.store
	s.mu.Lock()
	defer s.mu.Unlock()
	s.history, s.compacted = nil, s.revision
}

// Wipe replaces the store by an empty one whose revisions start again, as when the
// server's data was lost. Connected clients write their leased keys again.
func (m *Memory) Wipe() {
	s := m.store
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys, s.leases = make(map[string]memoryKey), make(map[int64]bool)
	s.history, s.compacted, s.revision = nil, 0, 1
	s.generation++
	s.recoverClients()
}

// Get implements Store.
func (m *Memory) Get(ctx context.Context, key string) (Entry, error) {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	if err := m.usable(ctx); err != nil {
		return Entry{}, m.requestError("get", key, err)
	}
	k, ok := m.store.keys[key]
	if !ok {
		return Entry{}, m.requestError("get", key, ErrNotFound)
	}
	return k.entry(key), nil
}

// List implements Store.
func (m *Memory) List(ctx context.Context, prefix string) ([]Entry, error) {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	if err := m.usable(ctx); err != nil {
		return nil, m.requestError("list", prefix, err)
	}
	return m.store.list(prefix), nil
}

// Put implements Store.
func (m *Memory) Put(ctx context.Context, key string, value []byte, opts ...PutOption) error {
	return m.write(ctx, "put", key, nil, []Op{putOp(key, value, opts)})
}

// Create implements Store.
func (m *Memory) Create(ctx context.Context, key string, value []byte, opts ...PutOption) error {
	return m.write(ctx, "create", key, []Condition{{Key: key}}, []Op{putOp(key, value, opts)})
}

// CompareAndSwap implements Store.
func (m *Memory) CompareAndSwap(ctx context.Context, key string, revision int64, value []byte, opts ...PutOption) error {
	return m.write(ctx, "compare and swap", key, []Condition{{Key: key, Revision: revision}}, []Op{putOp(key, value, opts)})
}

// Delete implements Store.
func (m *Memory) Delete(ctx context.Context, key string) error {
	return m.write(ctx, "delete", key, nil, []Op{{Kind: OpDelete, Key: key}})
}

// Txn implements Store.
func (m *Memory) Txn(ctx context.Context, conds []Condition, ops []Op) error {
	return m.write(ctx, "transaction on", txnName(conds, ops), conds, ops)
}

// Status implements Store.
func (m *Memory) Status() Status {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	status := Status{
		Connected:   !m.disconnected && !m.closed,
		Endpoints:   []string{"memory"},
		LastContact: m.lastContact,
		Revision:    m.store.revision,
		Reconnects:  m.reconnects,
	}
	if m.lease != 0 {
		status.Lease = fmt.Sprintf("%x", m.lease)
	}
	for _, n := range m.excess {
		status.Excess += n
	}
	switch {
	case m.closed:
		status.LastError = ErrClosed.Error()
	case errors.Is(m.fault, ErrDenied):
		status.Connected, status.Denied, status.LastError = false, true, "memory: "+m.fault.Error()
	case m.disconnected:
		status.LastError = "memory: disconnected"
	}
	return status
}

// Close implements Store. The lease stays until ExpireLeases.
func (m *Memory) Close() error {
	m.store.mu.Lock()
	m.closed = true
	for lease := range m.holds {
		m.loseHold(lease)
	}
	m.store.mu.Unlock()
	m.cancel()
	m.wg.Wait()
	return nil
}

func (m *Memory) requestError(what, key string, err error) error {
	return fmt.Errorf("kvstore: %s %q at memory: %w", what, key, err)
}

// usable tells whether a request may go on. The caller holds the lock.
func (m *Memory) usable(ctx context.Context) error {
	switch {
	case m.closed:
		return ErrClosed
	case ctx.Err() == context.DeadlineExceeded:
		return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
	case ctx.Err() != nil:
		return ctx.Err()
	case m.fault != nil:
		return m.fault
	case m.disconnected:
		return fmt.Errorf("%w: disconnected", ErrUnavailable)
	}
	m.lastContact = time.Now()
	return nil
}

func (m *Memory) write(ctx context.Context, what, key string, conds []Condition, ops []Op) error {
	m.store.mu.Lock()
	defer m.store.mu.Unlock()
	if err := checkTxn(conds, ops); err != nil {
		return fmt.Errorf("kvstore: %s %q: %w", what, key, err)
	}
	if err := m.usable(ctx); err != nil {
		return m.requestError(what, key, err)
	}
	for _, c := range conds {
		if !m.store.holds(c) {
			return m.requestError(what, key, ErrConflict)
		}
	}
	if anyLeased(ops) {
		m.ensureLease()
	}
	revision := m.store.revision + 1
	for _, op := range ops {
		m.do(op, conds, revision)
	}
	m.store.announce()
	return nil
}

func (m *Memory) do(op Op, conds []Condition, revision int64) {
	lease := int64(0)
	if op.Kind == OpPut && op.Leased {
		lease = m.lease
		m.owned[op.Key] = ownedKey{value: slices.Clone(op.Value), claimed: claims(conds, op.Key)}
	} else {
		delete(m.owned, op.Key)
	}
	if op.Kind == OpDelete {
		m.store.delete(op.Key, revision)
		return
	}
	m.store.put(op.Key, op.Value, lease, revision)
}

// Hold implements Store. The key vanishes with ExpireLeases.
func (m *Memory) Hold(ctx context.Context, key string, value []byte, ttl time.Duration) (*Held, error) {
	if err := checkHold(ttl); err != nil {
		return nil, fmt.Errorf("kvstore: hold %q: %w", key, err)
	}
	s := m.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := m.usable(ctx); err != nil {
		return nil, m.requestError("hold", key, err)
	}
	if !s.holds(Condition{Key: key}) {
		return nil, m.requestError("hold", key, ErrConflict)
	}
	lease, lost := s.grant(), make(chan struct{})
	m.holds[lease] = lost
	s.put(key, value, lease, s.revision+1)
	s.announce()
	return &Held{Revision: s.revision, Lost: lost, release: func(ctx context.Context) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		m.loseHold(lease)
		if err := m.usable(ctx); err != nil {
			return m.requestError("release", key, err)
		}
		delete(s.leases, lease)
		if s.keys[key].lease == lease {
			s.delete(key, s.revision+1)
			s.announce()
		}
		return nil
	}}, nil
}

// loseHold notes that what hangs on the lease is held no more.
func (m *Memory) loseHold(lease int64) {
	if lost, ok := m.holds[lease]; ok {
		close(lost)
		delete(m.holds, lease)
	}
}

func (m *Memory) ensureLease() {
	if m.lease == 0 || !m.store.leases[m.lease] {
		m.lease = m.store.grant()
	}
}

// recover does what a session does once it has contact again: what was held on leases that are gone is lost; if its own lease is,
// or the store another one, it writes the owned keys again.
func (m *Memory) recover() {
	s := m.store
	for lease := range m.holds {
		if !s.leases[lease] {
			m.loseHold(lease)
		}
	}
	if m.closed || m.lease == 0 || s.leases[m.lease] && m.generation == s.generation {
		return
	}
	m.generation = s.generation
	m.ensureLease()
	for _, key := range slices.Sorted(maps.Keys(m.owned)) {
		own := m.owned[key]
		now, exists := s.keys[key]
		switch {
		case exists && own.claimed && now.lease != m.lease:
			delete(m.owned, key)
		case !exists || now.lease != m.lease || string(now.value) != string(own.value):
			s.put(key, own.value, m.lease, s.revision+1)
		}
	}
}

// memoryStore is what the clients of one store share.
type memoryStore struct {
	mu       sync.Mutex
	revision int64
	keys     map[string]memoryKey
	leases   map[int64]bool
	granted  int64
	// history has every change after revision compacted, oldest first.
	history   []memoryEvent
	compacted int64
	// generation counts wipes.
	generation int
	clients    []*Memory
	// changed is closed and made anew whenever a watch may have something to do.
	changed chan struct{}
}

// memoryEvent is a change of the history.
type memoryEvent struct {
	Event
	created bool
}

type memoryKey struct {
	value    []byte
	revision int64
	lease    int64
}

func (k memoryKey) entry(key string) Entry {
	return Entry{Key: key, Value: slices.Clone(k.value), Revision: k.revision}
}

func (s *memoryStore) client() *Memory {
	m := &Memory{store: s, owned: make(map[string]ownedKey), excess: make(map[*memoryWatch]int), holds: make(map[int64]chan struct{}), generation: s.generation, lastContact: time.Now()}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	s.clients = append(s.clients, m)
	return m
}

func (s *memoryStore) grant() int64 {
	s.granted++
	s.leases[s.granted] = true
	return s.granted
}

func (s *memoryStore) holds(c Condition) bool {
	if !c.Prefix {
		return s.keys[c.Key].revision == c.Revision
	}
	for key := range s.keys {
		if strings.HasPrefix(key, c.Key) {
			return false
		}
	}
	return true
}

func (s *memoryStore) list(prefix string) []Entry {
	var entries []Entry
	for _, key := range slices.Sorted(maps.Keys(s.keys)) {
		if strings.HasPrefix(key, prefix) {
			entries = append(entries, s.keys[key].entry(key))
		}
	}
	return entries
}

func (s *memoryStore) put(key string, value []byte, lease, revision int64) {
	k := memoryKey{value: slices.Clone(value), revision: revision, lease: lease}
	_, exists := s.keys[key]
	s.keys[key] = k
	s.revision = revision
	s.history = append(s.history, memoryEvent{Event{Kind: EventPut, Entry: k.entry(key)}, !exists})
}

func (s *memoryStore) delete(key string, revision int64) {
	if _, ok := s.keys[key]; !ok {
		return
	}
	delete(s.keys, key)
	s.revision = revision
	s.history = append(s.history, memoryEvent{Event: Event{Kind: EventDelete, Entry: Entry{Key: key, Revision: revision}}})
}

func (s *memoryStore) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *memoryStore) recoverClients() {
	for _, m := range s.clients {
		if !m.disconnected {
			m.recover()
		}
	}
	s.announce()
}
