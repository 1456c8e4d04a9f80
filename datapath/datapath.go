package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"causeway/identity"
)

// layoutVersion counts up when a map changes in a way that its sizes don't
// show; see the map "layout" in bpf/maps.c.
const layoutVersion = 2

// Config of a node's data path.
type Config struct {
	// PinDir holds the pinned maps and links, on a bpf file system; it is made if
	// it doesn't exist. Each node has its own.
	PinDir string
	// CgroupPath is the cgroup v2 directory whose processes get service translation.
	CgroupPath string
	ClusterID  identity.ClusterID
	// NodeAddress is this node's address on the underlay.
	NodeAddress netip.Addr
	// PodSide is the address on the pods' side that echoes are sent from and answered at; invalid: none. No pod may have it.
	PodSide netip.Addr
	// PodSideOther is the one of the other family, of a node that has two pod ranges; invalid: none. This node's L7 proxy connects from both.
	PodSideOther netip.Addr
	// Tunnel are this node's tunnel addresses by slot, which VXLAN inside of WireGuard ends at; invalid ones: it has none.
	Tunnel [identity.TunnelSlots]netip.Addr
	// UnderlayIndex is the interface index of the link to the underlay, whose guard lets no VXLAN pass that should be encrypted, and by which clients
	// outside of the cluster come to node ports and external IPs; 0: no guard, and no such clients.
	UnderlayIndex int
	// VXLANIndex is the interface index of the tunnel device; see package tunnel.
	VXLANIndex int
	// VXLANPort is the UDP port of all VXLAN devices of the mesh; 0: 4789.
	VXLANPort uint16
	// PodMTU is the largest IP packet, in bytes, that fits into the tunnel; that of the way to a node may be less, never more.
	PodMTU int
	// Log may be nil.
	Log *slog.Logger
	// ForceClsact attaches as on kernels without tcx.
	ForceClsact bool
}

// Datapath is the loaded data path of a node.
type Datapath struct {
	*Maps
	log      *slog.Logger
	attacher attacher
	pod      podObjects
	overlay  overlayObjects
	socket   socketObjects
	guard    underlayObjects
	proxy    proxyObjects
	outside  outsideObjects

	wireguardMu sync.Mutex
	wireguard   [identity.TunnelSlots]wireguardObjects

	// node is this node's address, podSide that on the pods' side, tunnel the interface index of its tunnel device.
	node        netip.Addr
	podSide     netip.Addr
	tunnel      int
	podMTU      int
	echoAnswers *ebpf.Map

	tunnels   *TunnelMap
	addresses *AddressMap
	endpoints *EndpointMap
	balancer  *balancer
}

// Load loads the programs, with the pinned maps if there are any, and attaches them. Programs that a former
// agent attached are replaced without a gap. Network devices are those of the calling
// thread's network namespace.
func Load(cfg Config) (*Datapath, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	d := &Datapath{log: cfg.Log, attacher: attacher{dir: filepath.Join(cfg.PinDir, "links"), mode: AttachTCX}}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if cfg.ForceClsact {
		d.attacher.mode = AttachClsact
	}
	if err := makePinDir(d.attacher.dir); err != nil {
		return nil, err
	}
	if err := d.load(cfg); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (cfg *Config) validate() error {
	switch {
	case cfg.ClusterID == 0:
		return errors.New("the data path needs a cluster ID")
	case !cfg.NodeAddress.IsValid() || cfg.NodeAddress.IsUnspecified():
		return fmt.Errorf("the data path needs the node's address on the underlay, not %q", cfg.NodeAddress)
	case isUnspecified(cfg.PodSide) || isUnspecified(cfg.PodSideOther):
		return fmt.Errorf("the addresses on the pods' side can't be %s and %s", cfg.PodSide, cfg.PodSideOther)
	case cfg.UnderlayIndex < 0 || cfg.UnderlayIndex == cfg.VXLANIndex && cfg.VXLANIndex != 0:
		return fmt.Errorf("interface index %d is not that of the underlay's link", cfg.UnderlayIndex)
	case cfg.VXLANIndex <= 0:
		return errors.New("the data path needs the VXLAN device's interface index")
	case cfg.PodMTU < 576 || cfg.PodMTU > math.MaxUint16:
		return fmt.Errorf("pod MTU %d is not between the 576 bytes that every IPv4 host must take and %d", cfg.PodMTU, math.MaxUint16)
	}
	return nil
}

func isUnspecified(a netip.Addr) bool { return a.IsValid() && a.IsUnspecified() }

func (d *Datapath) load(cfg Config) error {
	maps, err := loadMaps(cfg.PinDir)
	if err != nil {
		return err
	}
	d.Maps = newMaps(maps)
	d.node, d.podSide = cfg.NodeAddress.Unmap(), cfg.PodSide.Unmap()
	d.tunnel, d.podMTU, d.echoAnswers = cfg.VXLANIndex, cfg.PodMTU, maps.EchoAnswers
	if d.balancer, err = newBalancer(d.Maps); err != nil {
		return fmt.Errorf("taking over the services of a former agent: %w", err)
	}
	d.tunnels = newTunnelMap(&d.Maps.nodes, d.node, cfg.PodMTU)
	d.addresses = &AddressMap{t: &d.Maps.addresses, node: d.node, owner: cfg.ClusterID}
	d.endpoints = &EndpointMap{t: &d.Maps.endpoints, owner: cfg.ClusterID, attach: d.attachPod, detach: d.detachPod}
	if err := d.loadPrograms(cfg, maps); err != nil {
		return err
	}
	return d.attachAll(cfg)
}

// loadMaps opens the pinned maps; those that aren't there are made.
func loadMaps(pinDir string) (*bpfMaps, error) {
	spec, err := loadBpf()
	if err != nil {
		return nil, err
	}
	var maps bpfMaps
	err = spec.LoadAndAssign(&maps, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: pinDir}})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return nil, errIncompatible(pinDir, err)
	}
	if err != nil {
		return nil, fmt.Errorf("making the maps in %s: %w", pinDir, err)
	}
	layout := table[uint32, uint32]{m: maps.Layout}
	version, _, err := layout.get(0)
	if err == nil && version != 0 && version != layoutVersion {
		err = errIncompatible(pinDir, fmt.Errorf("they have layout %d, this version has %d", version, layoutVersion))
	}
	if err == nil {
		err = layout.put(0, layoutVersion)
	}
	if err != nil {
		return nil, errors.Join(err, maps.Close())
	}
	return &maps, nil
}

func errIncompatible(pinDir string, err error) error {
	return fmt.Errorf("the maps pinned in %s are of another version of Causeway: drain the node, remove that directory and start the agent again; "+
		"the pods are cut off until it has synced: %w", pinDir, err)
}

func (d *Datapath) loadPrograms(cfg Config, maps *bpfMaps) error {
	variables := map[string]any{
		"node_address":   cfg.NodeAddress.As16(),
		"tunnel_ifindex": uint32(cfg.VXLANIndex), "underlay_ifindex": uint32(cfg.UnderlayIndex),
	}
	if cfg.PodSide.IsValid() {
		variables["pod_side_address"] = cfg.PodSide.As16()
	}
	if cfg.PodSideOther.IsValid() {
		variables["pod_side_other"] = cfg.PodSideOther.As16()
	}
	if err := errors.Join(d.loadGuard(cfg, maps), d.loadWireGuard(cfg, maps), d.loadOutside(cfg, variables, maps)); err != nil {
		return err
	}
	for _, p := range []struct {
		spec func() (*ebpf.CollectionSpec, error)
		into any
	}{{loadPod, &d.pod}, {loadOverlay, &d.overlay}, {loadSocket, &d.socket}, {loadProxy, &d.proxy}} {
		spec, err := p.spec()
		if err != nil {
			return err
		}
		if err := loadInto(p.into, spec, variables, maps); err != nil {
			return err
		}
	}
	return nil
}

// loadInto loads a program's object, with those of the variables that it has, and the given maps.
func loadInto(objects any, spec *ebpf.CollectionSpec, variables map[string]any, maps *bpfMaps) error {
	for name, value := range variables {
		if v := spec.Variables[name]; v != nil {
			if err := v.Set(value); err != nil {
				return fmt.Errorf("setting %s: %w", name, err)
			}
		}
	}
	replacements := map[string]*ebpf.Map{
		bpfMapAddresses: maps.Addresses, bpfMapEndpoints: maps.Endpoints, bpfMapNodes: maps.Nodes,
		bpfMapFrontends: maps.Frontends, bpfMapServices: maps.Services, bpfMapSlots: maps.Slots,
		bpfMapBackends: maps.Backends, bpfMapDrops: maps.Drops, bpfMapTranslations: maps.Translations,
		bpfMapSessions: maps.Sessions, bpfMapEchoAnswers: maps.EchoAnswers,
		bpfMapOutsideFrontends: maps.OutsideFrontends, bpfMapOutsideUsed: maps.OutsideUsed, bpfMapNat: maps.Nat,
		bpfMapL7Listeners: maps.L7Listeners, bpfMapL7Addresses: maps.L7Addresses, bpfMapL7Fallbacks: maps.L7Fallbacks,
	}
	for name := range replacements {
		if spec.Maps[name] == nil {
			delete(replacements, name)
		}
	}
	err := spec.LoadAndAssign(objects, &ebpf.CollectionOptions{MapReplacements: replacements})
	if verifier := (*ebpf.VerifierError)(nil); errors.As(err, &verifier) {
		return fmt.Errorf("the kernel refuses a program; Linux 6.1 or later is needed: %w", err)
	}
	if err != nil {
		return fmt.Errorf("loading the programs: %w", err)
	}
	return nil
}

func (d *Datapath) attachAll(cfg Config) error {
	if err := d.attachGuard(cfg); err != nil { // Before anything can be sent.
		return err
	}
	for _, a := range []struct {
		name string
		at   hook
		prog *ebpf.Program
	}{
		{"overlay-ingress", ingress, d.overlay.FromOverlay},
		{"overlay-egress", egress, d.overlay.ToOverlay},
	} {
		if err := d.attacher.device(a.name, cfg.VXLANIndex, a.at, a.prog); err != nil {
			return err
		}
	}
	if err := d.attacher.namespace("proxy", d.proxy.ToProxy); err != nil { // Before sockets leave connections to it.
		return err
	}
	for _, a := range []struct {
		name   string
		attach ebpf.AttachType
		prog   *ebpf.Program
	}{
		{"recvmsg4", ebpf.AttachCGroupUDP4Recvmsg, d.socket.Recvmsg4},
		{"recvmsg6", ebpf.AttachCGroupUDP6Recvmsg, d.socket.Recvmsg6},
		{"getpeername4", ebpf.AttachCgroupInet4GetPeername, d.socket.Getpeername4},
		{"getpeername6", ebpf.AttachCgroupInet6GetPeername, d.socket.Getpeername6},
		{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, d.socket.Sendmsg4},
		{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, d.socket.Sendmsg6},
		{"connect4", ebpf.AttachCGroupInet4Connect, d.socket.Connect4},
		{"connect6", ebpf.AttachCGroupInet6Connect, d.socket.Connect6},
	} {
		if err := d.attacher.cgroup(a.name, cfg.CgroupPath, a.attach, a.prog); err != nil {
			return err
		}
	}
	// The pods' program undoes what the one on the underlay's link does.
	return errors.Join(d.reattachPods(), d.attachOutside(cfg))
}

// Close lets go of everything; what is pinned stays and goes on forwarding.
func (d *Datapath) Close() error {
	var errs []error
	for _, c := range []interface{ Close() error }{&d.pod, &d.overlay, &d.socket, &d.guard, &d.proxy, &d.outside, &d.wireguard[0], &d.wireguard[1]} {
		errs = append(errs, c.Close())
	}
	if d.Maps != nil {
		errs = append(errs, d.Maps.Close())
	}
	return errors.Join(errs...)
}

// Attach tells how programs are attached: AttachTCX or AttachClsact.
func (d *Datapath) Attach() string { return d.attacher.mode }

// Addresses returns the map of addresses.
func (d *Datapath) Addresses() *AddressMap { return d.addresses }

// Endpoints returns the map of this node's pods.
func (d *Datapath) Endpoints() *EndpointMap { return d.endpoints }

// Frontends returns the map of services' addresses.
func (d *Datapath) Frontends() *FrontendMap { return &FrontendMap{d.balancer} }

// Targets returns the map of services' backends.
func (d *Datapath) Targets() *TargetMap { return &TargetMap{d.balancer} }

// makePinDir makes the directory, which must be on a bpf file system.
func makePinDir(dir string) error {
	parent := dir
	var st unix.Statfs_t
	err := unix.Statfs(parent, &st)
	for errors.Is(err, unix.ENOENT) && parent != filepath.Dir(parent) {
		parent = filepath.Dir(parent)
		err = unix.Statfs(parent, &st)
	}
	if err == nil && uint32(st.Type) != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s is not on a bpf file system: mount one first, as in \"mount -t bpf bpf /sys/fs/bpf\"", dir)
	}
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("making the directory %s for pinned maps: %w", dir, err)
	}
	return nil
}
