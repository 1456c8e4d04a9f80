package kvstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

const (
	// maxBackoff is the longest pause between two attempts at anything that is tried until it works.
	maxBackoff = time.Second
	minBackoff = 50 * time.Millisecond
	// dialTimeout of one attempt to connect, TLS included. Short, because an attempt that was begun
	// while packets were lost waits for TCP's ever slower retransmissions.
	dialTimeout = 3 * time.Second
	// keepaliveTime is the least that gRPC allows. More important is keepaliveTimeout, which gRPC also
	// sets as TCP_USER_TIMEOUT: a connection whose data (such as the probe's) isn't acknowledged for that long is dropped.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
	// maxAnswer is the largest answer that is taken, in bytes, so that no server can fill our memory with one. A single key has 1.5 MiB at most.
	maxAnswer = 32 << 20
)

// etcd implements Store on an etcd client.
type etcd struct {
	client  *clientv3.Client
	probeKV pb.KVClient
	timeout time.Duration
	quota   Quota
	where   string // the endpoints, for messages
	contact *contact
	session *session
	// doubt makes the health check ask at once.
	doubt chan struct{}
	// ctx ends with Close.
	ctx    context.Context
	cancel context.CancelFunc

	// mu guards closed, and with it that no goroutine is added once Close waits.
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup

	endpoints []string
}

// Dial returns a Store on the etcd that cfg names. It doesn't wait for the server, nor does it fail
// without one: requests and watches wait for it, and Status tells. It fails if cfg can't
// work, such as for a missing certificate. The Store lives until ctx ends or it is closed; call Close in any case.
func Dial(ctx context.Context, cfg Config) (Store, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	client, err := newClient(cfg)
	if err != nil {
		return nil, err
	}
	e := &etcd{
		client:    client,
		probeKV:   pb.NewKVClient(client.ActiveConnection()),
		timeout:   cfg.RequestTimeout,
		quota:     cfg.Quota,
		where:     strings.Join(cfg.Endpoints, ", "),
		endpoints: cfg.Endpoints,
		doubt:     make(chan struct{}, 1),
	}
	e.ctx, e.cancel = context.WithCancel(ctx)
	e.session = newSession(client, cfg)
	e.contact = newContact(e.where, cfg.user, cfg.Log, e.session.wake)
	e.spawn(func() { e.health(e.ctx) })
	e.spawn(func() { e.session.run(e.ctx, e.contact) })
	return e, nil
}

// newClient returns a client of etcd, which connects when it is used.
func newClient(cfg Config) (*clientv3.Client, error) {
	dial := cfg.Dial
	if dial == nil {
		dial = func(ctx context.Context, address string) (net.Conn, error) {
			return NewDialer().DialContext(ctx, "tcp", address)
		}
	}
	options := []grpc.DialOption{grpc.WithContextDialer(dial), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff},
		MinConnectTimeout: dialTimeout,
	})}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            cfg.Endpoints,
		TLS:                  cfg.TLS,
		DialKeepAliveTime:    keepaliveTime,
		DialKeepAliveTimeout: keepaliveTimeout,
		PermitWithoutStream:  true,
		MaxCallRecvMsgSize:   maxAnswer,
		Logger:               zap.NewNop(),
		DialOptions:          options,
	})
	if err != nil {
		return nil, fmt.Errorf("kvstore: set up client for %s: %w", strings.Join(cfg.Endpoints, ", "), err)
	}
	return client, nil
}

// spawn runs f in a goroutine that Close waits for; it returns false, and doesn't, after Close.
func (e *etcd) spawn(f func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.wg.Go(f)
	return true
}

// Close implements Store.
func (e *etcd) Close() error {
	e.mu.Lock()
	first := !e.closed
	e.closed = true
	e.mu.Unlock()
	e.cancel()
	e.wg.Wait()
	if !first {
		return nil
	}
	if err := e.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("kvstore: close connection to %s: %w", e.where, err)
	}
	return nil
}

// Status implements Store.
func (e *etcd) Status() Status {
	s := Status{Endpoints: e.endpoints}
	e.contact.fill(&s)
	if id := e.session.leaseID(); id != clientv3.NoLease {
		s.Lease = fmt.Sprintf("%x", int64(id))
	}
	if e.ctx.Err() != nil {
		s.Connected, s.LastError = false, ErrClosed.Error()
	}
	return s
}

// request returns the context of one request: ctx, bounded by the request timeout and by Close.
func (e *etcd) request(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	stop := context.AfterFunc(e.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// Get implements Store.
func (e *etcd) Get(ctx context.Context, key string) (Entry, error) {
	rctx, cancel := e.request(ctx)
	defer cancel()
	before := e.contact.before()
	resp, err := withNewestUsers(rctx, func() (*clientv3.GetResponse, error) { return e.client.Get(rctx, key) })
	if err != nil {
		return Entry{}, e.requestError("get", key, err)
	}
	e.contact.linearized(before, resp.Header)
	if len(resp.Kvs) == 0 {
		return Entry{}, e.requestError("get", key, ErrNotFound)
	}
	kv := resp.Kvs[0]
	return Entry{Key: key, Value: kv.Value, Revision: kv.ModRevision}, nil
}

// Put implements Store.
func (e *etcd) Put(ctx context.Context, key string, value []byte, opts ...PutOption) error {
	return e.write(ctx, "put", key, nil, []Op{putOp(key, value, opts)})
}

// Create implements Store.
func (e *etcd) Create(ctx context.Context, key string, value []byte, opts ...PutOption) error {
	return e.write(ctx, "create", key, []Condition{{Key: key}}, []Op{putOp(key, value, opts)})
}

// CompareAndSwap implements Store.
func (e *etcd) CompareAndSwap(ctx context.Context, key string, revision int64, value []byte, opts ...PutOption) error {
	return e.write(ctx, "compare and swap", key, []Condition{{Key: key, Revision: revision}}, []Op{putOp(key, value, opts)})
}

// Delete implements Store.
func (e *etcd) Delete(ctx context.Context, key string) error {
	return e.write(ctx, "delete", key, nil, []Op{{Kind: OpDelete, Key: key}})
}

// Txn implements Store.
func (e *etcd) Txn(ctx context.Context, conds []Condition, ops []Op) error {
	return e.write(ctx, "transaction on", txnName(conds, ops), conds, ops)
}

// write is behind everything that changes the store.
func (e *etcd) write(ctx context.Context, what, key string, conds []Condition, ops []Op) error {
	if err := checkTxn(conds, ops); err != nil {
		return fmt.Errorf("kvstore: %s %q: %w", what, key, err)
	}
	rctx, cancel := e.request(ctx)
	defer cancel()
	resp, err := e.session.write(rctx, conds, ops)
	if err != nil {
		return e.requestError(what, key, err)
	}
	e.contact.answered(resp.Header)
	if !resp.Succeeded {
		return e.requestError(what, key, ErrConflict)
	}
	return nil
}
