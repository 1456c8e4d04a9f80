package tunnel

import (
	"context"
	"errors"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// How often devices are looked at: quickly while sessions are awaited, and slowly for ever, which is when they are repaired. Where a look takes
// long, because there are many peers, there are fewer.
const (
	quickLook  = 20 * time.Millisecond
	slowLook   = 500 * time.Millisecond
	idleLook   = 3 * time.Second
	lookShare  = 20 // one part in so many of the time is spent looking
	checkEvery = 3 * time.Second
	checkPause = 50 * time.Millisecond // between comparisons where there is reason for one
)

// pace says when to look at a device next.
type pace struct {
	wait time.Duration // between looks while sessions are awaited
	last time.Time     // when the device was last looked at
	cost time.Duration // of a look
}

// costOf returns what an effort that took so long costs, with so many peers. What takes longer than they can make it take has waited, for a
// processor or for a process to start, and costs nobody anything.
func costOf(took time.Duration, peers int) time.Duration {
	const each, fixed = 200 * time.Microsecond, 10
	return min(took, time.Duration(peers+fixed)*each)
}

// hurry makes looks quick again.
func (p *pace) hurry() { p.wait = quickLook }

func (p *pace) read(now time.Time, cost time.Duration) {
	p.last, p.cost = now, cost
	p.wait = min(p.wait*2, slowLook)
}

// next returns when to look again.
func (p *pace) next(awaited bool) time.Time {
	wait := idleLook
	if awaited {
		wait = max(p.wait, quickLook)
	}
	return later(p.last.Add(wait), p.soonest())
}

// soonest returns before when no look is worth its cost.
func (p *pace) soonest() time.Time { return p.last.Add(lookShare * p.cost) }

// Run repairs devices, rules and routes that somebody else has removed, asks peers for sessions that are wanted, and follows
// handshakes, until ctx ends.
func (w *WireGuard) Run(ctx context.Context) error {
	watcher, err := w.watch()
	if err != nil {
		return err
	}
	defer watcher.stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case l := <-watcher.losses:
			w.suspect(l)
		case <-watcher.ended:
			return errors.New("links, addresses, routes and rules are watched no more")
		case <-w.kick:
		case <-timer.C:
		}
		w.mu.Lock()
		next := w.step(ctx, time.Now())
		w.mu.Unlock()
		timer.Reset(max(time.Until(next), time.Millisecond))
	}
}

// suspect makes the slots that something is missing of be compared soon; those whose link is concerned at once.
func (w *WireGuard) suspect(l loss) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.inUse() {
		switch {
		case l.link != 0 && l.link == s.index:
			s.checked = time.Time{}
		case l.link == 0 && (l.slot < 0 || l.slot == int(s.number)):
			s.suspect = true
		}
	}
}

// checkDue returns when all of the slot is to be compared next.
func (s *slot) checkDue() time.Time {
	pause := checkEvery
	if s.suspect {
		pause = checkPause
	}
	return s.checked.Add(max(pause, lookShare*s.checkCost))
}

// step does what is due and returns when the next is.
func (w *WireGuard) step(ctx context.Context, now time.Time) (next time.Time) {
	next = now.Add(idleLook)
	for _, s := range w.inUse() {
		if at := w.stepSlot(ctx, s, now); at.Before(next) {
			next = at
		}
	}
	if w.saved.due.IsZero() {
		return next
	}
	if !w.saved.due.After(now) {
		if err := w.saved.flush(w.peers); err != nil {
			w.log.Error("A restart will not know the peers before the stores are read.", "error", err)
		}
	}
	if at := w.saved.due; !at.IsZero() && at.Before(next) {
		next = at
	}
	return next
}

func (w *WireGuard) stepSlot(ctx context.Context, s *slot, now time.Time) (next time.Time) {
	if due := s.retry; !s.ready && due.After(now) {
		return due
	}
	if !s.ready || !s.checkDue().After(now) {
		if w.bring(ctx, s, now) != nil {
			return s.retry
		}
	}
	awaited, dueAgain := s.awaited(now)
	looked := s.pace.last.Equal(now)
	if !looked && (!s.pace.next(awaited).After(now) || dueAgain && !s.pace.soonest().After(now)) {
		if err := w.look(s, now); err != nil {
			w.fail(s, err, now)
			return s.retry
		}
		looked = true
	}
	if err := w.ask(s, looked, now); err != nil {
		w.fail(s, err, now)
		return s.retry
	}
	return s.next(now)
}

// awaited tells whether there is a peer without a session, and whether one is to be asked again.
func (s *slot) awaited(now time.Time) (awaited, dueAgain bool) {
	for _, x := range s.sessions {
		if x.shaken {
			continue
		}
		awaited = true
		if x.asked > 0 && !x.due.IsZero() && !x.due.After(now) {
			return true, true
		}
	}
	return awaited, false
}

// next returns when the slot is to be seen to again.
func (s *slot) next(now time.Time) time.Time {
	awaited := false
	next := s.checkDue()
	for _, x := range s.sessions {
		if x.shaken {
			continue
		}
		awaited = true
		due := x.due
		if due.IsZero() {
			continue
		}
		if x.asked > 0 {
			due = later(due, s.pace.soonest()) // It is looked at before.
		}
		if due.Before(next) {
			next = due
		}
	}
	if at := s.pace.next(awaited); at.Before(next) {
		next = at
	}
	return next
}

// look reads the device, follows its sessions and repairs its peers.
func (w *WireGuard) look(s *slot, now time.Time) error {
	device, err := s.read(now)
	if err != nil {
		return err
	}
	return s.set(wgtypes.Config{Peers: w.repairPeers(s, device, now)})
}

// fail notes that the slot isn't what it should be. It is brought there again at once.
func (w *WireGuard) fail(s *slot, err error, now time.Time) {
	w.log.Warn("WireGuard's device is looked at anew.", "device", s.name, "error", err)
	s.ready, s.problem = false, err
	s.retry = now
	w.wake()
}

func (w *WireGuard) wake() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}
