package agent

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"causeway/lb"
	"causeway/lb/l7"
)

// peersGrace is how long proxies that come anew wait for the stores of other clusters to be read after the agent's start: one that is away must not
// keep this cluster's requests waiting.
const peersGrace = 15 * time.Second

// setupProxies makes what runs this node's L7 proxy.
func (a *agent) setupProxies() (err error) {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program, which is the L7 proxy, too: %w", err)
	}
	version, err := l7.BuildID()
	if err != nil {
		return err
	}
	c := a.cfg.Proxy
	a.proxies, err = newProxies(proxyConfig{
		dir: a.cfg.proxyDir(), agent: a.cfg.Socket, command: []string{program, "proxy"}, version: version,
		cgroup: c.Cgroup, accessLog: c.AccessLog, otlp: c.OTLPEndpoint,
	}, a.datapath.Proxy(), func() (bool, <-chan struct{}) {
		routes, changed := a.tables.Routes.AllWatch(a.tables.DB.ReadTxn())
		for range routes {
			return true, changed
		}
		return false, changed
	}, a.log)
	return err
}

func (a *agent) l7View() *l7View {
	return &l7View{
		proxies: a.proxies, fallbacks: a.datapath.Proxy().Fallbacks,
		routes: func() (routes []lb.Route) {
			for row := range a.tables.Routes.All(a.tables.DB.ReadTxn()) {
				routes = append(routes, row.Object)
			}
			return routes
		},
	}
}

// l7Feed returns what tells proxies the state.
func (a *agent) l7Feed(started time.Time) *l7Feed {
	return &l7Feed{
		tables: a.tables, self: l7Self(a.node), rtts: a.roundTrips,
		ready: func(knows bool) bool {
			for _, c := range a.channels.all() {
				whole := c.follower.State().Synced
				if knows {
					whole = a.isSynced(c.id)
				}
				if !whole && (c.local || time.Since(started) < peersGrace) {
					return false
				}
			}
			return true
		},
	}
}

// roundTrips to other clusters: on the way of pods' packets if that was measured, else that of gossip.
func (a *agent) roundTrips() map[string]time.Duration {
	rtts := map[string]time.Duration{}
	for row := range a.tables.Reaches.All(a.tables.DB.ReadTxn()) {
		if row.Object.RTT > 0 {
			rtts[row.Object.Cluster] = time.Duration(row.Object.RTT * float64(time.Millisecond))
		}
	}
	for cluster, rtt := range a.links.roundTrips() {
		rtts[cluster] = rtt
	}
	return rtts
}

// roundTrips returns the last ones that were measured to each peer.
func (ls *links) roundTrips() map[string]time.Duration {
	ls.mu.Lock()
	all := slices.Collect(maps.Keys(ls.links))
	ls.mu.Unlock()
	rtts := map[string]time.Duration{}
	for _, l := range all {
		if s := l.snapshot(); s.rtt > 0 {
			rtts[l.cluster] = s.rtt
		}
	}
	return rtts
}
