package tunnel

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"net/netip"
	"time"

	"causeway/identity"
)

// Kinds of WireGuard devices, as configured.
const (
	KindAuto      = "auto" // the kernel's where it has WireGuard, in user space otherwise
	KindKernel    = "kernel"
	KindUserspace = "userspace" // golang.zx2c4.com/wireguard on a TUN, in a process of its own
)

// What a node's WireGuard devices have unless configured otherwise: the name less the slot's number, and the port of slot 0.
const (
	DefaultWireGuardName = "causeway-wg"
	DefaultWireGuardPort = 51871
)

// WireGuardConfig is what a node's WireGuard needs.
type WireGuardConfig struct {
	// StateDir keeps the private keys (0600), which slots are in use, and the peers as last set.
	StateDir string
	// Node is the node's address on the underlay.
	Node netip.Addr
	// Tunnel are this node's tunnel addresses, by slot; see identity.Node.TunnelAddress.
	Tunnel [identity.TunnelSlots]netip.Addr
	// Ports by slot.
	Ports [identity.TunnelSlots]uint16
	// Name of the devices, less the slot's number.
	Name string
	// Kind: KindAuto, KindKernel, KindUserspace.
	Kind string
	// MTU of the devices, in bytes: WireGuardMTU.
	MTU int
	// Command that runs a device in user space: this program with the arguments of its hidden command.
	Command []string
	// Cgroup that the process in user space is put into; empty: it stays in the agent's.
	Cgroup string
	// OnDevice is told of each device that is there or was made anew, before it is used: the data path attaches a program. It may be nil.
	OnDevice func(slot uint8, ifindex int) error
	Log      *slog.Logger
}

// WireGuard is the node's WireGuard: a device for each key, their peers, and the routes to tunnel addresses. It is the target of the
// tunnels table. Its methods are safe for concurrent use, and act on the network namespace of the thread that called OpenWireGuard.
// What it has set stays after Close, and goes on.
type WireGuard struct{}

// OpenWireGuard makes the devices, or takes over those that are there, with the keys in the state directory (made if there are none) and the
// peers as last set, so that sessions are asked for before anything else is known.
func OpenWireGuard(ctx context.Context, cfg WireGuardConfig) (*WireGuard, error) {
	return nil, errors.New("not there yet")
}

// Close lets go of everything; devices, peers, routes and rules stay.
func (w *WireGuard) Close() error { return nil }

// Keys returns the public keys of the slots that are in use, the preferred one first.
func (w *WireGuard) Keys() []identity.TunnelKey { return nil }

// Update makes the node's keys peers, with routes to its tunnel addresses, if its mode is wireguard; otherwise it removes them.
func (w *WireGuard) Update(context.Context, identity.Tunnel) error { return nil }

// Delete removes the node's peers and routes.
func (w *WireGuard) Delete(context.Context, identity.Tunnel) error { return nil }

// Prune removes the peers and routes of nodes that aren't desired, of clusters that have synced.
func (w *WireGuard) Prune(ctx context.Context, desired iter.Seq[identity.Tunnel], synced func(identity.ClusterID) bool) error {
	return nil
}

// Run repairs devices, rules and routes that somebody else has removed, asks peers for sessions that are wanted, and follows
// handshakes, until ctx ends.
func (w *WireGuard) Run(ctx context.Context) error { return nil }

// Changed returns a channel that is closed when a peer's session came or went since; call it anew each time.
func (w *WireGuard) Changed() <-chan struct{} { return nil }

// Shaken tells whether there is a session between this node's slot and a node's slot, over which packets go.
func (w *WireGuard) Shaken(node identity.NodeName, local, remote uint8) bool { return false }

// Begin makes a new key in the slot that is not in use, with a device and all peers, beside the old one; Keys has both then.
func (w *WireGuard) Begin(ctx context.Context) (identity.TunnelKey, error) {
	return identity.TunnelKey{}, errors.New("not there yet")
}

// Prefer makes a slot's key the preferred one.
func (w *WireGuard) Prefer(slot uint8) error { return nil }

// End removes a slot's key, device, peers, rule and routes.
func (w *WireGuard) End(ctx context.Context, slot uint8) error { return nil }

// Received returns how many bytes of packets a slot's device has received in all, so that one sees whether it is still in use.
func (w *WireGuard) Received(slot uint8) (uint64, error) { return 0, nil }

// Status reads the devices and peers back.
func (w *WireGuard) Status() (WireGuardStatus, error) { return WireGuardStatus{}, nil }

// RemoveWireGuard removes the node's devices, rules and routes and ends their processes, keys in the state directory too: for nodes that do not encrypt (any more).
func RemoveWireGuard(ctx context.Context, cfg WireGuardConfig) error { return nil }

// WireGuardStatus is WireGuard as it stands.
type WireGuardStatus struct {
	Devices []WireGuardDevice
	Peers   []WireGuardPeer
	// Problems that keep packets from flowing, a sentence each: a port that is taken, a process that does not start.
	Problems []string
	// Repairs counts what was repaired, by what: device, rule, route, peer, address.
	Repairs map[string]uint64
}

// WireGuardDevice is one slot's.
type WireGuardDevice struct {
	Slot    uint8
	Name    string
	Index   int
	Kind    string // kernel or userspace
	PID     int    // of the process in user space
	Key     identity.WireGuardKey
	Port    uint16
	Address netip.Addr // tunnel address
	MTU     int
	Made    time.Time // when the key was made
	// Dropped packets of the device, by the kernel's counters.
	DroppedReceive, DroppedTransmit uint64
}

// WireGuardPeer is a node's key at a slot's device.
type WireGuardPeer struct {
	Node      identity.NodeName
	Slot      uint8 // of this node
	Remote    uint8 // slot of the other
	Key       identity.WireGuardKey
	Endpoint  netip.AddrPort // where packets go; follows the node if it roams
	Handshake time.Time      // of the last handshake; zero: none yet
	// Received and Transmitted bytes.
	Received, Transmitted uint64
	Keepalive             time.Duration
	Shaken                bool
}
