package kvstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// minHoldTTL is the shortest lease of a held key, in which three renewals and a slow answer have room.
const minHoldTTL = time.Second

func checkHold(ttl time.Duration) error {
	if ttl < minHoldTTL {
		return fmt.Errorf("a lease of %s is shorter than %s", ttl, minHoldTTL)
	}
	return nil
}

// Hold implements Store.
func (e *etcd) Hold(ctx context.Context, key string, value []byte, ttl time.Duration) (*Held, error) {
	if err := checkHold(ttl); err != nil {
		return nil, fmt.Errorf("kvstore: hold %q: %w", key, err)
	}
	rctx, cancel := e.request(ctx)
	defer cancel()
	begun := time.Now()
	lease, err := e.client.Grant(rctx, int64((ttl+time.Second-1)/time.Second))
	if err != nil {
		return nil, e.requestError("hold", key, err)
	}
	resp, err := withNewestUsers(rctx, func() (*clientv3.TxnResponse, error) {
		return e.client.Txn(rctx).If(etcdCompares([]Condition{{Key: key}})...).Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease.ID))).Commit()
	})
	if err == nil && !resp.Succeeded {
		err = ErrConflict
	}
	if err != nil {
		// If the write happened all the same, the key goes with its lease.
		e.spawn(func() { _ = e.revoke(e.ctx, lease.ID) })
		return nil, e.requestError("hold", key, err)
	}
	e.contact.answered(resp.Header)

	kctx, stop := context.WithCancel(e.ctx)
	lost := make(chan struct{})
	if !e.spawn(func() {
		defer close(lost)
		e.keep(kctx, lease.ID, time.Duration(lease.TTL)*time.Second, begun)
	}) {
		stop()
		return nil, e.requestError("hold", key, ErrClosed)
	}
	return &Held{Revision: resp.Header.Revision, Lost: lost, release: func(ctx context.Context) error {
		stop()
		<-lost
		rctx, cancel := e.request(ctx)
		defer cancel()
		if err := e.revoke(rctx, lease.ID); err != nil {
			return e.requestError("release", key, err)
		}
		return nil
	}}, nil
}

// keep renews a lease, last renewed at the given time, until it is gone, or may be for all that is known, or ctx ends.
func (e *etcd) keep(ctx context.Context, lease clientv3.LeaseID, ttl time.Duration, renewed time.Time) {
	pause := ttl / 3
	for {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		begun := time.Now()
		rctx, cancel := context.WithTimeout(ctx, max(ttl/3, minBackoff))
		_, err := e.client.KeepAliveOnce(rctx, lease)
		cancel()
		switch {
		case err == nil:
			renewed, pause = begun, ttl/3
			continue
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			return
		}
		if pause = minBackoff; time.Since(renewed) > ttl {
			return
		}
	}
}

// revoke ends a lease now; one that is gone already is no error.
func (e *etcd) revoke(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	if _, err := e.client.Revoke(ctx, lease); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return err
	}
	return nil
}
