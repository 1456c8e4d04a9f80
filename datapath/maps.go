package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"causeway/identity"
	"causeway/lb"
)

// Maps is a view of a node's maps as they are in the kernel; it writes nothing.
// Its methods are safe for concurrent use. A listing that runs while the agent
// writes may miss an entry or show it twice.
type Maps struct {
	addresses table[bpfAddressKey, bpfAddress]
	endpoints table[bpfEndpointKey, bpfEndpoint]
	nodes     table[bpfNodeKey, bpfNode]
	frontends table[bpfFrontendKey, bpfFrontend]
	services  table[uint32, bpfService]
	slots     table[bpfSlotKey, uint32]
	backends  table[uint32, bpfBackend]
	drops     *ebpf.Map
	// Of clients outside of the cluster: see bpf/lib/outside.h.
	outsideFrontends table[bpfFrontendKey, bpfFrontend]
	outsideUsed      table[uint32, uint32]
	// Of services that are balanced at L7: see bpf/lib/l7.h.
	l7Addresses table[bpfL7AddressKey, uint8]
	l7Listeners *ebpf.Map
	l7Fallbacks *ebpf.Map
	close       []*ebpf.Map
}

// OpenMaps opens the maps that an agent pinned in pinDir, read-only. The error wraps
// fs.ErrNotExist if there are none. Close them when done.
func OpenMaps(pinDir string) (*Maps, error) {
	var all bpfMaps
	opts := &ebpf.LoadPinOptions{ReadOnly: true}
	for name, m := range map[string]**ebpf.Map{
		bpfMapAddresses: &all.Addresses, bpfMapEndpoints: &all.Endpoints, bpfMapNodes: &all.Nodes,
		bpfMapFrontends: &all.Frontends, bpfMapServices: &all.Services, bpfMapSlots: &all.Slots,
		bpfMapBackends: &all.Backends, bpfMapDrops: &all.Drops, bpfMapOutsideFrontends: &all.OutsideFrontends,
	} {
		var err error
		if *m, err = ebpf.LoadPinnedMap(filepath.Join(pinDir, name), opts); err != nil {
			_ = all.Close()
			if errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("no map %q in %s: no agent has run with this directory since the node started: %w", name, pinDir, err)
			}
			return nil, fmt.Errorf("opening map %s in %s: %w", name, pinDir, err)
		}
	}
	return newMaps(&all), nil
}

func newMaps(all *bpfMaps) *Maps {
	m := &Maps{drops: all.Drops, l7Listeners: all.L7Listeners, l7Fallbacks: all.L7Fallbacks}
	m.l7Addresses.m = all.L7Addresses
	m.outsideFrontends.m, m.outsideUsed.m = all.OutsideFrontends, all.OutsideUsed
	m.addresses.m, m.endpoints.m, m.nodes.m = all.Addresses, all.Endpoints, all.Nodes
	m.frontends.m, m.services.m, m.slots.m, m.backends.m = all.Frontends, all.Services, all.Slots, all.Backends
	m.close = []*ebpf.Map{all.Addresses, all.Endpoints, all.Nodes, all.Frontends, all.Services, all.Slots,
		all.Backends, all.Drops, all.Layout, all.Translations, all.Sessions, all.EchoAnswers,
		all.L7Addresses, all.L7Listeners, all.L7Fallbacks, all.OutsideFrontends, all.OutsideUsed, all.Nat}
	return m
}

// Close lets go of the maps; the kernel keeps them.
func (m *Maps) Close() error {
	var errs []error
	for _, bm := range m.close {
		errs = append(errs, bm.Close())
	}
	return errors.Join(errs...)
}

// AddressEntry is an entry of the map that says who is behind an address, and where.
type AddressEntry struct {
	Prefix   netip.Prefix
	Identity identity.Number
	// Owner is the cluster that the entry is of.
	Owner identity.ClusterID
	// Tunnel is the node that has the prefix; invalid for one of this node's own, and for a blackhole.
	Tunnel netip.Addr
	// Blackhole: a range of the mesh in which nothing but longer prefixes can be reached.
	Blackhole bool
}

func newAddressEntry(k bpfAddressKey, v bpfAddress) AddressEntry {
	e := AddressEntry{Prefix: k.prefix(), Identity: identity.Number(v.Identity), Owner: identity.ClusterID(v.Owner)}
	switch bpfAddressKind(v.Kind) {
	case bpfAddressKindADDRESS_REMOTE:
		e.Tunnel = v.Tunnel.addr()
	case bpfAddressKindADDRESS_BLACKHOLE:
		e.Blackhole = true
	}
	return e
}

// LookupAddress returns the entry of exactly this prefix, if there is one.
func (m *Maps) LookupAddress(p netip.Prefix) (AddressEntry, bool, error) {
	key := toPrefixKey(p)
	value, ok, err := m.addresses.get(key)
	if err != nil || !ok || uint32(value.PrefixLen) != key.PrefixLen {
		return AddressEntry{}, false, err
	}
	return newAddressEntry(key, value), true, nil
}

// ListAddresses returns all address entries, ordered by prefix.
func (m *Maps) ListAddresses() (entries []AddressEntry, err error) {
	for k, v := range m.addresses.all(&err) {
		entries = append(entries, newAddressEntry(k, v))
	}
	slices.SortFunc(entries, func(a, b AddressEntry) int { return a.Prefix.Compare(b.Prefix) })
	return entries, err
}

// FrontendEntry is a service's address and port with the backends behind it.
type FrontendEntry struct {
	lb.FrontendKey
	// Service is the number that joins frontends and slots.
	Service  uint32
	Owner    identity.ClusterID
	Affinity lb.Affinity
	// L7: connections are the node's proxy's, as long as it listens.
	L7 bool
	// SessionAffinity is for how many seconds after its last connection a client gets the same backend; 0: not at all.
	SessionAffinity uint32
	// Backends are those that new connections choose from.
	Backends []BackendEntry
	// Quarantined backends get no new connections.
	Quarantined []BackendEntry
	// FailOpen: every backend is quarantined, so none is. Backends has all of them.
	FailOpen bool
}

// BackendEntry is a backend in its slot.
type BackendEntry struct {
	ID uint32
	// Local: in the group of this cluster's backends; Slot counts within the group.
	Local   bool
	Slot    uint32
	Address netip.AddrPort
	Owner   identity.ClusterID
}

// frontendsOf returns the map of the frontends for clients outside of the cluster, or for sockets on the node.
func (m *Maps) frontendsOf(outside bool) *table[bpfFrontendKey, bpfFrontend] {
	if outside {
		return &m.outsideFrontends
	}
	return &m.frontends
}

// ListFrontends returns all frontends, ordered by address, port and protocol, those of sockets before those of clients outside.
func (m *Maps) ListFrontends() (entries []FrontendEntry, err error) {
	for _, outside := range []bool{false, true} {
		for k, v := range m.frontendsOf(outside).all(&err) {
			entries = append(entries, FrontendEntry{
				FrontendKey: lb.FrontendKey{Address: k.Address.addr(), Port: toBE16(k.Port), Protocol: fromProtocol(k.Protocol), Outside: outside},
				Service:     v.Service, Owner: identity.ClusterID(v.Owner), Affinity: fromAffinity(v.Affinity), L7: v.l7(), SessionAffinity: v.SessionSeconds,
			})
		}
	}
	if err != nil {
		return nil, err
	}
	for i := range entries {
		if err := m.addBackends(&entries[i]); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(entries, func(a, b FrontendEntry) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	return entries, nil
}

// addBackends chooses as service_pick_slot in bpf/lib/services.h does.
func (m *Maps) addBackends(e *FrontendEntry) error {
	record, _, err := m.services.get(e.Service)
	if err != nil {
		return err
	}
	for group, count := range record.Count {
		active, err := m.listSlots(e.Service, group, 0, count)
		if err != nil {
			return err
		}
		quarantined, err := m.listSlots(e.Service, group, count, record.Quarantined[group])
		if err != nil {
			return err
		}
		e.Backends, e.Quarantined = append(e.Backends, active...), append(e.Quarantined, quarantined...)
	}
	if record.Count == [groups]uint32{} && len(e.Quarantined) > 0 {
		e.Backends, e.Quarantined, e.FailOpen = e.Quarantined, nil, true
	}
	return nil
}

// listSlots returns the backends of n slots from first.
func (m *Maps) listSlots(service uint32, group int, first, n uint32) (entries []BackendEntry, err error) {
	for i := range n {
		entry, ok, err := m.backendAt(slotKey(service, group, int(first+i)))
		if err != nil {
			return nil, err
		}
		if ok {
			entries = append(entries, entry)
		}
	}
	return entries, nil
}

func (m *Maps) backendAt(slot bpfSlotKey) (BackendEntry, bool, error) {
	id, ok, err := m.slots.get(slot)
	if err != nil || !ok {
		return BackendEntry{}, false, err
	}
	b, ok, err := m.backends.get(id)
	if err != nil || !ok {
		return BackendEntry{}, false, err
	}
	return BackendEntry{
		ID: id, Slot: slot.Index, Local: slot.Group == uint8(bpfBackendGroupGROUP_LOCAL),
		Address: netip.AddrPortFrom(b.Address.addr(), toBE16(b.Port)), Owner: identity.ClusterID(b.Owner),
	}, true, nil
}
