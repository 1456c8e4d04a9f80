package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"

	"causeway/lb"
)

// Faults loses packets of the underlay. It is the test-bed's, and no part of a node.
// What it does is pinned and stays until cleared.
type Faults struct {
	objects  faultObjects
	faults   table[faultFaultKey, faultFault]
	paths    table[faultPathKey, faultPath]
	attacher attacher
}

// Flow says which packets a fault is about. Where a packet is of several, the worst counts.
type Flow struct {
	// From and To are addresses of the underlay; both invalid: every packet between any two.
	From netip.Addr `json:"from,omitzero"`
	To   netip.Addr `json:"to,omitzero"`
	// Protocol and Port narrow it to packets that go to the port or come from it; zero: all packets. They need From and To.
	Protocol lb.Protocol `json:"protocol,omitempty"`
	Port     uint16      `json:"port,omitempty"`
}

func (f Flow) String() string {
	if f == (Flow{}) {
		return "every packet"
	}
	s := fmt.Sprintf("%v -> %v", f.From, f.To)
	if f.Port != 0 {
		s += fmt.Sprintf(" port %d/%s", f.Port, f.Protocol)
	}
	return s
}

// Fault is a flow whose packets are lost.
type Fault struct {
	Flow
	// Percent of the packets, 0–100.
	Percent float64 `json:"percent"`
	// Lost counts the packets lost so far.
	Lost uint64 `json:"lost"`
}

// What an MTU may be, in bytes: every IPv4 link carries the smallest one (RFC 791), and no IPv4 packet exceeds the largest. IPv6
// wants 1280 (RFC 8200), but a path may lose whatever it likes.
const (
	MinMTU = 68
	MaxMTU = math.MaxUint16
)

// PathMTU is the way from one address of the underlay to another, which loses packets that are too large.
type PathMTU struct {
	From netip.Addr `json:"from"`
	To   netip.Addr `json:"to"`
	// MTU is the largest IP packet that is carried, in bytes.
	MTU int `json:"mtu"`
	// Lost counts the larger packets so far.
	Lost uint64 `json:"lost"`
}

// OpenFaults opens the faults pinned in pinDir, or starts without any. Several processes may have
// them open.
func OpenFaults(pinDir string) (*Faults, error) {
	f := &Faults{attacher: attacher{dir: filepath.Join(pinDir, "links"), mode: AttachTCX}}
	if err := makePinDir(f.attacher.dir); err != nil {
		return nil, err
	}
	spec, err := loadFault()
	if err != nil {
		return nil, err
	}
	if err := spec.LoadAndAssign(&f.objects, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: pinDir}}); err != nil {
		return nil, fmt.Errorf("loading the fault program with the maps in %s: %w", pinDir, err)
	}
	f.faults.m, f.paths.m = f.objects.Faults, f.objects.Paths
	return f, nil
}

// Close lets go of the faults, which stay.
func (f *Faults) Close() error { return f.objects.Close() }

// Attach makes packets that the device receives subject to the faults. The
// device is one of the calling thread's network namespace: a bridge port of the underlay.
func (f *Faults) Attach(ifindex int) error {
	return f.attacher.device("fault-"+strconv.Itoa(ifindex), ifindex, ingress, f.objects.Lose)
}

// SetLoss makes percent of a flow's packets get lost; 0 ends it.
func (f *Faults) SetLoss(flow Flow, percent float64) error {
	key, err := flow.key()
	if err != nil {
		return err
	}
	if !(percent >= 0 && percent <= 100) {
		return fmt.Errorf("loss of %v%% is not between 0 and 100", percent)
	}
	if percent == 0 {
		return f.faults.del(key)
	}
	return f.faults.put(key, faultFault{Loss: uint32(percent / 100 * math.MaxUint32)})
}

// SetMTU makes the packets from one address of the underlay to another get lost that are larger than so many bytes, the IP header
// included; 0 ends it. Nobody is told, as on the Internet where ICMP is filtered. Packets that are still to be cut into segments
// count by the size of these.
func (f *Faults) SetMTU(from, to netip.Addr, mtu int) error {
	if err := checkPair(from, to); err != nil {
		return fmt.Errorf("an MTU is %w", err)
	}
	key := faultPathKey{From: faultIpAddr(toIP(from)), To: faultIpAddr(toIP(to))}
	if mtu == 0 {
		return f.paths.del(key)
	}
	if mtu < MinMTU || mtu > MaxMTU {
		return fmt.Errorf("an MTU of %d bytes is not between %d and %d", mtu, MinMTU, MaxMTU)
	}
	return f.paths.put(key, faultPath{Mtu: uint32(mtu)})
}

// checkPair tells what is wrong about two addresses that packets should go between.
func checkPair(from, to netip.Addr) error {
	if !from.IsValid() || !to.IsValid() || from.Unmap().Is4() != to.Unmap().Is4() {
		return fmt.Errorf("between two addresses of one family, not %q and %q", from, to)
	}
	return nil
}

func (f Flow) key() (key faultFaultKey, err error) {
	if f == (Flow{}) {
		return key, nil
	}
	if err := checkPair(f.From, f.To); err != nil {
		return key, fmt.Errorf("faults are %w", err)
	}
	key.From, key.To = faultIpAddr(toIP(f.From)), faultIpAddr(toIP(f.To))
	if f.Port == 0 && f.Protocol == "" {
		return key, nil
	}
	if f.Port == 0 {
		return key, fmt.Errorf("a fault of %s alone needs a port", f.Protocol)
	}
	key.Port = toBE16(f.Port)
	key.Protocol, err = toProtocol(f.Protocol)
	return key, err
}

func (k faultFaultKey) flow() Flow {
	if k == (faultFaultKey{}) {
		return Flow{}
	}
	f := Flow{From: bpfIpAddr(k.From).addr(), To: bpfIpAddr(k.To).addr()}
	if k.Port != 0 {
		f.Port, f.Protocol = toBE16(k.Port), fromProtocol(k.Protocol)
	}
	return f
}

// Clear ends all faults, MTUs included.
func (f *Faults) Clear() error {
	var err error
	var keys []faultFaultKey
	for key := range f.faults.all(&err) {
		keys = append(keys, key)
	}
	errs := []error{err}
	for _, key := range keys {
		errs = append(errs, f.faults.del(key))
	}
	paths, err := f.ListMTUs()
	errs = append(errs, err)
	for _, p := range paths {
		errs = append(errs, f.SetMTU(p.From, p.To, 0))
	}
	return errors.Join(errs...)
}

// ListMTUs returns the paths that have an MTU, ordered by address.
func (f *Faults) ListMTUs() (list []PathMTU, err error) {
	for key, value := range f.paths.all(&err) {
		list = append(list, PathMTU{From: bpfIpAddr(key.From).addr(), To: bpfIpAddr(key.To).addr(), MTU: int(value.Mtu), Lost: value.Lost})
	}
	slices.SortFunc(list, func(a, b PathMTU) int { return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To)) })
	return list, err
}

// List returns the faults, ordered by address, protocol and port.
func (f *Faults) List() (list []Fault, err error) {
	for key, value := range f.faults.all(&err) {
		list = append(list, Fault{Flow: key.flow(), Percent: float64(value.Loss) / math.MaxUint32 * 100, Lost: value.Lost})
	}
	slices.SortFunc(list, func(a, b Fault) int {
		return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
	return list, err
}
