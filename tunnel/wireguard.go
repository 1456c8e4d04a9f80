package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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
	// VXLANPort is the UDP port of the packets that go through the devices; default DefaultPort.
	VXLANPort uint16
	// Command that runs a device in user space: this program with the arguments of its hidden command.
	Command []string
	// Cgroup that the process in user space is put into; empty: it stays in the agent's.
	Cgroup string
	// Keepalive is how often something is sent to each peer, so that a NAT in front of this node does not forget the way back;
	// zero, nothing is sent: right for nodes that the others reach at their address.
	Keepalive time.Duration
	// OnDevice is told of each device that is there or was made anew, before it is used: the data path attaches a program. It may be nil.
	OnDevice func(slot uint8, ifindex int) error
	Log      *slog.Logger
}

// WireGuard is the node's WireGuard: a device for each key, their peers, and the routes to tunnel addresses. It is the target of the
// tunnels table. Its methods are safe for concurrent use, and act on the network namespace of the thread that called OpenWireGuard.
// What it has set stays after Close, and goes on.
type WireGuard struct {
	cfg   WireGuardConfig
	log   *slog.Logger
	space *namespace
	links *netlink.Handle
	// kick wakes Run.
	kick chan struct{}

	// mu is held while the kernel is written or read.
	mu        sync.Mutex
	slots     [identity.TunnelSlots]*slot // nil: not in use
	preferred uint8
	peers     *peers
	// pruned is true when the stores have been read: what is not wanted then is nobody's.
	pruned  bool
	saved   *peersFile
	repairs map[string]uint64

	// view is what is answered without waiting for the kernel. Lock order: mu, then view's.
	view view
}

// view is the part of the state that readers get at any time.
type view struct {
	mu      sync.Mutex
	keys    []identity.TunnelKey
	shaken  map[pair]bool
	changed chan struct{}
}

// pair is a session's two ends.
type pair struct {
	node          identity.NodeName
	local, remote uint8
}

// check refuses a configuration that cannot work, before anything is made.
func (cfg *WireGuardConfig) check() error {
	if cfg.Name == "" {
		cfg.Name = DefaultWireGuardName
	}
	if cfg.Kind == "" {
		cfg.Kind = KindAuto
	}
	if cfg.VXLANPort == 0 {
		cfg.VXLANPort = DefaultPort
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if n := len(cfg.deviceName(0)); n >= unix.IFNAMSIZ {
		return fmt.Errorf("WireGuard device name %s has %d characters with the slot's number; Linux allows %d: shorten it", cfg.deviceName(0), n, unix.IFNAMSIZ-1)
	}
	if !slices.Contains([]string{KindAuto, KindKernel, KindUserspace}, cfg.Kind) {
		return fmt.Errorf("kind of WireGuard device %q is not one of %s, %s and %s", cfg.Kind, KindAuto, KindKernel, KindUserspace)
	}
	if cfg.StateDir == "" {
		return errors.New("WireGuard needs a directory for its keys, and none is configured")
	}
	if cfg.Keepalive < 0 || cfg.Keepalive > 0 && cfg.Keepalive < time.Second || cfg.Keepalive > 65535*time.Second {
		return fmt.Errorf("keepalive of %s: want 1s to 65535s, or 0 for none", cfg.Keepalive)
	}
	if cfg.Ports[0] == 0 || cfg.Ports[1] == 0 || cfg.Ports[0] == cfg.Ports[1] {
		return fmt.Errorf("WireGuard's UDP ports are %v: want two different ones", cfg.Ports)
	}
	if cfg.MTU < minMTU || cfg.MTU > 65535 {
		return fmt.Errorf("MTU of %d bytes for WireGuard devices: want %d to 65535; see the MTU of the underlay's link", cfg.MTU, minMTU)
	}
	for i, a := range cfg.Tunnel {
		if !a.IsValid() {
			return errors.New("the node has no tunnel address: its first pod range is missing or too small")
		}
		cfg.Tunnel[i] = a.Unmap()
	}
	return nil
}

// minMTU is the least MTU of a WireGuard device, in bytes: less than any path has that is in use.
const minMTU = 576

func (cfg *WireGuardConfig) deviceName(slot uint8) string { return fmt.Sprint(cfg.Name, slot) }

// OpenWireGuard makes the devices, or takes over those that are there, with the keys in the state directory (made if there are none) and the
// peers as last set, so that sessions are asked for before anything else is known. What may pass, or be repaired while the agent runs
// (a port that is taken, a process that does not start), is no error: it is among Status's problems, and tried again by Run,
// which is to be called at once.
func OpenWireGuard(ctx context.Context, cfg WireGuardConfig) (_ *WireGuard, err error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	w := &WireGuard{
		cfg: cfg, log: cfg.Log, kick: make(chan struct{}, 1), peers: newPeers(), repairs: map[string]uint64{},
		view: view{shaken: map[pair]bool{}, changed: make(chan struct{})},
	}
	if w.space, err = currentNamespace(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.letGo()
		}
	}()
	if w.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.loadSlots(); err != nil {
		return nil, err
	}
	w.loadPeers()
	for _, s := range w.inUse() {
		if err := w.bring(ctx, s, time.Now()); err != nil && errors.Is(err, errHopeless) {
			return nil, err
		}
	}
	w.step(ctx, time.Now())
	return w, nil
}

// loadSlots reads which slots are in use and their keys. A node without any gets a key in slot 0.
func (w *WireGuard) loadSlots() error {
	state, err := loadSlotState(w.cfg.StateDir, w.log)
	if err != nil {
		return err
	}
	for _, kept := range state.Slots {
		key, err := loadKey(keyFile(w.cfg.StateDir, kept.Slot))
		if err != nil {
			return err
		}
		w.slots[kept.Slot] = w.newSlot(kept.Slot, key, kept.Made)
	}
	w.preferred = state.Preferred
	if len(state.Slots) == 0 {
		key, err := makeKey(keyFile(w.cfg.StateDir, 0))
		if err != nil {
			return err
		}
		w.slots[0], w.preferred = w.newSlot(0, key, time.Now().UTC().Round(0)), 0
	}
	return w.keepSlots()
}

// keepSlots writes the slots to their file, and makes Keys tell them.
func (w *WireGuard) keepSlots() error {
	state := slotState{Preferred: w.preferred}
	var keys []identity.TunnelKey
	for _, s := range w.inUse() {
		state.Slots = append(state.Slots, keptSlot{Slot: s.number, Made: s.made})
		key := identity.TunnelKey{Slot: s.number, Key: s.public, Port: w.cfg.Ports[s.number]}
		if s.number == w.preferred {
			keys = slices.Insert(keys, 0, key)
		} else {
			keys = append(keys, key)
		}
	}
	if err := state.save(w.cfg.StateDir); err != nil {
		return err
	}
	w.view.mu.Lock()
	defer w.view.mu.Unlock()
	w.view.keys = keys
	w.view.tell()
	return nil
}

// inUse returns the slots that have a key.
func (w *WireGuard) inUse() (list []*slot) {
	for _, s := range w.slots {
		if s != nil {
			list = append(list, s)
		}
	}
	return list
}

// Close lets go of everything; devices, peers, routes and rules stay.
func (w *WireGuard) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.saved.flush(w.peers)
	w.letGo()
	return err
}

func (w *WireGuard) letGo() {
	for _, s := range w.inUse() {
		s.disconnect()
	}
	if w.links != nil {
		w.links.Close()
	}
	w.space.close()
}

// Keys returns the public keys of the slots that are in use, the preferred one first.
func (w *WireGuard) Keys() []identity.TunnelKey {
	w.view.mu.Lock()
	defer w.view.mu.Unlock()
	return slices.Clone(w.view.keys)
}

// Changed returns a channel that is closed when a peer's session came or went since; call it anew each time.
func (w *WireGuard) Changed() <-chan struct{} {
	w.view.mu.Lock()
	defer w.view.mu.Unlock()
	return w.view.changed
}

// Shaken tells whether there is a session between this node's slot and a node's slot, over which packets go. A session that has been idle
// is one: its first packet renews it.
func (w *WireGuard) Shaken(node identity.NodeName, local, remote uint8) bool {
	w.view.mu.Lock()
	defer w.view.mu.Unlock()
	return w.view.shaken[pair{node, local, remote}]
}

// set says whether a pair has a session.
func (v *view) set(p pair, shaken bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.shaken[p] == shaken {
		return
	}
	if shaken {
		v.shaken[p] = true
	} else {
		delete(v.shaken, p)
	}
	v.tell()
}

// tell wakes those who wait for Changed; v.mu is held.
func (v *view) tell() {
	close(v.changed)
	v.changed = make(chan struct{})
}
