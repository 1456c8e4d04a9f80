package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Supervision of proxies.
const (
	// proxySilence is how long a proxy may not answer before it is killed, proxyFirstWord how long after its start.
	proxySilence, proxyFirstWord = 3 * time.Second, 5 * time.Second
	// proxySyncWithin is how long a proxy may take from its start to having read all services.
	proxySyncWithin = 6 * time.Second
	// proxyWithout is how long connections wait for a proxy before they are balanced at L4, and proxyFailures how many failed starts in a row they wait for.
	proxyWithout, proxyFailures = 2 * time.Second, 3
	// A proxy that has lived for proxySteady has not failed to start.
	proxySteady = 3 * time.Second
	// Pauses between starts that fail.
	proxyFirstPause, proxyLongestPause = 100 * time.Millisecond, 10 * time.Second
	proxyTick                          = 100 * time.Millisecond
)

// proxyPath is how connections get to the proxy: datapath.Proxy.
type proxyPath interface {
	Set(listeners []*net.TCPListener) error
	Clear() error
}

// proxyConfig of the proxies of a node.
type proxyConfig struct {
	dir     string   // of admin sockets and the log
	agent   string   // the socket that they read the state from
	command []string // that runs a proxy, less its flags
	env     []string // more of the environment
	version string   // of this program; a living proxy of another one is replaced
	// cgroup that they are put into; empty: the agent's.
	cgroup    string
	accessLog float64
	otlp      string
}

// proxies runs this node's L7 proxy: one in service, perhaps one that is being started, and those that finish what they have. They outlive the agent,
// and the next one finds them by their admin sockets.
//
// The agent keeps copies of the listeners. So, while there is no proxy for a moment, connections wait in the backlog for the next one. If there is none for longer, the copies are
// closed: who waits is reset, and connections are balanced at L4.
type proxies struct {
	cfg     proxyConfig
	sockets proxySockets
	path    proxyPath
	// wanted tells whether anything is balanced at L7, with a channel that closes when that may have changed.
	wanted func() (bool, <-chan struct{})
	log    *slog.Logger

	wake     chan struct{}
	asked    chan chan error // upgrades by hand
	watching sync.WaitGroup

	// What follows is Run's own.
	number    int
	listeners []*net.TCPListener
	set       bool          // connections are handed to the listeners
	current   *proxyProcess // in service
	next      *proxyProcess // started, and not ready yet
	retiring  []*proxyProcess
	// outdated: the current one is of another program than the agent. waiting are those who want an upgrade.
	outdated bool
	waiting  []chan error
	upgraded bool
	failures int
	retryAt  time.Time
	without  time.Time // since when there is none that is ready; zero: there is one, or none is wanted
	failure  string    // why the last one failed
	pathErr  error

	mu   sync.Mutex
	view proxiesView
}

// proxiesView is what others see of proxies.
type proxiesView struct {
	current  *proxyProcess
	next     *proxyProcess
	retiring []*proxyProcess
	problems []string
}

func newProxies(cfg proxyConfig, path proxyPath, wanted func() (bool, <-chan struct{}), log *slog.Logger) (*proxies, error) {
	p := &proxies{cfg: cfg, sockets: proxySockets{cfg.dir}, path: path, wanted: wanted, log: log, wake: make(chan struct{}, 1), asked: make(chan chan error)}
	if err := os.MkdirAll(cfg.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of the proxy's sockets: %w", err)
	}
	return p, nil
}

func (p *proxies) logPath() string { return filepath.Join(p.cfg.dir, "proxy.log") }

func (p *proxies) nudge() { wakeUp(p.wake) }

// Run supervises until ctx ends. Proxies go on then.
func (p *proxies) Run(ctx context.Context) error {
	watch, stop := context.WithCancel(ctx)
	defer p.watching.Wait()
	defer stop()
	defer func() {
		closeAll(p.listeners) // The proxy has its own.
		p.answerUpgrades(errors.New("the agent ends"))
	}()
	p.adopt(watch)
	tick := time.NewTicker(proxyTick)
	defer tick.Stop()
	for {
		wanted, changed := p.wanted()
		p.step(watch, time.Now(), wanted)
		p.publish(wanted)
		if p.upgraded { // Those who are told look at what is shown.
			p.upgraded = false
			p.answerUpgrades(nil)
		}
		select {
		case <-p.wake:
		case <-changed:
		case <-tick.C:
		case answer := <-p.asked:
			p.waiting = append(p.waiting, answer)
			p.retryAt = time.Time{}
		case <-ctx.Done():
			return nil
		}
	}
}

// Upgrade replaces the proxy by a new one, of the program that is on disk now, and returns when that serves.
func (p *proxies) Upgrade(ctx context.Context) error {
	answer := make(chan error, 1)
	select {
	case p.asked <- answer:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *proxies) answerUpgrades(err error) {
	for _, answer := range p.waiting {
		answer <- err
	}
	p.waiting = nil
}

// adopt takes over what an earlier agent has left.
func (p *proxies) adopt(ctx context.Context) {
	var newest *proxyProcess
	for _, n := range p.sockets.list() {
		p.number = max(p.number, n)
		pid, err := p.sockets.owner(n)
		switch {
		case err != nil:
			p.log.Warn("a proxy's socket can't be asked", "socket", p.sockets.path(n), "error", err)
			continue
		case pid == 0:
			p.sockets.remove(n)
			continue
		case !p.isOurs(pid, n):
			p.log.Warn("a proxy's socket is served by a process that no agent has started; it is left alone", "socket", p.sockets.path(n), "pid", pid)
			continue
		}
		proc := &proxyProcess{number: n, pid: pid, started: time.Now(), heard: time.Now(), admin: proxyAdmin{p.sockets.path(n)}, exited: make(chan struct{})}
		s, err := proc.admin.status(ctx)
		if err == nil {
			proc.started, proc.spoken, proc.status = s.Started, true, s
		}
		if p.watch(ctx, proc) != nil {
			continue // It has ended just now.
		}
		if err != nil || s.Draining {
			p.retire(ctx, proc) // One that does not answer is killed when it has not for too long.
			continue
		}
		if newest != nil {
			p.retire(ctx, newest)
		}
		newest = proc
	}
	if newest == nil {
		return
	}
	listeners, err := newest.admin.listeners()
	if err != nil {
		p.log.Warn("a proxy that runs can't be taken over; another one is started", "pid", newest.pid, "error", err)
		p.retire(ctx, newest)
		return
	}
	p.listeners = listeners
	s := newest.snapshot()
	if p.outdated = s.Version != p.cfg.version; s.Synced {
		p.current = newest
	} else {
		p.next = newest
	}
	p.log.Info("a proxy that runs is taken over", "pid", newest.pid)
}

// step brings what is closer to what should be.
func (p *proxies) step(ctx context.Context, now time.Time, wanted bool) {
	p.lookAfter(ctx, now)
	if p.current != nil {
		p.without = time.Time{}
	} else if p.without.IsZero() && wanted {
		p.without = now
	}
	if p.current == nil && p.listeners != nil && (!wanted && p.next == nil || p.failures >= proxyFailures || p.set && now.Sub(p.without) > proxyWithout) {
		p.giveUp()
	}
	if p.next == nil && !now.Before(p.retryAt) && (p.current == nil && wanted || p.current != nil && (p.outdated || len(p.waiting) > 0 && !p.upgraded)) {
		p.startNext(ctx)
	}
	if p.current == nil && p.next == nil && !wanted {
		p.answerUpgrades(conflict("no service is balanced at L7, so no proxy runs that could be replaced"))
	}
	p.handOver()
}

// lookAfter notes who has ended, is stuck, or has become ready.
func (p *proxies) lookAfter(ctx context.Context, now time.Time) {
	if c := p.current; c != nil {
		if why := p.gone(c); why != "" {
			p.log.Warn("the L7 proxy is gone, and another one is started", "pid", c.pid, "why", why)
			p.current, p.outdated, p.without = nil, false, now
			p.failed(c, why, now)
		} else if p.failures > 0 && now.Sub(c.started) > proxySteady && p.next == nil && !p.outdated {
			p.failures = 0
		}
	}
	if n := p.next; n != nil {
		if why := p.gone(n); why != "" {
			p.next = nil
			p.failed(n, why, now)
			p.answerUpgrades(fmt.Errorf("the new proxy failed, and the old one goes on: %s", why))
		} else if n.ready() {
			if p.current != nil {
				p.retire(ctx, p.current)
				p.outdated = false // It is of the program on disk, whichever that is.
			}
			p.current, p.next, p.failure = n, nil, ""
			p.upgraded = true
			p.log.Info("the L7 proxy serves", "pid", n.pid)
		} else if now.Sub(n.started) > proxySyncWithin {
			why := fmt.Sprintf("it had not read the services after %s, and was killed", proxySyncWithin)
			p.log.Warn("the L7 proxy does not get ready, and another one is started", "pid", n.pid, "why", why)
			if err := p.kill(n); err != nil {
				p.log.Error("a proxy that does not get ready can't be ended", "error", err)
			}
			p.next = nil
			p.failed(n, why, now)
			p.answerUpgrades(fmt.Errorf("the new proxy failed, and the old one goes on: %s", why))
		}
	}
	p.retiring = slices.DeleteFunc(p.retiring, func(r *proxyProcess) bool {
		if p.gone(r) == "" {
			if s := r.snapshot(); s.Version != "" && !s.Draining {
				p.drain(ctx, r)
			}
			return false
		}
		p.sockets.remove(r.number)
		return true
	})
	// Those who write into it append.
	if info, err := os.Stat(p.logPath()); err == nil && info.Size() > largestProxyLog {
		_ = os.Truncate(p.logPath(), 0)
	}
}

// gone says why a process is of no use any more, and ends it if it has not ended; empty: it is well.
func (p *proxies) gone(proc *proxyProcess) string {
	if proc.hasExited() {
		return "it ended: " + p.lastWords(proc)
	}
	patience := proxySilence
	proc.mu.Lock()
	if !proc.spoken {
		patience = proxyFirstWord
	}
	proc.mu.Unlock()
	if proc.silence() < patience {
		return ""
	}
	if err := p.kill(proc); err != nil {
		p.log.Error("a proxy that does not answer can't be ended", "error", err)
	}
	return fmt.Sprintf("it did not answer for %s, and was killed", patience)
}

// failed counts a process that has ended or was ended. One that has lived for long is followed at once.
func (p *proxies) failed(proc *proxyProcess, why string, now time.Time) {
	p.sockets.remove(proc.number)
	p.failure = why
	if now.Sub(proc.started) > proxySteady && proc.snapshot().Synced {
		p.failures, p.retryAt = 0, now
		return
	}
	p.fail(now)
}

func (p *proxies) fail(now time.Time) {
	p.retryAt = now.Add(min(proxyFirstPause<<min(p.failures, 10), proxyLongestPause))
	p.failures++
}

// startNext starts a process, with listeners that there are or new ones.
func (p *proxies) startNext(ctx context.Context) {
	if p.listeners == nil {
		listeners, err := openProxyListeners(ctx)
		if err != nil {
			p.failure = err.Error()
			p.fail(time.Now())
			return
		}
		p.listeners = listeners
		p.handOver()
	}
	next, err := p.start(ctx, p.listeners)
	if err != nil {
		p.log.Error("the L7 proxy can't be started", "error", err)
		p.failure = err.Error()
		p.fail(time.Now())
		p.answerUpgrades(err)
		return
	}
	p.next = next
}

// handOver has connections come to the listeners. Those that come while the first proxy starts wait for it, or the clients of a service that has just been
// annotated would stay at L4 for as long as their connections last; after a failure they come when there is a proxy that takes them.
func (p *proxies) handOver() {
	if p.set || p.listeners == nil || p.current == nil && p.failures > 0 {
		return
	}
	if p.pathErr = p.path.Set(p.listeners); p.pathErr == nil {
		p.set = true
	}
}

// giveUp has connections balanced at L4. Who waits in the backlog is reset.
func (p *proxies) giveUp() {
	if p.set {
		p.log.Warn("there is no L7 proxy: connections to L7 services are balanced at L4", "why", p.failure)
	}
	if p.pathErr = p.path.Clear(); p.pathErr == nil {
		p.set = false
	}
	if p.next != nil { // It has the listeners, too.
		if err := p.kill(p.next); err != nil {
			p.log.Error("a proxy that is not ready can't be ended", "error", err)
		}
		p.failed(p.next, "it was not ready in time", time.Now())
		p.next = nil
	}
	closeAll(p.listeners)
	p.listeners = nil
	p.failures = min(p.failures, proxyFailures-1) // The next listeners are given up after one more failure.
}

// retire has a process finish what it has.
func (p *proxies) retire(ctx context.Context, proc *proxyProcess) {
	p.retiring = append(p.retiring, proc)
	p.drain(ctx, proc)
}

func (p *proxies) drain(ctx context.Context, proc *proxyProcess) {
	if err := proc.admin.drain(ctx); err != nil && ctx.Err() == nil {
		p.log.Debug("a proxy does not hear yet that it shall finish", "pid", proc.pid, "error", err)
	}
}

// publish shows others how things are.
func (p *proxies) publish(wanted bool) {
	v := proxiesView{current: p.current, next: p.next, retiring: slices.Clone(p.retiring)}
	problem := func(format string, args ...any) { v.problems = append(v.problems, fmt.Sprintf(format, args...)) }
	switch {
	case p.current == nil && wanted && p.failure != "":
		problem("the L7 proxy does not run (%s); until it does, L7 services are balanced by connection, at L4; see %s", p.failure, p.logPath())
	case p.current == nil && wanted && time.Since(p.without) > proxyWithout:
		problem("the L7 proxy is not ready yet; until it is, L7 services are balanced by connection, at L4; see %s", p.logPath())
	case p.current != nil && p.failure != "" && p.failures > 0:
		problem("the L7 proxy could not be replaced, or has failed before (%s); see %s", p.failure, p.logPath())
	}
	if p.pathErr != nil {
		problem("connections can't be handed to the L7 proxy, and are balanced at L4: %v", p.pathErr)
	}
	if p.current != nil {
		for _, s := range p.current.snapshot().Problems {
			problem("L7 proxy: %s", s)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.view = v
}

func (p *proxies) snapshot() proxiesView {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.view
}

// all returns the processes that serve anything, the current one first.
func (v proxiesView) all() []*proxyProcess {
	var all []*proxyProcess
	if v.current != nil {
		all = append(all, v.current)
	}
	return append(all, v.retiring...)
}
