package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"causeway/clustermesh"
	"causeway/clustermesh/peering"
	"causeway/kvstore"
)

// peers keeps the channels to other clusters in step with the records of peers in the own store. What the records say is
// kept in files too, so that an agent that starts while its store is away follows whom it followed before, and that
// etcd's own tools can be used with a peer's certificate.
type peers struct {
	*agent
	dir string // STATE/peers, a directory for each peer
	ctx context.Context
	// changed is called when who is a peer has changed.
	changed func()
}

// Files of a peer, beside each other.
const (
	peerRecordFile    = "record.json"
	peerAuthorityFile = "ca.crt"
	peerCertFile      = "client.crt"
	peerKeyFile       = "client.key"
)

// restore follows the peers that are in the files.
func (p *peers) restore() error {
	dirs, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("peers: %w", err)
	}
	var records []peering.Peer
	for _, d := range dirs {
		data, err := os.ReadFile(filepath.Join(p.dir, d.Name(), peerRecordFile))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was written or removed only in part; the store has it, if it is a peer
		}
		if err != nil {
			return fmt.Errorf("peers: %w", err)
		}
		record, err := peering.DecodePeer(peering.PeerKey(d.Name()), data)
		if err != nil {
			p.log.Warn("what was kept of a peer cannot be read; the store has it, if it is one", "peer", d.Name(), "error", err)
			continue
		}
		records = append(records, record)
	}
	p.apply(records)
	return nil
}

// restorePause is the time between two attempts to put back what the own store has lost.
const restorePause = 2 * time.Second

// Run follows the records until ctx ends, and then ends the channels.
func (p *peers) Run(ctx context.Context) error {
	warn := func(key string, err error) { p.refusals.Add(p.cfg.Cluster.Name, key, err) }
	lists := peering.WatchPeers(ctx, p.own().store, warn)
	again := time.NewTimer(0)
	<-again.C
	var lost []peering.Peer // what the store has to get back
	for open := true; open; {
		select {
		case records, more := <-lists:
			if open = more; !more {
				break
			}
			if records.Lost {
				lost = records.List
				again.Reset(0)
			}
			p.apply(records.List)
		case <-again.C:
			if err := p.peering.Restore(ctx, lost); err != nil {
				p.log.Warn("the own store was emptied, and does not have the peers again yet", "error", err)
				again.Reset(restorePause)
			}
		}
	}
	for _, c := range p.channels.ofPeers() {
		p.stop(c)
	}
	return nil
}

// apply brings the channels to what the records say.
func (p *peers) apply(records []peering.Peer) {
	wanted, left := map[string]peering.Peer{}, map[string]peering.Peer{}
	for _, record := range records {
		p.refusals.Clear(p.cfg.Cluster.Name, peering.PeerKey(record.Name()))
		if record.State == peering.Left {
			left[record.Name()] = record
		} else {
			wanted[record.Name()] = record
		}
	}
	for _, c := range p.channels.ofPeers() {
		record, ok := wanted[c.cluster]
		if !ok || record.Cluster.ID != c.id || anotherStore(c.peer(), record) {
			p.forget(c)
		}
	}
	for name, record := range wanted {
		if err := p.follow(record); err != nil {
			p.refusals.Add(name, peering.PeerKey(name), fmt.Errorf("the peer cannot be followed: %w", err))
		}
	}
	p.removeFiles(wanted)
	p.channels.setLeft(left)
	p.changed()
}

// anotherStore tells whether a peer's store is reached in another way now, or is another one.
func anotherStore(old, now peering.Peer) bool {
	return !slices.Equal(old.StoreEndpoints, now.StoreEndpoints) || old.Authority != now.Authority || old.User != now.User
}

// follow begins to follow a peer, or takes over what has changed in its record.
func (p *peers) follow(record peering.Peer) error {
	files, err := p.writeFiles(record)
	if err != nil {
		return err
	}
	if c := p.channels.get(record.Name()); c != nil {
		c.setPeer(record)
		return p.putRow(record)
	}
	store, err := kvstore.Dial(p.ctx, kvstore.Config{
		Endpoints: record.StoreEndpoints, CAFile: files(peerAuthorityFile), CertFile: files(peerCertFile), KeyFile: files(peerKeyFile),
		Quota: kvstore.Quota{Entries: p.cfg.Peering.Quota, Bytes: int64(p.cfg.Peering.Quota) * bytesPerEntry},
		Log:   p.log.With("store", record.Name()),
	})
	if err != nil {
		return err
	}
	c := &channel{cluster: record.Name(), id: record.Cluster.ID, store: store, record: record, done: make(chan struct{})}
	if err := p.putRow(record); err != nil {
		return errors.Join(err, store.Close())
	}
	c.follower = p.newFollower(p.ctx, c)
	c.link = p.links.open(c)
	var ctx context.Context
	ctx, c.end = context.WithCancel(p.ctx)
	p.channels.put(c)
	go func() {
		defer close(c.done)
		if err := c.follower.Run(ctx); err != nil {
			p.log.Error("a peer's store is not followed any more", "peer", c.cluster, "error", err)
		}
	}()
	p.refusals.Clear(record.Name(), peering.PeerKey(record.Name()))
	return nil
}

// bytesPerEntry bounds the memory of a peer's entries together with their number: entries of ours have 200 to 4000 bytes.
const bytesPerEntry = 2048

// putRow says in the tables who is a peer, ahead of all that is of it.
func (p *peers) putRow(record peering.Peer) error {
	txn := p.tables.DB.WriteTxn(p.tables.Peers)
	defer txn.Abort()
	row := clustermesh.Peer{Name: record.Name(), ID: record.Cluster.ID, Joining: record.State == peering.Joining}
	if _, err := clustermesh.Put(txn, p.tables.Peers, row, same); err != nil {
		return err
	}
	txn.Commit()
	return nil
}

// stop ends a channel; what came by it stays.
func (p *peers) stop(c *channel) {
	c.end()
	<-c.done
	p.links.close(c.link)
	if err := c.store.Close(); err != nil {
		p.log.Debug("a peer's store was not closed cleanly", "peer", c.cluster, "error", err)
	}
}

// forget ends a channel, and removes all that came by it: rows, and what follows from them in the kernel and in gossip.
func (p *peers) forget(c *channel) {
	p.stop(c)
	p.channels.remove(c.cluster)
	p.setPeersOfGossip() // first, so that nobody mourns the nodes that go now
	if err := clustermesh.Forget(p.tables, c.cluster); err != nil {
		p.log.Error("what is of a peer that is none any more stays in the tables", "peer", c.cluster, "error", err)
	}
	p.claims.Release(c.cluster)
	p.refusals.Forget(c.cluster)
	p.forgetSynced(c.id)
	p.log.Info("a cluster is followed no more", "cluster", c.cluster)
}

// file returns where something of a peer is kept.
func (p *peers) file(cluster, name string) string { return filepath.Join(p.dir, cluster, name) }

// writeFiles keeps what a record says, the secret parts for root alone, and returns where.
func (p *peers) writeFiles(record peering.Peer) (path func(file string) string, err error) {
	path = func(file string) string { return p.file(record.Name(), file) }
	if err := os.MkdirAll(filepath.Join(p.dir, record.Name()), 0o700); err != nil {
		return nil, err
	}
	// The record comes last: what it says can be used then.
	for _, f := range []struct{ name, text string }{
		{peerAuthorityFile, record.Authority}, {peerKeyFile, record.Key}, {peerCertFile, record.Cert},
		{peerRecordFile, string(peering.EncodePeer(record))},
	} {
		if old, err := os.ReadFile(path(f.name)); err == nil && string(old) == f.text {
			continue
		}
		if err := writeFile(path(f.name), []byte(f.text)); err != nil {
			return nil, err
		}
	}
	return path, nil
}

// removeFiles removes what is kept of clusters that are no peers.
func (p *peers) removeFiles(keep map[string]peering.Peer) {
	dirs, err := os.ReadDir(p.dir)
	if err != nil {
		return // there are none
	}
	for _, d := range dirs {
		if _, ok := keep[d.Name()]; ok || strings.HasPrefix(d.Name(), ".") {
			continue
		}
		if err := os.RemoveAll(filepath.Join(p.dir, d.Name())); err != nil {
			p.log.Warn("the certificate of a cluster that is no peer any more stays on disk", "cluster", d.Name(), "error", err)
		}
	}
}

// names of the peers that are followed.
func (c *channels) names() (names []string) {
	for _, ch := range c.ofPeers() {
		names = append(names, ch.cluster)
	}
	return names
}
