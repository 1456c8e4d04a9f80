package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"causeway/clustermesh/peering"
)

// checkTimeout bounds one try of a check, checkPause is the time between two, and checkPatience how long one is tried again.
const (
	checkTimeout  = 1500 * time.Millisecond
	checkPause    = 50 * time.Millisecond
	checkPatience = 4 * time.Second
)

// linkCheck is one thing that is tried between this cluster and a peer. try returns what was asked, what came of it, and the error
// with its likely cause.
type linkCheck struct {
	name string
	try  func(ctx context.Context) tried
	// needs are checks that this one cannot do without.
	needs []string
}

// tried is what came of one try.
type tried struct {
	target, detail string
	err            error
	cause          string
	// skipped: there was nothing to try.
	skipped bool
	// going: it is not well yet, and getting there: it takes as long as it takes.
	going bool
}

// verify makes every check of the link to a peer from this node, and reports each as it ends. With wait it goes on until all are
// well or ctx ends. The error names the first one that is not.
func (a *agent) verify(ctx context.Context, peer peering.Peer, wait bool, report func(peering.Check)) error {
	failed := map[string]bool{}
	var first error
	for _, c := range a.linkChecks(peer) {
		check := peering.Check{Name: c.name, From: a.cfg.Cluster.Name, To: peer.Name(), Outcome: peering.Skipped}
		if lacking := slices.IndexFunc(c.needs, func(n string) bool { return failed[n] }); lacking >= 0 {
			check.Detail = "not tried, since this failed: " + c.needs[lacking]
			failed[c.name] = true
			report(check)
			continue
		}
		begun := time.Now()
		t := attempt(ctx, c, wait)
		check.Took, check.Target, check.Detail = time.Since(begun), t.target, t.detail
		switch {
		case t.err != nil:
			check.Outcome, check.Detail, check.Cause = peering.Failed, t.err.Error(), t.cause
			failed[c.name] = true
			if first == nil {
				first = fmt.Errorf("%s from %s to %s%s: %w", c.name, check.From, check.To, inBrackets(t.target), t.err)
				if t.cause != "" {
					first = fmt.Errorf("%w; %s", first, t.cause)
				}
			}
		case !t.skipped:
			check.Outcome = peering.OK
		}
		report(check)
	}
	return first
}

func inBrackets(target string) string {
	if target == "" {
		return ""
	}
	return " (" + target + ")"
}

// attempt tries a check, with wait again and again until it is well or checkPatience is over.
func attempt(ctx context.Context, c linkCheck, wait bool) tried {
	patience := time.NewTimer(checkPatience)
	defer patience.Stop()
	for {
		t := c.try(ctx)
		if t.err == nil || !wait {
			return t
		}
		impatient := patience.C
		if t.going {
			impatient = nil
		}
		select {
		case <-time.After(checkPause):
		case <-impatient:
			return t
		case <-ctx.Done():
			return t
		}
	}
}

// linkChecks lists the checks in the order in which things depend on each other.
func (a *agent) linkChecks(peer peering.Peer) []linkCheck {
	l := &linkProbe{agent: a, peer: peer}
	tunnel := linkCheck{name: peering.CheckTunnel, try: l.tunnel}
	if a.cfg.Encryption.Mode.Covers(false) {
		tunnel = linkCheck{name: peering.CheckWireGuard, try: l.wireGuard}
	}
	return []linkCheck{
		{name: peering.CheckName, try: l.names},
		{name: peering.CheckTCP, try: l.tcp, needs: []string{peering.CheckName}},
		{name: peering.CheckTLS, try: l.tls, needs: []string{peering.CheckTCP}},
		{name: peering.CheckStore, try: l.store, needs: []string{peering.CheckTLS}},
		{name: peering.CheckAPI, try: l.api},
		{name: peering.CheckClock, try: l.clock, needs: []string{peering.CheckAPI}},
		{name: peering.CheckGossipTCP, try: l.gossipTCP},
		{name: peering.CheckGossipUDP, try: l.gossipUDP},
		tunnel,
		{name: peering.CheckPods, try: l.pods, needs: []string{tunnel.name}},
		{name: peering.CheckMTU, try: l.mtu, needs: []string{peering.CheckPods}},
	}
}
