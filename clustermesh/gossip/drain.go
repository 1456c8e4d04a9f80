package gossip

import (
	"maps"
	"time"
)

// Drain has the whole mesh take this node's backends out of service, or back into it. It returns how many members
// have taken the news; the others get it by gossip.
func (g *Gossip) Drain(on bool) (told int) {
	g.mu.Lock()
	now := time.Now()
	g.own.Draining = on
	g.own.Shared = g.own.Shared || on
	g.tellFacts(now)
	d := *g.ledger.get(factsKey(g.Self))
	pools := maps.Clone(g.pools)
	g.mu.Unlock()
	g.wakeUp()
	msg := message(msgDeltas, []Delta{d})
	took := make(chan bool)
	sent := 0
	for _, p := range pools {
		for _, address := range p.some(drainMembers) {
			sent++
			p.busy.Go(func() { took <- p.reliable(address, msg) })
		}
	}
	for range sent {
		if <-took {
			told++
		}
	}
	return told
}

// drainMembers bounds the members of each pool that are told of a drain directly.
const drainMembers = 64
