package kvstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/semaphore"
)

// session owns the lease on which leased keys hang, and remembers these keys so that it can write
// them again. The lease is granted with the first leased write.
//
// After an outage it first asks for the old lease. Only if the server says that this is gone
// does it take a new one and write the keys again: keys whose lease is alive never vanish for a moment.
type session struct {
	client  *clientv3.Client
	ttl     time.Duration
	timeout time.Duration
	log     *slog.Logger
	woken   chan struct{}

	// gate keeps writes (1 each) out while leased keys are written again (all),
	// which would otherwise overwrite what a concurrent Put or Delete has done.
	// Taken before granting, that before mu.
	gate     *semaphore.Weighted
	granting *semaphore.Weighted

	mu      sync.Mutex
	lease   clientv3.LeaseID
	granted time.Duration // the lease's TTL as the server set it
	owned   map[string]ownedKey
	stale   bool // owned keys may be missing from the store
}

// ownedKey is a leased key that this session wrote.
type ownedKey struct {
	value []byte
	// claimed keys were written on a condition (Create, CompareAndSwap): if somebody else has
	// them after the lease was lost, they are theirs.
	claimed bool
}

// claims tells whether a write of key is on the condition of what was there before.
func claims(conds []Condition, key string) bool {
	return slices.ContainsFunc(conds, func(c Condition) bool { return !c.Prefix && c.Key == key })
}

const (
	allWrites = 1 << 20
	// rewriteKeys and rewriteBytes bound one transaction that writes keys again, well within etcd's limits.
	rewriteKeys  = 32
	rewriteBytes = 512 << 10
)

func newSession(client *clientv3.Client, cfg Config) *session {
	return &session{
		client:   client,
		ttl:      cfg.LeaseTTL,
		timeout:  cfg.RequestTimeout,
		log:      cfg.Log,
		woken:    make(chan struct{}, 1),
		gate:     semaphore.NewWeighted(allWrites),
		granting: semaphore.NewWeighted(1),
		owned:    make(map[string]ownedKey),
	}
}

// wake makes run look after the lease now.
func (s *session) wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

func (s *session) leaseID() clientv3.LeaseID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lease
}

// write does one transaction. If the lease turns out to be gone it takes a new one and tries once more.
func (s *session) write(ctx context.Context, conds []Condition, ops []Op) (*clientv3.TxnResponse, error) {
	resp, lease, err := s.tryWrite(ctx, conds, ops)
	if !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return resp, err
	}
	if err := s.renew(ctx, lease); err != nil {
		return nil, err
	}
	resp, _, err = s.tryWrite(ctx, conds, ops)
	return resp, err
}

func (s *session) tryWrite(ctx context.Context, conds []Condition, ops []Op) (*clientv3.TxnResponse, clientv3.LeaseID, error) {
	if err := s.gate.Acquire(ctx, 1); err != nil {
		return nil, clientv3.NoLease, err
	}
	defer s.gate.Release(1)
	lease := clientv3.NoLease
	if anyLeased(ops) {
		var err error
		if lease, err = s.ensureLease(ctx); err != nil {
			return nil, lease, err
		}
	}
	resp, err := withNewestUsers(ctx, func() (*clientv3.TxnResponse, error) {
		return s.client.Txn(ctx).If(etcdCompares(conds)...).Then(etcdOps(ops, lease)...).Commit()
	})
	if err == nil && resp.Succeeded {
		s.remember(conds, ops)
	}
	return resp, lease, err
}

// remember notes which keys are now the session's, and which are no longer.
func (s *session) remember(conds []Condition, ops []Op) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, op := range ops {
		if op.Kind != OpPut || !op.Leased {
			delete(s.owned, op.Key)
			continue
		}
		s.owned[op.Key] = ownedKey{value: slices.Clone(op.Value), claimed: claims(conds, op.Key)}
	}
}

// ensureLease returns the lease, granted now if there is none.
func (s *session) ensureLease(ctx context.Context) (clientv3.LeaseID, error) {
	if id := s.leaseID(); id != clientv3.NoLease {
		return id, nil
	}
	if err := s.granting.Acquire(ctx, 1); err != nil {
		return clientv3.NoLease, err
	}
	defer s.granting.Release(1)
	if id := s.leaseID(); id != clientv3.NoLease {
		return id, nil
	}
	return s.grant(ctx)
}

func (s *session) grant(ctx context.Context) (clientv3.LeaseID, error) {
	resp, err := s.client.Grant(ctx, max(1, int64((s.ttl+time.Second-1)/time.Second)))
	if err != nil {
		return clientv3.NoLease, fmt.Errorf("grant lease: %w", err)
	}
	s.mu.Lock()
	s.lease, s.granted = resp.ID, time.Duration(resp.TTL)*time.Second
	s.mu.Unlock()
	s.wake()
	return resp.ID, nil
}

// renew replaces the lost lease old, unless somebody else has done so, and writes the owned keys again.
func (s *session) renew(ctx context.Context, old clientv3.LeaseID) error {
	if err := s.gate.Acquire(ctx, allWrites); err != nil {
		return err
	}
	defer s.gate.Release(allWrites)
	if s.leaseID() != old {
		return nil
	}
	if _, err := s.grant(ctx); err != nil {
		return err
	}
	s.markStale()
	s.log.Warn("the store has lost our lease; taking a new one and writing our keys again", "lease", fmt.Sprintf("%x", int64(old)))
	return s.rewrite(ctx)
}

func (s *session) markStale() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stale = s.lease != clientv3.NoLease
}

// run keeps the lease alive, and puts things right after outages, until ctx ends.
func (s *session) run(ctx context.Context, c *contact) {
	generation := c.current()
	retry := time.Duration(0)
	for {
		timer := time.NewTimer(s.pause(retry))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-generation:
			generation = c.current()
			s.markStale()
		case <-s.woken:
		case <-timer.C:
		}
		timer.Stop()
		if err := s.refresh(ctx); err != nil {
			retry = min(max(2*retry, 50*time.Millisecond), maxBackoff)
		} else {
			retry = 0
		}
	}
}

// pause returns how long to wait until the next refresh, given the pause after a failure, or 0.
func (s *session) pause(retry time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case retry > 0:
		return retry
	case s.lease == clientv3.NoLease:
		return time.Hour
	}
	return s.granted / 3
}

// refresh keeps the lease alive, replaces it if it is gone, and writes owned keys again if some may be missing.
func (s *session) refresh(ctx context.Context) error {
	lease := s.leaseID()
	if lease == clientv3.NoLease {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	_, err := s.client.KeepAliveOnce(ctx, lease)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return s.renew(ctx, lease)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	stale := s.stale
	s.mu.Unlock()
	if !stale {
		return nil
	}
	if err := s.gate.Acquire(ctx, allWrites); err != nil {
		return err
	}
	defer s.gate.Release(allWrites)
	return s.rewrite(ctx)
}

// rewrite writes every owned key that isn't in the store as this session left it. The caller holds all of gate.
func (s *session) rewrite(ctx context.Context) error {
	s.mu.Lock()
	lease, keys := s.lease, slices.Sorted(maps.Keys(s.owned))
	s.mu.Unlock()
	for len(keys) > 0 {
		n := s.batch(keys)
		if err := s.rewriteBatch(ctx, lease, keys[:n]); err != nil {
			return fmt.Errorf("write leased keys again: %w", err)
		}
		keys = keys[n:]
	}
	s.mu.Lock()
	s.stale = false
	s.mu.Unlock()
	return nil
}

// batch returns how many of keys fit into one transaction.
func (s *session) batch(keys []string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, size := 0, 0
	for n < len(keys) && n < rewriteKeys && (n == 0 || size < rewriteBytes) {
		size += len(keys[n]) + 2*len(s.owned[keys[n]].value)
		n++
	}
	return n
}

func (s *session) rewriteBatch(ctx context.Context, lease clientv3.LeaseID, keys []string) error {
	ops := make([]clientv3.Op, len(keys))
	s.mu.Lock()
	for i, key := range keys {
		ops[i] = s.owned[key].rewriteOp(key, lease)
	}
	s.mu.Unlock()
	resp, err := withNewestUsers(ctx, func() (*clientv3.TxnResponse, error) { return s.client.Txn(ctx).Then(ops...).Commit() })
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, key := range keys {
		outcome := resp.Responses[i].GetResponseTxn()
		if s.owned[key].claimed && !outcome.Succeeded && !outcome.Responses[0].GetResponseTxn().Succeeded {
			delete(s.owned, key)
			s.log.Warn("a leased key was taken by another writer while our lease was lost; leaving it to them", "key", key)
		}
	}
	return nil
}

// rewriteOp puts the key unless it is there as we left it; a claimed one only if nobody else has it.
func (o ownedKey) rewriteOp(key string, lease clientv3.LeaseID) clientv3.Op {
	put := []clientv3.Op{clientv3.OpPut(key, string(o.value), clientv3.WithLease(lease))}
	ours := clientv3.Compare(clientv3.LeaseValue(key), "=", lease)
	if !o.claimed {
		same := clientv3.Compare(clientv3.Value(key), "=", string(o.value))
		return clientv3.OpTxn([]clientv3.Cmp{ours, same}, nil, put)
	}
	free := clientv3.Compare(clientv3.CreateRevision(key), "=", 0)
	return clientv3.OpTxn([]clientv3.Cmp{free}, put, []clientv3.Op{clientv3.OpTxn([]clientv3.Cmp{ours}, put, nil)})
}
