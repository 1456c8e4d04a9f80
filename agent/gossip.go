package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/cilium/statedb"
	"golang.org/x/sync/errgroup"

	"causeway/clustermesh"
	"causeway/clustermesh/gossip"
	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// life is what joins gossip to the tables: it is a channel like the stores, and the source of who is alive.
type life struct {
	tables   *clustermesh.Tables
	self     identity.NodeName
	gossip   *gossip.Gossip
	follower func(cluster string) *clustermesh.Follower
	// exporter publishes the cluster's slices; nil if they are no one's but nodes'.
	exporter *clustermesh.Exporter
	// drained is a file that is there while the node is drained, so that it stays so over restarts.
	drained string
	// complete gets a token when all that this node has is in the publications table.
	complete chan struct{}

	mu      sync.Mutex
	problem string // of writing the tables
}

// setupGossip makes this node's part in gossip.
func (a *agent) setupGossip() error {
	c := a.cfg.Gossip
	l := &life{
		tables: a.tables, self: a.node.NodeName(), exporter: a.exporter, drained: filepath.Join(a.cfg.StateDir, "drained"), complete: make(chan struct{}, 1),
		follower: func(cluster string) *clustermesh.Follower {
			if c := a.channels.get(cluster); c != nil {
				return c.follower
			}
			return nil
		},
	}
	_, err := os.Stat(l.drained)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	drained := err == nil
	echo, err := a.datapath.OpenEcho()
	if err != nil {
		return err
	}
	a.echo = echo
	a.links = newLinks(a.tables, a.node.NodeName(), echo, a.enc.mtu.between(a.enc.mode))
	a.links.narrowed = a.tunnels.setMTU
	l.gossip, err = gossip.New(gossip.Config{
		Self: l.self, Address: a.cfg.Node.Address, Port: c.Port, MeshPort: c.MeshPort, Mesh: c.Mesh, KeyFile: c.KeyFile,
		SigningKey: a.signingKey, Incarnation: a.node.Incarnation, Draining: drained,
		Echo: echo.Send, Deliver: l.deliver, Settled: l.settled, Known: l.known, Changed: l.changed,
		RingChanged: func(gossip.Ring) { wakeUp(a.ringChanged) },
		Refused:     func(cluster, key string, reason error) { a.refusals.Add(cluster, key, reason) }, Log: a.log.With("from", "gossip"),
	})
	a.life = l
	return err
}

// startGossip runs this node's part in gossip.
func (a *agent) startGossip(ctx context.Context, tasks *errgroup.Group) {
	a.problems = append(a.problems, a.life.problems)
	tasks.Go(func() error { return a.life.gossip.Run(ctx) })
	tasks.Go(func() error { return a.life.follow(ctx) })
	tasks.Go(func() error { return a.runEchoes(ctx) })
}

func publicKey(key ed25519.PrivateKey) []byte {
	return key.Public().(ed25519.PublicKey)
}

// loadSigningKey returns the key that this node signs its gossip with, made once and kept from everybody else.
func loadSigningKey(file string) (ed25519.PrivateKey, error) {
	seed, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		seed = make([]byte, ed25519.SeedSize)
		_, _ = rand.Read(seed) // never fails
		err = writeFile(file, seed)
	}
	if err != nil {
		return nil, fmt.Errorf("the key that this node signs with: %w", err)
	}
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("%s is damaged: it has %d bytes, not %d; remove it to have another one made", file, len(seed), ed25519.SeedSize)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// runEchoes hands over the echoes that come back.
func (a *agent) runEchoes(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = a.echo.Close() })
	defer stop()
	for answer := range a.echo.Answers() {
		if a.links.answered(answer) {
			continue
		}
		a.life.gossip.Answered(answer.Node, answer.Nonce, answer.At)
	}
	if ctx.Err() == nil {
		return errors.New("echoes of the data path cannot be read any more")
	}
	return nil
}

// follow tells gossip of the nodes in the stores, and of what this node publishes.
func (l *life) follow(ctx context.Context) error {
	txn := l.tables.DB.WriteTxn(l.tables.Publications)
	publications, err := l.tables.Publications.Changes(txn)
	if err != nil {
		txn.Abort()
		return err
	}
	txn.Commit()
	var seen statedb.Revision
	complete := false
	for {
		read := l.tables.DB.ReadTxn()
		rows, moreNodes := l.tables.Nodes.AllWatch(read)
		if revision := l.tables.Nodes.Revision(read); revision != seen {
			seen = revision
			var nodes []identity.Node
			for row := range rows {
				nodes = append(nodes, row.Object)
			}
			l.gossip.SetNodes(nodes)
		}
		changes, morePublications := publications.Next(read)
		for change := range changes {
			l.publish(change.Object.Object, change.Deleted)
		}
		if complete {
			l.gossip.Complete()
		}
		select {
		case <-moreNodes:
		case <-morePublications:
		case <-l.complete:
			complete = true
		case <-ctx.Done():
			return nil
		}
	}
}

// publish tells of an entry of this node's.
func (l *life) publish(p clustermesh.Publication, gone bool) {
	e, ok := entryOf(p)
	if !ok {
		return
	}
	e.Node, e.Withdrawn = l.self, gone
	if gone {
		e.Value = nil
	}
	l.gossip.Publish(e)
}

// tell tells of a slice that is the cluster's, which this node publishes.
func (l *life) tell(n clustermesh.News) {
	l.gossip.Publish(gossip.Entry{Node: l.self, Key: strings.TrimPrefix(n.Key, kvstore.Prefix), Version: n.Version, Withdrawn: n.Withdrawn, Value: n.Value})
}

// entryOf returns what gossip tells of a publication: only addresses and slices.
func entryOf(p clustermesh.Publication) (e gossip.Entry, ok bool) {
	key := strings.TrimPrefix(p.Key, kvstore.Prefix)
	if kind, _, _ := strings.Cut(key, "/"); kind != "addresses" && kind != "slices" || p.Value == "" {
		return e, false
	}
	e.Key, e.Value = key, []byte(p.Value)
	return e, lb.Unmarshal(e.Value, &e.Version) == nil
}

// deliver hands news to the follower of the cluster that it is of.
func (l *life) deliver(e gossip.Entry) {
	if f := l.follower(e.Node.Cluster); f != nil {
		f.Offer(clustermesh.News{Node: e.Node.Node, Key: kvstore.Prefix + e.Key, Version: e.Version, Withdrawn: e.Withdrawn, Value: e.Value})
	}
}

func (l *life) settled(e gossip.Entry) bool {
	if key := kvstore.Prefix + e.Key; e.Node == l.self && lb.OfClusterKey(key) {
		return l.exporter == nil || l.exporter.Settled(key)
	}
	if e.Node == l.self {
		row, _, ok := l.tables.Publications.Get(l.tables.DB.ReadTxn(), l.tables.Publications.ByKey(kvstore.Prefix+e.Key))
		return !ok || row.Status.Kind == clustermesh.Done
	}
	f := l.follower(e.Node.Cluster)
	return f == nil || f.Settled(kvstore.Prefix+e.Key)
}

func (l *life) known(e gossip.Entry) (known, gone bool) {
	if e.Node == l.self && lb.OfClusterKey(kvstore.Prefix+e.Key) {
		return true, false // if it is not so any more, that is for whoever publishes now to say
	}
	if e.Node == l.self {
		_, _, ok := l.tables.Publications.Get(l.tables.DB.ReadTxn(), l.tables.Publications.ByKey(kvstore.Prefix+e.Key))
		return ok, !ok
	}
	f := l.follower(e.Node.Cluster)
	if f == nil {
		return true, false // of a cluster that is not followed
	}
	return f.Known(kvstore.Prefix+e.Key, e.Version, e.Withdrawn)
}

// changed writes who is alive, and which clusters can be reached, into the tables.
func (l *life) changed(nodes []identity.Liveness, clusters []identity.Reach) {
	err := l.write(nodes, clusters)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problem = ""
	if err != nil {
		l.problem = "who is alive is not in force: " + err.Error()
	}
}

func (l *life) write(nodes []identity.Liveness, clusters []identity.Reach) error {
	t := l.tables
	txn := t.DB.WriteTxn(t.Liveness, t.Reaches)
	defer txn.Abort()
	if err := replace(txn, t.Liveness, nodes); err != nil {
		return err
	}
	if err := replace(txn, t.Reaches, clusters); err != nil {
		return err
	}
	txn.Commit()
	return nil
}

// replace makes a table hold these objects and no others.
func replace[T any](txn statedb.WriteTxn, table clustermesh.Table[T], objects []T) error {
	want := map[string]struct{}{}
	for _, o := range objects {
		want[table.Key(o)] = struct{}{}
		if _, err := clustermesh.Put(txn, table, o, func(a, b T) bool { return reflect.DeepEqual(a, b) }); err != nil {
			return err
		}
	}
	for row := range table.All(txn) {
		if _, ok := want[table.Key(row.Object)]; ok {
			continue
		}
		if _, _, err := table.Delete(txn, row); err != nil {
			return err
		}
	}
	return nil
}

// problems says what is wrong with gossip and with those that it watches.
func (l *life) problems() []string {
	problems := l.gossip.Overview().Problems
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.problem != "" {
		problems = append(problems, l.problem)
	}
	return problems
}

// drain takes this node's backends out of service everywhere, or back, and remembers it.
func (l *life) drain(on bool) (told int, err error) {
	if on {
		err = writeFile(l.drained, []byte(time.Now().UTC().Format(time.RFC3339)+"\n"))
	} else if err = os.Remove(l.drained); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return 0, fmt.Errorf("draining: %w", err)
	}
	return l.gossip.Drain(on), nil
}
