package agent

import (
	"context"
	"time"

	"causeway/clustermesh/peering"
)

// What a peer says of the link is asked for when somebody wants to know.
const (
	// reportFresh is how old its last word may be for it not to be asked again, reportStale how old for it to count for nothing.
	reportFresh = 2 * time.Second
	reportStale = 10 * time.Second
	// reportWait bounds how long a status waits for a first word, or a new one in place of a stale one, reportTimeout how long the peer may take.
	reportWait    = 800 * time.Millisecond
	reportTimeout = 3 * time.Second
)

// report is a peer's last word on the link.
type report struct {
	of      string // the user that the peer was asked as: another connection is another link
	word    peering.Report
	err     error
	asked   time.Time // the last answer, or failure
	heard   time.Time // the last answer
	ahead   time.Duration
	running chan struct{} // closed when the question that is under way has been answered; nil if none is
}

// stale tells whether the last word is too old to count.
func (r *report) stale() bool { return time.Since(r.heard) > reportStale }

// refresh asks the peers whose last word is old, and waits a moment for those whose last word counts for nothing.
func (v *peerView) refresh(all []*channel) {
	deadline := time.NewTimer(reportWait)
	defer deadline.Stop()
	for _, c := range all {
		running, needed := v.start(c)
		if running == nil || !needed {
			continue
		}
		select {
		case <-running:
		case <-deadline.C:
			return
		}
	}
}

// start asks a peer unless it has been asked just now. It returns what closes when it has answered, and whether that is worth waiting for: its last
// word counts for nothing any more, or it has answered well so far, so it will soon.
func (v *peerView) start(c *channel) (running chan struct{}, needed bool) {
	p := c.peer()
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.reports[c.cluster]
	if r == nil || r.of != p.User {
		r = &report{of: p.User}
		v.reports[c.cluster] = r
	}
	if r.running != nil {
		return r.running, r.stale() || r.err == nil
	}
	if time.Since(r.asked) < reportFresh || v.ended {
		return nil, false
	}
	r.running = make(chan struct{})
	v.asking.Go(func() { v.fetch(p, r) })
	return r.running, r.stale() || r.err == nil
}

// fetch asks a peer.
func (v *peerView) fetch(p peering.Peer, r *report) {
	ctx, cancel := context.WithTimeout(v.ctx, reportTimeout)
	defer cancel()
	begun := v.now()
	word, err := v.ask(ctx, p)
	took := v.now().Sub(begun)
	v.mu.Lock()
	defer v.mu.Unlock()
	r.asked, r.err = time.Now(), err
	if err == nil {
		r.word, r.heard, r.ahead = word, r.asked, word.At.Sub(begun.Add(took/2))
	}
	close(r.running)
	r.running = nil
}

// lastReport returns what a peer has said last.
func (v *peerView) lastReport(p peering.Peer) report {
	v.mu.Lock()
	defer v.mu.Unlock()
	if r := v.reports[p.Name()]; r != nil && r.of == p.User {
		return *r
	}
	return report{}
}

// word is how this node sees the link to a peer, for the peer to show.
func (v *peerView) word(cluster string) peering.Report {
	out := peering.Report{At: v.now(), Node: v.life.self}
	c := v.channels.get(cluster)
	if c == nil || c.local {
		return out
	}
	p := v.one(c, v.life.gossip.Overview(), false)
	out.State, out.Problems = c.peer().State, p.Why
	out.RTT, out.Loss, out.MTU = time.Duration(p.Out.RTT*float64(time.Millisecond)), p.Out.Loss, p.Out.MTU
	out.Last = time.Duration(p.Out.Last) * time.Millisecond
	if p.Out.Last < 0 {
		out.Last = -1
	}
	return out
}

// watchDenied asks peers whose stores do not let this cluster read any more whether they have left, until ctx ends. What follows from that is
// written into the records by who asks.
func (v *peerView) watchDenied(ctx context.Context) error {
	tick := time.NewTicker(reportFresh)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		for _, c := range v.channels.ofPeers() {
			if c.store.Status().Denied {
				v.start(c)
			}
		}
	}
}

// wait waits at the agent's end, which v.ctx has told, for the questions that are under way.
func (v *peerView) wait() {
	v.mu.Lock()
	v.ended = true
	v.mu.Unlock()
	v.asking.Wait()
}
