package l7

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/health"
	"causeway/lb/l7/http1"
	"causeway/lb/l7/http2"
	"causeway/lb/l7/observe"
	"causeway/lb/l7/state"
)

// engine serves a client's connection to its end, and closes it.
type engine func(context.Context, *exchange.Env, *exchange.Client)

// engines are variables of a proxy so that tests can look at what is handed to them.
type engines struct{ http1, http2 engine }

var theEngines = engines{http1.Serve, http2.Serve}

// proxy is one run.
type proxy struct {
	cfg      Config
	engines  engines
	table    *balance.Table
	feed     *feed
	env      *exchange.Env
	observer *observe.Observer
	started  time.Time

	draining  chan struct{}
	drainOnce sync.Once

	// life ends when the connections that are left are cut.
	life context.Context
	cut  context.CancelFunc

	slots    chan struct{} // one is taken by each connection; nil: there may be any number
	accepts  sync.WaitGroup
	serving  sync.WaitGroup
	count    atomic.Int64
	accepted chan struct{} // closed when the accept loops run

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]struct{}
}

func newProxy(cfg Config) (*proxy, error) {
	observer, err := observe.New(observe.Config{Log: cfg.Log, AccessLog: cfg.AccessLog, OTLP: cfg.OTLP, TracePercent: cfg.TracePercent, Version: cfg.Version})
	if err != nil {
		return nil, err
	}
	p := &proxy{
		cfg: cfg, engines: theEngines, table: balance.NewTable(), observer: observer, started: time.Now(),
		draining: make(chan struct{}), accepted: make(chan struct{}),
		listeners: map[net.Listener]struct{}{}, conns: map[net.Conn]struct{}{},
	}
	p.life, p.cut = context.WithCancel(context.Background())
	p.feed = newFeed(p.table, cfg.Log)
	p.env = &exchange.Env{Dial: p.dial, Observer: observer, Limits: cfg.Limits, Draining: p.draining, Log: cfg.Log}
	if cfg.Limits.Connections > 0 {
		p.slots = make(chan struct{}, cfg.Limits.Connections)
	}
	for _, l := range cfg.Listeners {
		p.listeners[l] = struct{}{}
	}
	return p, nil
}

func (p *proxy) run(ctx context.Context) error {
	defer p.observer.Close()
	defer p.cut()
	defer p.stopAccepting()
	admin, err := p.serveAdmin()
	if err != nil {
		return err
	}
	defer admin.close()

	var work sync.WaitGroup
	defer work.Wait()
	working, stop := context.WithCancel(p.life) // The state is read as long as there are connections, also when draining.
	defer stop()
	failed := make(chan error, 1)
	work.Go(func() {
		if err := p.readState(working); err != nil {
			failed <- err
		}
	})
	work.Go(func() { p.keepTime(working) })

	left := p.cfg.DrainTime
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return p.finish(p.cfg.StopTime)
	case <-p.draining:
		return p.finish(left)
	case <-p.feed.synced:
	}
	// Connections wait in the backlog until it is known what they are to.
	if p.cfg.Standalone {
		work.Go(func() { p.listenToFrontends(working) })
	}
	p.startAccepting()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		left = p.cfg.StopTime
	case <-p.draining:
	}
	// SIGTERM also shortens a drain that is under way.
	stopEarly := context.AfterFunc(ctx, func() { time.AfterFunc(p.cfg.StopTime, p.cut) })
	defer stopEarly()
	return p.finish(left)
}

// finish lets connections come to their end for so long, and then cuts them.
func (p *proxy) finish(left time.Duration) error {
	p.drain()
	p.stopAccepting()
	done := make(chan struct{})
	go func() {
		p.serving.Wait()
		close(done)
	}()
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-done:
		return nil
	case <-timer.C:
	case <-p.life.Done():
	}
	p.cfg.Log.Info("cutting the connections that are left", "connections", p.count.Load(), "after", left)
	p.cut()
	p.closeConns()
	<-done
	return nil
}

// drain tells all that this proxy is to finish.
func (p *proxy) drain() { p.drainOnce.Do(func() { close(p.draining) }) }

func (p *proxy) isDraining() bool {
	select {
	case <-p.draining:
		return true
	default:
		return false
	}
}

// stopAccepting closes this process's listeners. Sockets that others have too stay open, and so does their backlog.
func (p *proxy) stopAccepting() {
	p.mu.Lock()
	for l := range p.listeners {
		l.Close()
		delete(p.listeners, l)
	}
	p.mu.Unlock()
	p.accepts.Wait()
}

func (p *proxy) closeConns() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

// tickEvery is how often the table is told the time.
const tickEvery = 100 * time.Millisecond

// keepTime lets time pass for the table, and has backends asked whether they are well.
func (p *proxy) keepTime(ctx context.Context) {
	var checks sync.WaitGroup
	checks.Go(func() { health.Run(ctx, p.table, p.dialAsNode, p.cfg.Log) })
	defer checks.Wait()
	ticker := time.NewTicker(tickEvery)
	defer ticker.Stop()
	for {
		select {
		case now := <-ticker.C:
			p.table.Tick(now)
		case <-ctx.Done():
			return
		}
	}
}

// dialAsNode connects to a backend in this node's own name.
func (p *proxy) dialAsNode(ctx context.Context, e *balance.Endpoint) (net.Conn, error) {
	return p.dial(ctx, e, state.Client{Identity: p.table.Self().HostIdentity})
}

func (p *proxy) readState(ctx context.Context) error {
	if p.cfg.File != "" {
		return p.feed.readFile(p.cfg.File)
	}
	if p.cfg.Agent == "" {
		return errors.New("the proxy has nowhere to read its state from: give it the agent's socket, or a file")
	}
	p.feed.follow(ctx, p.cfg.Agent)
	return nil
}
