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
)

// clusterIDKey keeps the ID of a cluster whose configuration has none: a number from 1 to 255, as text.
const clusterIDKey = kvstore.PrivatePrefix + "cluster-id"

// idPause is the time between two questions to a store that does not say the cluster's ID.
const idPause = time.Second

// findClusterID finds the cluster's ID if the configuration has none: as this node remembers it, or as the store says, or as the first node chooses it by
// chance, so that two clusters which are joined later rarely have the same.
func (a *agent) findClusterID(ctx context.Context) error {
	if a.cfg.Cluster.ID != 0 {
		return nil
	}
	file := filepath.Join(a.cfg.StateDir, "cluster-id")
	text, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		return a.setClusterID(string(text))
	}
	for told := false; ; {
		stored, err := a.storedClusterID(ctx)
		if err == nil {
			if err := a.setClusterID(stored); err != nil {
				return err
			}
			return writeFile(file, []byte(stored+"\n"))
		}
		if !told {
			a.log.Warn("the configuration has no cluster.id, and the store that keeps it does not answer yet", "error", err)
			told = true
		}
		select {
		case <-time.After(idPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *agent) setClusterID(text string) error {
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 8)
	if err != nil || n == 0 {
		return fmt.Errorf("the cluster's ID is kept as %q, which is none: want 1 to 255", strings.TrimSpace(text))
	}
	a.cfg.Cluster.ID = identity.ClusterID(n)
	a.own().id = a.cfg.Cluster.ID
	return nil
}

// storedClusterID returns what the store says: what the cluster was told earlier, or what it keeps for the purpose, which is chosen now if need be.
func (a *agent) storedClusterID(ctx context.Context) (string, error) {
	store := a.own().store
	entry, err := store.Get(ctx, identity.ClusterKey)
	if err == nil {
		info, err := identity.DecodeCluster(identity.ClusterKey, entry.Value)
		return strconv.Itoa(int(info.ID)), err
	}
	if !errors.Is(err, kvstore.ErrNotFound) {
		return "", err
	}
	chosen := strconv.Itoa(1 + rand.IntN(255))
	if err := store.Create(ctx, clusterIDKey, []byte(chosen)); err == nil {
		return chosen, nil
	} else if !errors.Is(err, kvstore.ErrConflict) {
		return "", err
	}
	entry, err = store.Get(ctx, clusterIDKey)
	return string(entry.Value), err
}
