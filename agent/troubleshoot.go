package agent

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh/peering"
)

// troubleshootTimeout bounds a walk along all connections with one peer.
const troubleshootTimeout = 9500 * time.Millisecond

// troubleshoot answers requests to walk the connections with one peer, or all.
func (s *server) troubleshoot(w http.ResponseWriter, r *http.Request) {
	var req api.TroubleshootRequest
	if err := decode(r, &req); err != nil {
		answer(w, nil, err)
		return
	}
	var walk []*channel
	for _, c := range s.agent.channels.ofPeers() {
		if req.Peer == "" || c.cluster == req.Peer {
			walk = append(walk, c)
		}
	}
	left := s.agent.channels.leftPeers()
	for _, p := range left {
		if p.Name() == req.Peer {
			answer(w, nil, conflict("%s", leftPeer(p).Why[0]))
			return
		}
	}
	if req.Peer != "" && len(walk) == 0 {
		answer(w, nil, missing("there is no peer %s; see: clustermesh peers", req.Peer))
		return
	}
	out := newEvents(w)
	var all sync.WaitGroup
	for _, c := range walk {
		all.Go(func() { s.agent.troubleshoot(r.Context(), c, out.send) })
	}
	all.Wait()
}

// troubleshoot walks the connection with a peer in both directions, and says what is broken first.
func (a *agent) troubleshoot(ctx context.Context, c *channel, send func(any)) {
	ctx, cancel := context.WithTimeout(ctx, troubleshootTimeout)
	defer cancel()
	record := c.peer()
	var mu sync.Mutex
	checks := map[string][]peering.Check{}
	report := func(check peering.Check) {
		mu.Lock()
		defer mu.Unlock()
		checks[check.From] = append(checks[check.From], check)
		send(api.TroubleshootEvent{Peer: c.cluster, Check: apiCheck(check)})
	}
	own := a.checkOwn()
	report(own)
	var back error
	var both sync.WaitGroup
	both.Go(func() { _ = a.verify(ctx, record, false, report) })
	both.Go(func() { back = a.peering.AskChecks(ctx, record, report) })
	both.Wait()
	verdict := firstBroken(append(checks[a.cfg.Cluster.Name], checks[c.cluster]...))
	if verdict == "" && back != nil {
		verdict = "the way back is not known, since no agent of " + c.cluster + " could be asked for it: " + back.Error()
	}
	if verdict == "" {
		// What checks do not see, such as entries that are refused.
		if p := a.view.one(c, a.life.gossip.Overview(), true); len(p.Why) > 0 {
			verdict = p.Why[0]
		}
	}
	send(api.TroubleshootEvent{Peer: c.cluster, Verdict: verdict, OK: verdict == ""})
}

// checkOwn looks at what everything else needs: the own store.
func (a *agent) checkOwn() peering.Check {
	name := a.cfg.Cluster.Name
	check := peering.Check{Name: peering.CheckStore, From: name, To: name, Target: strings.Join(a.cfg.KVStore.Endpoints, ","), Outcome: peering.OK, Detail: "the own store answers"}
	if _, problems := a.own().state(a.refusals, time.Time{}); len(problems) > 0 {
		check.Outcome, check.Detail, check.Cause = peering.Failed, strings.Join(problems, "; "), "look at the etcd of this cluster first"
	}
	return check
}

// checkOrder is the order of checks: what others depend on comes first, and of the two directions' same check the own one.
var checkOrder = []string{
	peering.CheckName, peering.CheckTCP, peering.CheckMTU, peering.CheckClock, peering.CheckTLS, peering.CheckStore, peering.CheckAPI,
	peering.CheckGossipTCP, peering.CheckGossipUDP, peering.CheckTunnel, peering.CheckWireGuard, peering.CheckPods,
}

// firstBroken says what is broken first and why, in a sentence; empty if nothing is. A wrong clock makes certificates look expired, so
// it is told before those.
func firstBroken(checks []peering.Check) string {
	slices.SortStableFunc(checks, func(a, b peering.Check) int { return compareBool(a.From != a.To, b.From != b.To) })
	for _, name := range checkOrder {
		for _, c := range checks {
			if c.Outcome == peering.Failed && (c.Name == name || c.From == c.To) {
				verdict := c.Name + " from " + c.From + " to " + c.To + inBrackets(c.Target) + ": " + c.Detail
				if c.Cause != "" {
					verdict += "; likely cause: " + c.Cause
				}
				return verdict
			}
		}
	}
	return ""
}
