package tunnel

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"causeway/identity"
)

// smallMTU is the least MTU of a pod's packet, in bytes, that pods are told of: that of IPv6 (RFC 8200, section 5). Where even less gets through, the
// kernel cuts the outer packets, before WireGuard has them.
const smallMTU = 1280

// peer is a key of another node, and so a peer of each of this node's devices.
type peer struct {
	node   identity.NodeName
	remote uint8 // the key's slot at the node
	key    identity.WireGuardKey
	// address is the tunnel address, the one that the peer may send from.
	address netip.Addr
	// endpoint as the node's row has it; invalid if that has no address.
	endpoint netip.AddrPort
	// small is the size in bytes that the kernel has to cut outer packets to; zero: none that are sent are too large.
	small int
	// learned is where packets last came from, if that is not the endpoint.
	learned netip.AddrPort
}

// goesTo returns where to look for the peer.
func (p *peer) goesTo() netip.AddrPort {
	if p.learned.IsValid() {
		return p.learned
	}
	return p.endpoint
}

// same tells whether the kernel has the same for both.
func (p *peer) same(q *peer) bool {
	return p.remote == q.remote && p.key == q.key && p.address == q.address && p.endpoint == q.endpoint && p.small == q.small
}

// peers are the wanted ones. Each key and each tunnel address has one owner, the first that claimed it.
type peers struct {
	nodes     map[identity.NodeName]*peerNode
	byKey     map[identity.WireGuardKey]*peer
	byAddress map[netip.Addr]*peer
}

// peerNode is a node with at least one peer.
type peerNode struct {
	row   identity.Tunnel
	peers []*peer
}

func newPeers() *peers {
	return &peers{nodes: map[identity.NodeName]*peerNode{}, byKey: map[identity.WireGuardKey]*peer{}, byAddress: map[netip.Addr]*peer{}}
}

// own is what is this node's and can be nobody else's.
type own struct {
	keys      []identity.WireGuardKey
	addresses []netip.Addr
}

func (w *WireGuard) own() own {
	o := own{addresses: w.cfg.Tunnel[:]}
	for _, s := range w.inUse() {
		o.keys = append(o.keys, s.public)
	}
	return o
}

// difference is what a change of a node's row changes.
type difference struct {
	gone, added []*peer
	changed     []changedPeer // of the same key
}

type changedPeer struct{ old, new *peer }

func (d difference) empty() bool { return len(d.gone)+len(d.added)+len(d.changed) == 0 }

// set makes the keys of a row the node's peers, if its mode wants them, and returns what that changes. Keys that the node may
// not have are left out, and named in the error.
func (p *peers) set(t identity.Tunnel, own own) (difference, error) {
	want, err := p.wanted(t, own)
	name := t.NodeName()
	var d difference
	var old []*peer
	if n := p.nodes[name]; n != nil {
		old = n.peers
	}
	for _, o := range old {
		i := slices.IndexFunc(want, func(q *peer) bool { return q.key == o.key })
		switch {
		case i < 0:
			d.gone = append(d.gone, o)
		case want[i].same(o):
			want[i] = o
		default:
			if want[i].endpoint == o.endpoint {
				want[i].learned = o.learned
			}
			d.changed = append(d.changed, changedPeer{o, want[i]})
		}
		delete(p.byKey, o.key)
		delete(p.byAddress, o.address)
	}
	for _, q := range want {
		if !slices.ContainsFunc(old, func(o *peer) bool { return o.key == q.key }) {
			d.added = append(d.added, q)
		}
		p.byKey[q.key], p.byAddress[q.address] = q, q
	}
	if len(want) == 0 {
		delete(p.nodes, name)
	} else {
		p.nodes[name] = &peerNode{t, want}
	}
	return d, err
}

// wanted returns the peers that the row makes.
func (p *peers) wanted(t identity.Tunnel, own own) (list []*peer, err error) {
	if t.Mode != identity.TunnelWireGuard || t.Self {
		return nil, nil
	}
	var errs []error
	for _, k := range t.Keys {
		q := &peer{node: t.NodeName(), remote: k.Slot, key: k.Key, address: t.TunnelAddress(k.Slot).Unmap()}
		if t.Address.IsValid() && k.Port != 0 {
			q.endpoint = netip.AddrPortFrom(t.Address.Unmap(), k.Port)
		}
		if t.MTU > 0 && t.MTU < smallMTU && q.address.Is4() {
			q.small = t.MTU + OverheadIPv4
		}
		if err := p.mayHave(q, list, own); err != nil {
			errs = append(errs, err)
			continue
		}
		list = append(list, q)
	}
	return list, errors.Join(errs...)
}

// mayHave says why a peer is refused: a key or a tunnel address that is somebody else's.
func (p *peers) mayHave(q *peer, beside []*peer, own own) error {
	switch {
	case !q.address.IsValid():
		return fmt.Errorf("node %s has no tunnel address for slot %d: its first pod range is missing or too small", q.node, q.remote)
	case q.key == identity.WireGuardKey{}:
		return fmt.Errorf("node %s has a WireGuard key of zeros in slot %d", q.node, q.remote)
	case slices.Contains(own.keys, q.key):
		return fmt.Errorf("node %s claims this node's WireGuard key %s", q.node, q.key)
	case slices.Contains(own.addresses, q.address):
		return fmt.Errorf("node %s claims this node's tunnel address %s: their pod ranges overlap", q.node, q.address)
	}
	if o := p.byKey[q.key]; o != nil && o.node != q.node {
		return fmt.Errorf("node %s claims the WireGuard key %s, which is node %s's", q.node, q.key, o.node)
	}
	if o := p.byAddress[q.address]; o != nil && o.node != q.node {
		return fmt.Errorf("node %s claims the tunnel address %s, which is node %s's: their pod ranges overlap", q.node, q.address, o.node)
	}
	for _, o := range beside {
		if o.key == q.key || o.address == q.address {
			return fmt.Errorf("node %s has slot %d twice, or one WireGuard key in two slots", q.node, q.remote)
		}
	}
	return nil
}

// state returns what is kept for the next start.
func (p *peers) state() peersState {
	state := peersState{Endpoints: map[identity.WireGuardKey]netip.AddrPort{}}
	for _, name := range slices.SortedFunc(maps.Keys(p.nodes), compareNames) {
		n := p.nodes[name]
		row := n.row
		row.Why, row.Local, row.Remote = "", netip.Addr{}, netip.Addr{}
		state.Nodes = append(state.Nodes, row)
		for _, q := range n.peers {
			if q.learned.IsValid() {
				state.Endpoints[q.key] = q.learned
			}
		}
	}
	return state
}

func compareNames(a, b identity.NodeName) int {
	return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Node, b.Node))
}
