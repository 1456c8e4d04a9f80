package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/tunnel"
)

// setupEncryption makes WireGuard, before any store is read, so that sessions are there before it is known whom they are for. If this node does not
// encrypt, it removes what an earlier life of it has left.
func (a *agent) setupEncryption(ctx context.Context, mtu podMTUs) error {
	cfg, err := a.wireGuardConfig(mtu)
	if err != nil {
		return err
	}
	a.enc = newEncryption(a.tables, a.self(), a.cfg.Encryption.Mode, a.log)
	a.enc.mtu = mtu
	a.enc.every, _ = time.ParseDuration(a.cfg.Encryption.RotateEvery) // checked with the configuration
	a.enc.open = func(ctx context.Context) (wireGuard, error) {
		wg, err := tunnel.OpenWireGuard(ctx, cfg)
		if err != nil {
			return nil, err // not a nil *WireGuard in an interface
		}
		return wg, nil
	}
	a.enc.publish = func(ctx context.Context, keys []identity.TunnelKey) { a.local.SetTunnelKeys(ctx, keys) }
	a.enc.published, a.enc.opened = a.keysArePublished, a.pruneAll
	if a.cfg.Encryption.Mode == identity.EncryptOff {
		if err := tunnel.RemoveWireGuard(ctx, cfg); err != nil {
			return fmt.Errorf("encryption.mode is off, and what WireGuard has left cannot be removed: %w", err)
		}
		return nil
	}
	a.enc.Open(ctx)
	a.wireGuardStatus = a.enc.wireGuardStatus
	return nil
}

// wireGuardStatus reads WireGuard back.
func (e *encryption) wireGuardStatus() (tunnel.WireGuardStatus, error) {
	wg, _, missing := e.current()
	if wg == nil {
		return tunnel.WireGuardStatus{}, missing
	}
	return wg.Status()
}

// wireGuardConfig is what the configuration says of WireGuard.
func (a *agent) wireGuardConfig(mtu podMTUs) (tunnel.WireGuardConfig, error) {
	c, self := a.cfg.Encryption, a.self()
	program, err := os.Executable()
	if err != nil {
		return tunnel.WireGuardConfig{}, fmt.Errorf("finding this program, which runs WireGuard in user space: %w", err)
	}
	cfg := tunnel.WireGuardConfig{
		StateDir: filepath.Join(a.cfg.StateDir, "wireguard"), Node: a.cfg.Node.Address, Name: c.DeviceName, Kind: c.Kind, Cgroup: c.Cgroup,
		Command: []string{program, "wireguard"}, MTU: tunnel.WireGuardMTU(mtu.underlay, a.cfg.Node.Address), VXLANPort: a.cfg.Node.VXLANPort, Log: a.log, OnDevice: a.datapath.AttachWireGuard,
	}
	cfg.Keepalive, _ = time.ParseDuration(c.Keepalive) // checked with the configuration
	for slot := range uint8(identity.TunnelSlots) {
		cfg.Tunnel[slot], cfg.Ports[slot] = self.TunnelAddress(slot), c.Ports[slot]
	}
	return cfg, nil
}

// self is this node as far as the configuration has it.
func (a *agent) self() identity.Node {
	return identity.Node{
		Cluster: a.cfg.Cluster.Name, ClusterID: a.cfg.Cluster.ID, Name: a.cfg.Node.Name, Address: a.cfg.Node.Address, PodCIDRs: a.cfg.Node.PodCIDRs,
	}
}

// keysArePublished tells whether the store has this node's keys as they are, and has been read in full.
func (a *agent) keysArePublished() bool {
	if !a.isSynced(a.cfg.Cluster.ID) {
		return false
	}
	txn, t := a.tables.DB.ReadTxn(), a.tables
	node, _, known := t.Nodes.Get(txn, t.Nodes.ByKey(a.node.NodeName().String()))
	entry, _, there := t.Publications.Get(txn, t.Publications.ByKey(identity.NodeKey(a.node.Cluster, a.node.Name)))
	return known && there && entry.Status.Kind == clustermesh.Done && slices.Equal(node.Object.TunnelKeys, a.enc.keys())
}

// errOff says that there is no key to change.
var errOff = errors.New("this cluster does not encrypt (encryption.mode is off), so there is no key to change")

// rotate begins a change of this node's key, or joins one that goes on.
func (e *encryption) rotate(ctx context.Context) (identity.TunnelKey, bool, error) {
	if e.mode == identity.EncryptOff {
		return identity.TunnelKey{}, false, conflict("%w", errOff)
	}
	_, rotator, missing := e.current()
	if rotator == nil {
		return identity.TunnelKey{}, false, conflict("this node's WireGuard device is not there, so its key cannot be changed: %w", missing)
	}
	return rotator.Rotate(ctx)
}
