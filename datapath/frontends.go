package datapath

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"causeway/identity"
	"causeway/lb"
)

// FrontendMap holds the addresses and ports that sockets are translated from, and those that packets from outside of the cluster
// are. It shares its state with a TargetMap. Its methods are safe for concurrent use.
type FrontendMap struct{ b *balancer }

// Update makes connections to the frontend go to the targets of its port, in the order of its affinity, and with session
// affinity to the one that the client has had last; those to one that is balanced at L7 go to the node's proxy, as long as it listens, but for
// clients outside.
func (m *FrontendMap) Update(_ context.Context, f lb.Frontend) error {
	key, err := frontendKey(f.FrontendKey)
	if err != nil {
		return fmt.Errorf("frontend of %s: %w", f.Target, err)
	}
	affinity, err := toAffinity(f.Affinity)
	if err != nil {
		return fmt.Errorf("frontend of %s: %w", f.Target, err)
	}
	policy := bpfFrontend{Owner: f.ClusterID, Affinity: affinity, SessionSeconds: f.SessionAffinity}
	if f.L7 && f.Protocol == lb.TCP && !f.Outside {
		policy.Flags |= uint8(bpfFrontendFlagFRONTEND_L7)
	}
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	return m.b.setFrontend(key, policy, newPortID(f.Target))
}

// Delete ends the translation of new connections to the frontend.
func (m *FrontendMap) Delete(_ context.Context, f lb.Frontend) error {
	key, err := frontendKey(f.FrontendKey)
	if err != nil {
		return nil // It can't have been written.
	}
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	return m.b.deleteFrontend(key)
}

// Prune deletes the frontends that aren't desired, of clusters that have synced.
func (m *FrontendMap) Prune(_ context.Context, desired iter.Seq[lb.Frontend], synced func(identity.ClusterID) bool) error {
	keep := make(map[frontendID]bool)
	for f := range desired {
		if key, err := frontendKey(f.FrontendKey); err == nil {
			keep[key] = true
		}
	}
	m.b.mu.Lock()
	defer m.b.mu.Unlock()
	var errs []error
	for key, value := range m.b.frontends {
		if !keep[key] && synced(identity.ClusterID(value.Owner)) {
			errs = append(errs, m.b.deleteFrontend(key))
		}
	}
	return errors.Join(errs...)
}

func frontendKey(k lb.FrontendKey) (frontendID, error) {
	protocol, err := toProtocol(k.Protocol)
	if err != nil {
		return frontendID{}, err
	}
	if !k.Address.IsValid() || k.Port == 0 {
		return frontendID{}, fmt.Errorf("no valid address and port: %s, %d", k.Address, k.Port)
	}
	key := bpfFrontendKey{Address: toIP(k.Address), Port: toBE16(k.Port), Protocol: protocol, Cluster: addressSpace}
	return frontendID{key, k.Outside}, nil
}
