package clustermesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// Keys of the election, for the cluster's own agents alone.
const (
	electionPrefix = kvstore.PrivatePrefix + "exporter/"
	// leaderKey says who publishes the cluster's services, and is there as long as that one has contact with the store.
	leaderKey = electionPrefix + "leader"
	// termKey says who did last, and stays: terms only grow.
	termKey = electionPrefix + "term"
)

const (
	// leaderTTL is how long the leader's key outlives contact with it. Gossip is quicker: who sees the leader's agent dead need not wait.
	leaderTTL = 15 * time.Second
	// campaignSpread is the time, for each node of the cluster, within which the agents become candidates, each at a moment of its own: the first is
	// elected before most of the others have asked. maxCampaignSpread bounds it.
	campaignSpread    = 2 * time.Millisecond
	maxCampaignSpread = 2 * time.Second
	// campaignPause is the time between two attempts of one agent, and how long one that was replaced leaves others the chance.
	campaignPause = 2 * time.Second
)

// errElectionEnded says that the store was closed.
var errElectionEnded = fmt.Errorf("following the election of who publishes the cluster's services: %w", kvstore.ErrClosed)

// leadership is the value of leaderKey, and of termKey.
type leadership struct {
	Node string `json:"node"`
	// Term is the incarnation of all that is written in it: Unix nanoseconds when it began, or more than the last one.
	Term  uint64    `json:"term"`
	Since time.Time `json:"since"`

	revision int64
}

func (l leadership) encode() []byte {
	value, err := json.Marshal(l)
	if err != nil {
		panic("clustermesh: a leadership does not marshal: " + err.Error())
	}
	return value
}

// decodeLeadership reads a leadership; of what can't be read there is no node, so nobody has to wait for it.
func decodeLeadership(e kvstore.Entry) leadership {
	l := leadership{}
	if err := lb.Unmarshal(e.Value, &l); err != nil {
		l = leadership{}
	}
	l.revision = e.Revision
	return l
}

// election is what an agent knows of it.
type election struct {
	known  bool
	leader leadership // its revision is 0 if there is none
	term   uint64     // the highest that was seen, even in a store that is lost
}

// see takes what has happened to the keys.
func (e *election) see(batch kvstore.Batch) {
	e.known = e.known || batch.Listed
	for _, ev := range batch.Events {
		l := leadership{}
		if ev.Kind == kvstore.EventPut {
			l = decodeLeadership(ev.Entry)
			e.term = max(e.term, l.Term)
		}
		// A late word of who led before this agent counts no more.
		if ev.Key == leaderKey && (batch.Listed || ev.Revision > e.leader.revision) {
			e.leader = l
		}
	}
}

// Run takes part in the election, and publishes while this agent is elected, until ctx ends.
func (e *Exporter) Run(ctx context.Context) error {
	elections := e.Store.Watch(ctx, electionPrefix)
	synced := e.Synced
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	candidate := false // the timer is set
	var notBefore time.Time
	for {
		open, changed := e.open()
		switch {
		case !open || synced != nil:
			timer.Stop()
			candidate = false
		case !candidate:
			timer.Reset(max(time.Until(notBefore), 0) + rand.N(e.spread()))
			candidate = true
		}
		e.showLeader()
		select {
		case batch, ok := <-elections:
			if !ok && ctx.Err() == nil {
				return errElectionEnded
			}
			e.election.see(batch)
		case <-synced:
			synced = nil
		case <-changed:
		case <-timer.C:
			held, term, err := e.campaign(ctx)
			if err == nil {
				err = e.serve(ctx, held, term, elections)
			}
			switch {
			case ctx.Err() != nil:
				return nil
			case errors.Is(err, errElectionEnded):
				return err
			case err != nil:
				e.setError(err)
			}
			candidate, notBefore = false, time.Now().Add(campaignPause)
		case <-ctx.Done():
			return nil
		}
	}
}

// open tells whether there is nobody who publishes the cluster's services, or nobody who still can: its node is dead or gone, or its agent is, or it is this
// agent's earlier life. Changed closes when that may be otherwise.
func (e *Exporter) open() (open bool, changed <-chan struct{}) {
	t, leader := e.Tables, e.election.leader
	row, _, changed, ok := t.Liveness.GetWatch(t.DB.ReadTxn(), t.Liveness.ByKey(identity.NodeName{Cluster: e.Cluster.Name, Node: leader.Node}.String()))
	switch {
	case !e.election.known:
		return false, changed
	case leader.revision == 0 || leader.Node == "" || leader.Node == e.Node:
		return true, changed
	case !ok:
		return false, changed
	}
	switch row.Object.State {
	case identity.NodeDead, identity.NodeLeft, identity.NodeAgentDown:
		return true, changed
	}
	return false, changed
}

// spread is the time within which this cluster's agents become candidates.
func (e *Exporter) spread() time.Duration {
	t := e.Tables
	nodes := 1
	for range t.Nodes.Prefix(t.DB.ReadTxn(), t.Nodes.ByKey(e.Cluster.Name+"/")) {
		nodes++
	}
	return min(time.Duration(nodes)*campaignSpread, maxCampaignSpread)
}

func (e *Exporter) showLeader() {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.election.leader
	e.state.Leader, e.state.Since = l.Node, l.Since
	if l.Node != "" && l.Node != e.Node {
		e.state.LastError = "" // it is the leader's to say
	}
}

// campaign tries to be elected, with a term that is later than all before.
func (e *Exporter) campaign(ctx context.Context) (held *kvstore.Held, term uint64, err error) {
	if err := available(e.Store); err != nil {
		return nil, 0, err
	}
	if err := e.checkStore(ctx); err != nil {
		return nil, 0, err
	}
	if old := e.election.leader; old.revision != 0 {
		err := e.Store.Txn(ctx, []kvstore.Condition{{Key: leaderKey, Revision: old.revision}}, []kvstore.Op{{Kind: kvstore.OpDelete, Key: leaderKey}})
		if err != nil {
			return nil, 0, err
		}
		e.Log.Info("who published the cluster's services can do so no more", "node", old.Node)
	}
	last, err := e.Store.Get(ctx, termKey)
	if err != nil && !errors.Is(err, kvstore.ErrNotFound) {
		return nil, 0, err
	}
	now := time.Now()
	l := leadership{Node: e.Node, Since: now.UTC(), Term: max(uint64(now.UnixNano()), e.election.term+1, decodeLeadership(last).Term+1)}
	if held, err = e.Store.Hold(ctx, leaderKey, l.encode(), leaderTTL); err != nil {
		return nil, 0, err
	}
	l.revision = held.Revision
	err = e.Store.Txn(ctx, []kvstore.Condition{{Key: leaderKey, Revision: held.Revision}, {Key: termKey, Revision: last.Revision}},
		[]kvstore.Op{{Kind: kvstore.OpPut, Key: termKey, Value: l.encode()}})
	if err != nil {
		return nil, 0, errors.Join(err, held.Release(ctx))
	}
	e.election.leader, e.election.term = l, l.Term
	return held, l.Term, nil
}

// serve publishes for as long as this agent is who does, and lets somebody else do so then.
func (e *Exporter) serve(ctx context.Context, held *kvstore.Held, term uint64, elections <-chan kvstore.Batch) error {
	e.setState(ExporterState{Leader: e.Node, Self: true, Since: e.election.leader.Since})
	e.Log.Info("this agent publishes the cluster's services", "term", term)
	leading, end := context.WithCancel(ctx)
	var besides sync.WaitGroup
	if e.Meanwhile != nil {
		besides.Go(func() { e.Meanwhile(leading) })
	}
	err := e.lead(ctx, held, term, elections)
	end()
	besides.Wait()
	e.setState(ExporterState{})
	e.Log.Info("this agent publishes the cluster's services no more", "reason", err)
	if e.election.leader.revision == held.Revision {
		e.election.leader = leadership{}
	}
	release, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := held.Release(release); err != nil {
		e.Log.Debug("who publishes next has to wait for this agent's lease to end", "error", err)
	}
	if errors.Is(err, errDeposed) {
		return nil
	}
	return err
}

// checkStore tells why nothing must be written into the store: it is not known to be this cluster's.
func (e *Exporter) checkStore(ctx context.Context) error {
	entry, err := e.Store.Get(ctx, identity.ClusterKey)
	if err != nil {
		return err
	}
	info, err := identity.DecodeCluster(identity.ClusterKey, entry.Value)
	if err != nil {
		return err
	}
	return identity.Channel{Cluster: e.Cluster.Name, ID: e.Cluster.ID}.CheckCluster(info)
}

func (e *Exporter) setState(s ExporterState) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state, e.seen, e.relisted = s, nil, false
}
