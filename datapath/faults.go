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
)

// Faults loses packets between underlay addresses. It is the test-bed's, and no part of a node.
// What it does is pinned and stays until cleared.
type Faults struct {
	objects  faultObjects
	faults   table[faultFaultKey, faultFault]
	attacher attacher
}

// Fault is a direction in which packets are lost.
type Fault struct {
	From netip.Addr `json:"from"`
	To   netip.Addr `json:"to"`
	// Percent of the packets, 0–100.
	Percent float64 `json:"percent"`
	// Lost counts the packets lost so far.
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
	f.faults.m = f.objects.Faults
	return f, nil
}

// Close lets go of the faults, which stay.
func (f *Faults) Close() error { return f.objects.Close() }

// Attach makes packets that the device receives subject to the faults. The
// device is one of the calling thread's network namespace: a bridge port of the underlay.
func (f *Faults) Attach(ifindex int) error {
	return f.attacher.device("fault-"+strconv.Itoa(ifindex), ifindex, ingress, f.objects.Lose)
}

// SetLoss makes percent of the packets from one address to another get lost; 0 ends it.
func (f *Faults) SetLoss(from, to netip.Addr, percent float64) error {
	if !from.Unmap().Is4() || !to.Unmap().Is4() {
		return fmt.Errorf("faults are between IPv4 addresses, not %q and %q", from, to)
	}
	if !(percent >= 0 && percent <= 100) {
		return fmt.Errorf("loss of %v%% is not between 0 and 100", percent)
	}
	key := faultFaultKey{From: faultIpAddr(toIP(from)), To: faultIpAddr(toIP(to))}
	if percent == 0 {
		return f.faults.del(key)
	}
	return f.faults.put(key, faultFault{Loss: uint32(percent / 100 * math.MaxUint32)})
}

// Clear ends all faults.
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
	return errors.Join(errs...)
}

// List returns the faults, ordered by address.
func (f *Faults) List() (list []Fault, err error) {
	for key, value := range f.faults.all(&err) {
		list = append(list, Fault{
			From: bpfIpAddr(key.From).addr(), To: bpfIpAddr(key.To).addr(),
			Percent: float64(value.Loss) / math.MaxUint32 * 100, Lost: value.Lost,
		})
	}
	slices.SortFunc(list, func(a, b Fault) int { return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To)) })
	return list, err
}
