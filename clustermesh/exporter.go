package clustermesh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"causeway/identity"
	"causeway/kvstore"
)

// ExporterConfig says of which cluster what is in the tables is published, and where.
type ExporterConfig struct {
	// Cluster whose services and backends are published, and Node that this agent runs on.
	Cluster identity.ClusterInfo
	Node    string
	// Store of the cluster.
	Store  kvstore.Store
	Tables *Tables
	// Synced is closed when the tables have all of the cluster's services and backends: nothing is published, and least of all taken for gone, before.
	Synced <-chan struct{}
	// Tell hands news of slices to gossip while the store does not take them.
	Tell func(News)
	// Meanwhile is called while this agent is who publishes, for what one agent of the cluster does besides, and returns when its context ends; nil for nothing.
	Meanwhile func(context.Context)
	Log       *slog.Logger
}

// Exporter publishes the services and backends of a cluster of Kubernetes that are for other clusters: in the cluster's store, as services and slices that
// are the cluster's. Every agent has one, and one of them is elected to do it.
//
// The election is a key in the store that is written (election.go), since only there can a write be refused of who has been replaced without knowing: each
// write is on the condition that the key still is as when its writer was elected.
type Exporter struct {
	ExporterConfig
	election election
	// wake is told when something was observed.
	wake chan struct{}

	mu    sync.Mutex
	state ExporterState
	// seen is what the store was seen to be changed to while this agent leads, and nobody has looked at; relisted, that a listing may have hidden some.
	seen     []sighting
	relisted bool
	// news are the slices of which gossip has a newer version than the store, whoever told it: who publishes next writes them once more.
	news map[item]identity.Version
}

// ExporterState is how the publishing is, for status.
type ExporterState struct {
	// Leader is the node whose agent publishes; "" if there is none, or it is not known.
	Leader string
	// Self: that is this node.
	Self bool
	// Since when it does.
	Since time.Time
	// Keys that this agent keeps in the store; 0 if it does not lead.
	Keys int
	// LastError is why what should be published is not; "" while all is.
	LastError string
}

// NewExporter returns one that publishes nothing until Run.
func NewExporter(cfg ExporterConfig) *Exporter {
	return &Exporter{ExporterConfig: cfg, wake: make(chan struct{}, 1), news: map[item]identity.Version{}}
}

// State returns how the publishing is now.
func (e *Exporter) State() ExporterState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// Observe tells the exporter what the store says of what is published, so that it puts right what somebody else has changed: see FollowerConfig.Exported. It
// never blocks.
func (e *Exporter) Observe(batch kvstore.Batch) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.noteNews(batch)
	if !e.state.Self {
		return
	}
	e.relisted = e.relisted || batch.Listed
	for _, ev := range batch.Events {
		if it, ok := itemOf(e.Cluster.Name, ev.Key); ok {
			e.seen = append(e.seen, sighting{it, sightOf(ev.Kind == kvstore.EventPut, ev.Value)})
		}
	}
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// observed takes what was observed since the last call.
func (e *Exporter) observed() (seen []sighting, relisted bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	seen, relisted = e.seen, e.relisted
	e.seen, e.relisted = nil, false
	return seen, relisted
}

// Settled tells whether the store has what gossip was told of a slice, or something newer, so that gossip need not keep it.
func (e *Exporter) Settled(key string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	it, _ := itemOf(e.Cluster.Name, key)
	_, news := e.news[it]
	return !news
}

// maxNews bounds the slices that are remembered to be news. Of more the store gets what changes next.
const maxNews = 8192

// noteNews notes what gossip has that the store has not, and what the store has got. Only what the store says has a revision. Needs mu.
func (e *Exporter) noteNews(batch kvstore.Batch) {
	for _, ev := range batch.Events {
		it, ok := itemOf(e.Cluster.Name, ev.Key)
		if !ok || it.slice == "" {
			continue
		}
		v, _ := identity.VersionOf(ev.Value)
		switch {
		case batch.Revision == 0 && len(e.news) < maxNews:
			e.news[it] = v
		case batch.Revision != 0 && (ev.Kind == kvstore.EventDelete || !e.news[it].Newer(v)):
			delete(e.news, it)
		}
	}
}

// tell hands news of a slice to gossip, and notes that the store does not have them.
func (e *Exporter) tell(it item, n News) {
	e.mu.Lock()
	e.news[it] = n.Version
	e.mu.Unlock()
	e.Tell(n)
}

// settle notes that the store has what gossip has, or something newer.
func (e *Exporter) settle(it item) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.news, it)
}

// unsettled returns the slices of which gossip has something else than the store.
func (e *Exporter) unsettled() []item {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.news))
}

func (e *Exporter) setError(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state.LastError = ""
	if err != nil {
		e.state.LastError = err.Error()
	}
}

// errDeposed says that another agent publishes now, or may.
var errDeposed = errors.New("the store says that this node's agent does not publish the cluster's services any more")

// compareInterval is how often everything that is published is compared with what should be.
const compareInterval = 5 * time.Minute

// Pauses between two attempts to write: the first, doubled each time, up to the longest.
const (
	firstExportPause   = 50 * time.Millisecond
	longestExportPause = 2 * time.Second
)

// lead publishes until another agent does, or ctx ends.
func (e *Exporter) lead(ctx context.Context, held *kvstore.Held, term uint64, elections <-chan kvstore.Batch) error {
	x, err := newExport(e, held.Revision, term)
	if err != nil {
		return err
	}
	defer x.close()
	compare := time.NewTicker(compareInterval)
	defer compare.Stop()
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	pause, lost := firstExportPause, held.Lost
	for {
		changed, err := x.step(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errDeposed):
			return err
		case err != nil:
			retry.Reset(pause)
			pause = min(2*pause, longestExportPause)
		default:
			pause = firstExportPause
		}
		e.report(x, err)
		select {
		case <-changed[0]:
		case <-changed[1]:
		case <-e.wake:
		case <-retry.C:
		case <-compare.C:
			x.compared = false
		case batch, ok := <-elections:
			if !ok {
				return errElectionEnded
			}
			if e.election.see(batch); e.election.leader.revision != held.Revision {
				return errDeposed
			}
		case <-lost:
			if available(e.Store) == nil {
				return fmt.Errorf("%w: its lease is lost", errDeposed)
			}
			lost = nil // nobody else can be elected where the store is away for all, and who was is who tells gossip
		case <-ctx.Done():
			return nil
		}
	}
}

// report says how the publishing is.
func (e *Exporter) report(x *export, err error) {
	if err == nil {
		err = x.problem()
	}
	e.mu.Lock()
	e.state.Keys = len(x.stored)
	e.mu.Unlock()
	e.setError(err)
}
