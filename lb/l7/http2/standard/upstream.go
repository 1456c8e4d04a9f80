package standard

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

//lint:file-ignore SA1019 net/http serves no single connection, and its client has no hold on one.

// errOverflow: all connections to a backend are full, and too many requests wait already.
var errOverflow = errors.New("too many requests wait for a connection to the backend")

const (
	// aliveAfter is how long a connection may be silent while it has streams until it is asked for a sign of life, and deadAfter how long that may take.
	aliveAfter = 10 * time.Second
	deadAfter  = 5 * time.Second
)

// pools are the connections to one endpoint, by the client's identity: a connection has the identity of one.
type pools struct {
	mu   sync.Mutex
	of   *balance.Endpoint
	all  map[uint32]*pool
	open int // connections, and those that are being made
	wait int // requests that wait for one
	// freed is closed when a stream or connection has ended, or a connection was made.
	freed chan struct{}
	gone  bool
}

type pool struct {
	conns   []*http2.ClientConn
	dialing bool
}

func poolsOf(e *balance.Endpoint) *pools {
	return e.Keep(balance.KeepHTTP2, func() any {
		p := &pools{of: e, all: map[uint32]*pool{}, freed: make(chan struct{})}
		go p.watch()
		return p
	}).(*pools)
}

// watch ends the connections, when their streams have ended, of an endpoint that is removed.
func (p *pools) watch() {
	<-p.of.Removed()
	p.mu.Lock()
	p.gone = true
	var all []*http2.ClientConn
	for _, pool := range p.all {
		all = append(all, pool.conns...)
	}
	p.mu.Unlock()
	for _, c := range all {
		go func() { _ = c.Shutdown(context.Background()) }()
	}
}

// take returns a connection with room for one more stream, which the caller's round trip uses.
func (p *pools) take(ctx context.Context, env *exchange.Env, pod state.Client, most, pending int) (*http2.ClientConn, error) {
	waits := false
	defer func() {
		if waits {
			p.mu.Lock()
			p.wait--
			p.mu.Unlock()
		}
	}()
	for {
		p.mu.Lock()
		own := p.all[pod.Identity]
		if own == nil {
			own = &pool{}
			p.all[pod.Identity] = own
		}
		if c := p.free(own); c != nil {
			p.mu.Unlock()
			return c, nil
		}
		if !own.dialing && p.open < most {
			own.dialing = true
			p.open++
			p.mu.Unlock()
			if err := p.dial(ctx, env, own, pod); err != nil {
				return nil, err
			}
			continue
		}
		if !waits {
			if p.wait >= pending && !own.dialing {
				p.mu.Unlock()
				return nil, errOverflow
			}
			waits = true
			p.wait++
		}
		freed := p.freed
		p.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// free returns a connection with room, and forgets those that have ended. The caller holds the lock.
func (p *pools) free(own *pool) (found *http2.ClientConn) {
	kept := own.conns[:0]
	for _, c := range own.conns {
		if s := c.State(); s.Closed || s.Closing {
			p.open--
			continue
		}
		kept = append(kept, c)
		if found == nil && c.ReserveNewRequest() {
			found = c
		}
	}
	clear(own.conns[len(kept):])
	own.conns = kept
	return found
}

func (p *pools) dial(ctx context.Context, env *exchange.Env, own *pool, pod state.Client) error {
	conn, err := env.Dial(ctx, p.of, pod)
	var c *http2.ClientConn
	if err == nil {
		transport := &http2.Transport{
			AllowHTTP: true, DisableCompression: true,
			MaxHeaderListSize: uint32(env.Limits.HeaderBytes), IdleConnTimeout: env.Limits.UpstreamIdle,
			ReadIdleTimeout: aliveAfter, PingTimeout: deadAfter,
		}
		if c, err = transport.NewClientConn(conn); err != nil {
			conn.Close()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	own.dialing = false
	p.release()
	if err != nil {
		p.open--
		return dialError{fmt.Errorf("connecting to %s: %w", p.of.Address(), err)}
	}
	own.conns = append(own.conns, c)
	if p.gone {
		go func() { _ = c.Shutdown(context.Background()) }()
	}
	return nil
}

// dialError is of a connection that was never made, so that nothing was sent.
type dialError struct{ error }

// ended is called when a stream has.
func (p *pools) ended() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wait > 0 {
		p.release()
	}
}

func (p *pools) release() {
	close(p.freed)
	p.freed = make(chan struct{})
}
