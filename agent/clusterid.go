package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"causeway/identity"
	"causeway/kvstore"
	"causeway/lb"
)

// clusterIDKey keeps the ID of a cluster whose configuration has none: a number from 1 to 255, as text.
const clusterIDKey = kvstore.PrivatePrefix + "cluster-id"

// ErrRenumbered says that the cluster has been assigned another ID, so that the agent has to begin anew: call Run again.
var ErrRenumbered = errors.New("the cluster has another ID now")

const (
	// idPause is the time between two questions to a store that does not say the cluster's ID, idPatience how long one that this
	// node remembers is asked for to be confirmed.
	idPause    = time.Second
	idPatience = 2 * time.Second
)

// findClusterID finds the cluster's ID if the configuration has none: as the store says, or as this node remembers it if the store is away, or as the first node
// chooses it by chance, so that two clusters which are joined later rarely have the same.
func (a *agent) findClusterID(ctx context.Context) error {
	if a.cfg.Cluster.ID != 0 {
		return nil
	}
	a.assigned = true
	remembered, err := os.ReadFile(a.clusterIDFile())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	known := err == nil
	for told := false; ; told = true {
		asking, cancel := context.WithTimeout(ctx, idPatience)
		stored, err := a.storedClusterID(asking)
		cancel()
		switch {
		case err == nil:
			return a.setClusterID(stored)
		case known:
			return a.setClusterID(string(remembered))
		case !told:
			a.log.Warn("the configuration has no cluster.id, and the store that keeps it does not answer yet", "error", err)
		}
		select {
		case <-time.After(idPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *agent) clusterIDFile() string { return filepath.Join(a.cfg.StateDir, "cluster-id") }

func parseClusterID(text string) (identity.ClusterID, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 8)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("the cluster's ID is kept as %.20q, which is none: want 1 to 255", strings.TrimSpace(text))
	}
	return identity.ClusterID(n), nil
}

// setClusterID takes an ID for the cluster's, and remembers it.
func (a *agent) setClusterID(text string) error {
	id, err := parseClusterID(text)
	if err != nil {
		return err
	}
	a.cfg.Cluster.ID, a.own().id = id, id
	return writeFile(a.clusterIDFile(), []byte(strconv.Itoa(int(id))+"\n"))
}

// storedClusterID returns what the store keeps for the purpose, or what the cluster has said of itself before that was kept; if there is neither, the ID is chosen now.
func (a *agent) storedClusterID(ctx context.Context) (string, error) {
	store := a.own().store
	entry, err := store.Get(ctx, clusterIDKey)
	if err == nil || !errors.Is(err, kvstore.ErrNotFound) {
		return string(entry.Value), err
	}
	chosen := strconv.Itoa(1 + rand.IntN(255))
	if said, err := store.Get(ctx, identity.ClusterKey); err == nil {
		info, err := identity.DecodeCluster(identity.ClusterKey, said.Value)
		if err != nil {
			return "", err
		}
		chosen = strconv.Itoa(int(info.ID))
	} else if !errors.Is(err, kvstore.ErrNotFound) {
		return "", err
	}
	if err := store.Create(ctx, clusterIDKey, []byte(chosen)); err == nil {
		return chosen, nil
	} else if !errors.Is(err, kvstore.ErrConflict) {
		return "", err
	}
	entry, err = store.Get(ctx, clusterIDKey)
	return string(entry.Value), err
}

// watchClusterID ends the agent when the cluster is assigned another ID.
func (a *agent) watchClusterID(ctx context.Context) error {
	if !a.assigned {
		return nil
	}
	for batch := range a.own().store.Watch(ctx, clusterIDKey) {
		for _, ev := range batch.Events {
			if ev.Kind == kvstore.EventDelete {
				continue
			}
			id, err := parseClusterID(string(ev.Value))
			if err != nil {
				a.log.Error("the cluster's ID stays as it is", "error", err)
				continue
			}
			if id != a.cfg.Cluster.ID {
				a.log.Warn("the cluster has another ID now: beginning anew with it", "before", a.cfg.Cluster.ID, "now", id)
				return errors.Join(writeFile(a.clusterIDFile(), ev.Value), ErrRenumbered)
			}
		}
	}
	return nil
}

// maxRenumberOps bounds the writes of one transaction (kvstore.Store.Txn), renumberTimeout all of them.
const (
	maxRenumberOps  = 100
	renumberTimeout = 10 * time.Second
)

// renumber assigns the cluster another ID. All of its agents begin anew with it, this one too. What has the ID in it and belongs to no node is written
// anew here: services; identities get other numbers when they are needed next.
func (a *agent) renumber(ctx context.Context, id identity.ClusterID) error {
	if peers := a.channels.names(); len(peers) > 0 {
		return fmt.Errorf("cluster ID %d cannot become %d while the cluster is connected with %s, which know it by that", a.cfg.Cluster.ID, id, strings.Join(peers, ", "))
	}
	store, name := a.own().store, a.cfg.Cluster.Name
	services, err := store.List(ctx, kvstore.Prefix+"services/"+name+"/")
	if err != nil {
		return err
	}
	identities, err := store.List(ctx, identity.IdentitiesPrefix(name))
	if err != nil {
		return err
	}
	var ops []kvstore.Op
	for _, e := range services {
		service, err := lb.DecodeService(e.Key, e.Value)
		if err != nil {
			continue // nobody takes it into account
		}
		service.ClusterID = uint8(id)
		ops = append(ops, kvstore.Op{Kind: kvstore.OpPut, Key: e.Key, Value: lb.EncodeService(service)})
	}
	for _, e := range identities {
		ops = append(ops, kvstore.Op{Kind: kvstore.OpDelete, Key: e.Key})
	}
	// This agent too ends as soon as it sees the ID, maybe before it has heard that it was written.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), renumberTimeout)
	defer cancel()
	// The ID comes last: what the agents find when they begin anew is of it.
	ops = append(ops, kvstore.Op{Kind: kvstore.OpPut, Key: clusterIDKey, Value: []byte(strconv.Itoa(int(id)))})
	for len(ops) > 0 {
		n := min(len(ops), maxRenumberOps)
		if err := store.Txn(ctx, nil, ops[:n]); err != nil {
			return fmt.Errorf("assigning cluster ID %d: %w", id, err)
		}
		ops = ops[n:]
	}
	return nil
}
