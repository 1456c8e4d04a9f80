package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"reflect"
	"time"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/lb"
	"causeway/lb/l7/state"
)

const (
	// feedLine is how many updates a line has at most, so that its reader can bound what it reads.
	feedLine = 1000
	// feedPatience is how long a proxy may take to read a line before it is cut off: it comes again, and gets the whole state.
	feedPatience = 10 * time.Second
	// feedReadyPause is the time between two looks whether the tables are whole, rttInterval between two looks at round trips.
	feedReadyPause = 20 * time.Millisecond
	rttInterval    = time.Second
	// ownRTT is taken for the round trip within this cluster.
	ownRTT = 100 * time.Microsecond
	// rttChange is the part by which a round trip has to change to be told again.
	rttChange = 0.2
)

// l7Feed tells proxies the desired state, as far as it concerns requests.
type l7Feed struct {
	tables *clustermesh.Tables
	self   state.Self
	// ready tells whether the tables are whole for a reader. One that goes on with what it knows must not be told by an agent which has just begun, or whose store
	// was emptied, that there is nothing; one that knows nothing yet is better off with what there is.
	ready func(knows bool) bool
	// rtts are the round trips to other clusters that are known.
	rtts func() map[string]time.Duration
}

// l7Self is what proxies are told of a node.
func l7Self(n identity.Node) state.Self {
	self := state.Self{Cluster: n.Cluster, Node: n.Name, Mark: identity.ProxyMark, HostIdentity: uint32(identity.Host)}
	for _, p := range n.PodCIDRs {
		one := identity.Node{PodCIDRs: []netip.Prefix{p}}
		if a := one.PodSide(); a.IsValid() {
			self.Sources = append(self.Sources, a)
		}
	}
	return self
}

// ServeHTTP streams updates until the reader goes, or reads too slowly.
func (f *l7Feed) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := http.NewResponseController(w)
	// Who asked and does not read holds nobody up at the end.
	defer context.AfterFunc(r.Context(), func() { _ = out.SetWriteDeadline(time.Now()) })()
	err := f.run(r.Context(), r.URL.Query().Has(state.Knows), func(updates []state.Update) error {
		for len(updates) > 0 {
			n := min(len(updates), feedLine)
			line, err := json.Marshal(updates[:n])
			if err != nil {
				return err
			}
			if err := out.SetWriteDeadline(time.Now().Add(feedPatience)); err != nil {
				return err
			}
			if _, err := w.Write(append(line, '\n')); err != nil {
				return err
			}
			updates = updates[n:]
		}
		return errors.Join(out.Flush(), out.SetWriteDeadline(time.Time{}))
	})
	if err != nil && r.Context().Err() == nil {
		panic(http.ErrAbortHandler) // so that the reader does not take it for an end
	}
}

// run sends the whole state and then what changes, until ctx ends or send fails.
func (f *l7Feed) run(ctx context.Context, knows bool, send func([]state.Update) error) error {
	c, err := f.follow()
	if err != nil {
		return err
	}
	defer c.close()
	first := []state.Update{{Reset: true}, {Self: &f.self}}
	for !f.ready(knows) {
		if len(first) > 0 { // The reader sees at once that there is an agent.
			if err := send(first); err != nil {
				return err
			}
			first = nil
		}
		select {
		case <-time.After(feedReadyPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	updates, more := c.next()
	updates = append(append(first, updates...), c.clusters(f.rtts())...)
	if err := send(append(updates, state.Update{Synced: true})); err != nil {
		return err
	}
	look := time.NewTicker(rttInterval)
	defer look.Stop()
	for {
		changed := statedb.NewWatchSet()
		changed.Add(more...)
		waited, cancel := context.WithCancel(ctx)
		woken := make(chan struct{})
		go func() {
			defer close(woken)
			_, _ = changed.Wait(waited, 0)
		}()
		select {
		case <-woken:
			updates, more = c.next()
		case <-look.C:
			updates = c.clusters(f.rtts())
		case <-ctx.Done():
		}
		cancel()
		<-woken
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if len(updates) > 0 {
			if err := send(updates); err != nil {
				return err
			}
		}
		updates = nil
	}
}

// l7Changes turns changes of tables into updates for one reader. It keeps what that reader has been told: rows also change when they get into the kernel, which is nothing to tell.
type l7Changes struct {
	feed      *l7Feed
	frontends statedb.ChangeIterator[*clustermesh.Row[lb.Frontend]]
	routes    statedb.ChangeIterator[*clustermesh.Row[lb.Route]]
	targets   statedb.ChangeIterator[*clustermesh.Row[lb.Target]]
	endpoints statedb.ChangeIterator[*clustermesh.Row[identity.Endpoint]]

	toldFrontends map[lb.FrontendKey]lb.Frontend
	toldRoutes    map[lb.PortKey]lb.Route
	toldTargets   map[lb.PortKey]map[lb.TargetKey]lb.Target // of each port that has a route
	toldClients   map[string]map[netip.Addr]state.Client    // by endpoint
	toldRTT       map[string]time.Duration
}

func (f *l7Feed) follow() (*l7Changes, error) {
	t := f.tables
	txn := t.DB.WriteTxn(t.Frontends, t.Routes, t.Targets, t.Endpoints)
	defer txn.Abort()
	c := &l7Changes{
		feed: f, toldFrontends: map[lb.FrontendKey]lb.Frontend{}, toldRoutes: map[lb.PortKey]lb.Route{},
		toldTargets: map[lb.PortKey]map[lb.TargetKey]lb.Target{}, toldClients: map[string]map[netip.Addr]state.Client{}, toldRTT: map[string]time.Duration{},
	}
	var errs [4]error
	c.frontends, errs[0] = t.Frontends.Changes(txn)
	c.routes, errs[1] = t.Routes.Changes(txn)
	c.targets, errs[2] = t.Targets.Changes(txn)
	c.endpoints, errs[3] = t.Endpoints.Changes(txn)
	if err := errors.Join(errs[:]...); err != nil {
		c.close()
		return nil, err
	}
	txn.Commit()
	return c, nil
}

func (c *l7Changes) close() {
	if c.frontends != nil {
		c.frontends.Close()
	}
	if c.routes != nil {
		c.routes.Close()
	}
	if c.targets != nil {
		c.targets.Close()
	}
	if c.endpoints != nil {
		c.endpoints.Close()
	}
}

// next returns what has changed, and channels of which one closes when more has.
func (c *l7Changes) next() (updates []state.Update, more []<-chan struct{}) {
	txn := c.feed.tables.DB.ReadTxn()
	tell := func(u state.Update) { updates = append(updates, u) }
	routes, m1 := c.routes.Next(txn)
	for change := range routes {
		c.route(txn, change.Object.Object, change.Deleted, tell)
	}
	targets, m2 := c.targets.Next(txn)
	for change := range targets {
		c.target(change.Object.Object, change.Deleted, tell)
	}
	frontends, m3 := c.frontends.Next(txn)
	for change := range frontends {
		c.frontend(change.Object.Object, change.Deleted, tell)
	}
	endpoints, m4 := c.endpoints.Next(txn)
	for change := range endpoints {
		c.endpoint(change.Object.Object, change.Deleted, tell)
	}
	return updates, []<-chan struct{}{m1, m2, m3, m4}
}

// route tells of a route; with a new one come the port's targets, which were of no interest before.
func (c *l7Changes) route(txn statedb.ReadTxn, r lb.Route, gone bool, tell func(state.Update)) {
	old, told := c.toldRoutes[r.Port]
	if gone {
		if told {
			for key := range c.toldTargets[r.Port] {
				tell(state.Update{TargetGone: &key})
			}
			delete(c.toldTargets, r.Port)
			delete(c.toldRoutes, r.Port)
			tell(state.Update{RouteGone: &r.Port})
		}
		return
	}
	if told && reflect.DeepEqual(old, r) {
		return
	}
	c.toldRoutes[r.Port] = r
	tell(state.Update{Route: &r})
	if told {
		return
	}
	c.toldTargets[r.Port] = map[lb.TargetKey]lb.Target{}
	for _, row := range c.feed.tables.TargetsOf(txn, r.Port.Service) {
		c.target(row.Object, false, tell)
	}
}

func (c *l7Changes) target(t lb.Target, gone bool, tell func(state.Update)) {
	ofPort, routed := c.toldTargets[t.Port]
	if !routed {
		return
	}
	old, told := ofPort[t.TargetKey]
	switch {
	case gone && told:
		delete(ofPort, t.TargetKey)
		tell(state.Update{TargetGone: &t.TargetKey})
	case !gone && (!told || old != t):
		ofPort[t.TargetKey] = t
		tell(state.Update{Target: &t})
	}
}

func (c *l7Changes) frontend(f lb.Frontend, gone bool, tell func(state.Update)) {
	old, told := c.toldFrontends[f.FrontendKey]
	switch {
	case (gone || !f.L7) && told:
		delete(c.toldFrontends, f.FrontendKey)
		tell(state.Update{FrontendGone: &f.FrontendKey})
	case !gone && f.L7 && (!told || old != f):
		c.toldFrontends[f.FrontendKey] = f
		tell(state.Update{Frontend: &f})
	}
}

func (c *l7Changes) endpoint(e identity.Endpoint, gone bool, tell func(state.Update)) {
	now := map[netip.Addr]state.Client{}
	if !gone {
		for _, a := range e.Addresses() {
			now[a] = state.Client{Address: a, Identity: uint32(e.Identity), Endpoint: e.ID()}
		}
	}
	before := c.toldClients[e.ID()]
	for a := range before {
		if _, still := now[a]; !still && !c.othersClient(e.ID(), a) {
			tell(state.Update{ClientGone: &a})
		}
	}
	for a, client := range now {
		if before[a] != client {
			tell(state.Update{Client: &client})
		}
	}
	if c.toldClients[e.ID()] = now; gone {
		delete(c.toldClients, e.ID())
	}
}

// othersClient tells whether an address has been given to another pod already: then that it was this one's is past.
func (c *l7Changes) othersClient(endpoint string, a netip.Addr) bool {
	for other, clients := range c.toldClients {
		if _, has := clients[a]; has && other != endpoint {
			return true
		}
	}
	return false
}

// clusters returns round trips that have changed enough to be told.
func (c *l7Changes) clusters(rtts map[string]time.Duration) (updates []state.Update) {
	tell := func(name string, rtt time.Duration) {
		old, told := c.toldRTT[name]
		if diff := (rtt - old).Abs(); told && float64(diff) <= rttChange*float64(old) {
			return
		}
		c.toldRTT[name] = rtt
		updates = append(updates, state.Update{Cluster: &state.Cluster{Name: name, RTT: rtt}})
	}
	tell(c.feed.self.Cluster, ownRTT)
	for name, rtt := range rtts {
		if name != c.feed.self.Cluster && rtt > 0 {
			tell(name, rtt)
		}
	}
	for name := range c.toldRTT {
		if _, known := rtts[name]; !known && name != c.feed.self.Cluster && c.toldRTT[name] != 0 {
			tell(name, 0)
		}
	}
	return updates
}
