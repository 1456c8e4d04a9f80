package datapath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"causeway/identity"
	"causeway/lb"
)

// smallMaps are listed faster: the kernel looks into every bucket, of which there are as many as entries fit.
var smallMaps = map[string]uint32{"frontends": 64, "outside_frontends": 64, "services": 64, "slots": 128, "backends": 128}

// newTestMaps makes a node's maps without pinning them. The sizes are those of the maps named.
func newTestMaps(t testing.TB, sizes map[string]uint32) *Maps {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		if size, ok := sizes[name]; ok {
			m.MaxEntries = size
		}
	}
	var all bpfMaps
	if err := spec.LoadAndAssign(&all, nil); err != nil {
		t.Fatal(err)
	}
	m := newMaps(&all)
	t.Cleanup(func() { m.Close() })
	return m
}

func newTestBalancer(t testing.TB, m *Maps) (*FrontendMap, *TargetMap) {
	t.Helper()
	b, err := newBalancer(m)
	if err != nil {
		t.Fatal(err)
	}
	return &FrontendMap{b}, &TargetMap{b}
}

func testPort(n int) lb.PortKey {
	return lb.PortKey{Service: lb.Name{Namespace: "default", Name: fmt.Sprintf("svc%d", n)}, Port: "http", Protocol: lb.TCP}
}

func testFrontend(address, service int) lb.Frontend {
	return lb.Frontend{
		FrontendKey: lb.FrontendKey{Address: netip.AddrFrom4([4]byte{100, 64, 64, byte(address)}), Port: 80, Protocol: lb.TCP},
		Target:      testPort(service), ClusterID: 1, Affinity: lb.AffinityNone,
	}
}

func testTarget(service, n int, local bool) lb.Target {
	return lb.Target{
		TargetKey: lb.TargetKey{Port: testPort(service), Address: netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), Number: 8080},
		ClusterID: 1, Local: local,
	}
}

func writesOf(m *Maps) uint64 { return (&Datapath{Maps: m}).Writes() }

// quarantined returns the target as one that shall get no new connections.
func quarantined(t lb.Target) lb.Target {
	t.Quarantined = true
	return t
}

// TestChangeCostsTheSameInEveryService: a change is the same number of writes whether there are ten backends or ten thousand.
func TestChangeCostsTheSameInEveryService(t *testing.T) {
	for _, c := range []struct {
		name  string
		first int // so many of the backends are quarantined at first
		want  []uint64
	}{
		{"none is quarantined", 0, []uint64{3, 4, 4, 4, 3}},
		{"a third is quarantined", 3, []uint64{5, 6, 4, 4, 4}},
	} {
		for _, size := range []int{12, 1200, 9000} {
			m := newTestMaps(t, nil)
			frontends, targets := newTestBalancer(t, m)
			must(t, frontends.Update(t.Context(), testFrontend(1, 1)))
			for i := range size {
				target := testTarget(1, i, true)
				target.Quarantined = c.first > 0 && i%c.first == 0
				must(t, targets.Update(t.Context(), target))
			}
			var costs []uint64
			cost := func(change func(context.Context, lb.Target) error, target lb.Target) {
				before := writesOf(m)
				must(t, change(t.Context(), target))
				costs = append(costs, writesOf(m)-before)
			}
			cost(targets.Update, testTarget(1, size, true))
			cost(targets.Delete, testTarget(1, size/2+1, true))
			cost(targets.Update, quarantined(testTarget(1, size/3+1, true)))
			must(t, targets.Update(t.Context(), quarantined(testTarget(1, 2, true))))
			cost(targets.Update, testTarget(1, size/3+1, true))
			must(t, targets.Update(t.Context(), quarantined(testTarget(1, size/3+1, true))))
			cost(targets.Delete, testTarget(1, 2, true))
			if !slices.Equal(costs, c.want) {
				t.Errorf("%s, %d backends: adding, removing, quarantining, readmitting and removing a quarantined one cost %v writes, want %v",
					c.name, size, costs, c.want)
			}
		}
	}
}

// TestLoadBalancerAgainstModel does random things, restarts among them, and compares the kernel with what is wanted.
func TestLoadBalancerAgainstModel(t *testing.T) {
	const seed = 1
	random := rand.New(rand.NewPCG(seed, seed))
	m := newTestMaps(t, smallMaps)
	frontends, targets := newTestBalancer(t, m)
	wantFrontends := make(map[lb.FrontendKey]lb.Frontend)
	wantTargets := make(map[lb.TargetKey]lb.Target)
	for step := range 3000 {
		f := testFrontend(random.IntN(6), random.IntN(4))
		f.Port, f.L7, f.SessionAffinity = uint16(80+random.IntN(2)), random.IntN(2) == 0, uint32(random.IntN(2)*60)
		f.Target.NodeLocal = random.IntN(3) == 0
		if f.Outside = random.IntN(2) == 0; f.Outside {
			f.L7 = false
		}
		target := testTarget(random.IntN(4), random.IntN(12), random.IntN(2) == 0)
		target.Quarantined, target.Port.NodeLocal = random.IntN(2) == 0, random.IntN(3) == 0
		switch what := random.IntN(100); {
		case what < 15:
			must(t, frontends.Update(t.Context(), f))
			wantFrontends[f.FrontendKey] = f
		case what < 25:
			must(t, frontends.Delete(t.Context(), f))
			delete(wantFrontends, f.FrontendKey)
		case what < 70:
			must(t, targets.Update(t.Context(), target))
			wantTargets[target.TargetKey] = target
		case what < 97:
			must(t, targets.Delete(t.Context(), target))
			delete(wantTargets, target.TargetKey)
		default:
			before := writesOf(m)
			frontends, targets = newTestBalancer(t, m)
			for _, target := range wantTargets {
				must(t, targets.Update(t.Context(), target))
			}
			for _, f := range wantFrontends {
				must(t, frontends.Update(t.Context(), f))
			}
			if writesOf(m) != before {
				t.Errorf("step %d: the restart wrote to maps", step)
			}
		}
		if diff := compareLB(m, wantFrontends, wantTargets); diff != "" || t.Failed() {
			t.Fatalf("step %d of seed %d: %s", step, seed, diff)
		}
	}
	must(t, frontends.Prune(t.Context(), func(func(lb.Frontend) bool) {}, func(identity.ClusterID) bool { return true }))
	if left := entries(m); left != [4]int{} {
		t.Errorf("frontends, services, slots, backends: %v are left", left)
	}
	if diff := compareL7Addresses(m, nil); diff != "" {
		t.Error(diff)
	}
}

// compareLB returns the first difference between the kernel and what is wanted.
func compareLB(m *Maps, frontends map[lb.FrontendKey]lb.Frontend, targets map[lb.TargetKey]lb.Target) string {
	if diff := compareFrontends(m, frontends, targets); diff != "" {
		return diff
	}
	inUse := make(map[lb.PortKey]bool)
	for _, f := range frontends {
		inUse[f.Target] = true
	}
	backends := 0
	for _, t := range targets {
		if inUse[t.Port] {
			backends++
		}
	}
	if got, want := entries(m), [4]int{len(frontends), len(inUse), backends, backends}; got != want {
		return fmt.Sprintf("frontends, services, slots, backends: there are %v, want %v", got, want)
	}
	return ""
}

// compareFrontends compares what connections find.
func compareFrontends(m *Maps, frontends map[lb.FrontendKey]lb.Frontend, targets map[lb.TargetKey]lb.Target) string {
	have, err := m.ListFrontends()
	if err != nil {
		return err.Error()
	}
	if len(have) != len(frontends) {
		return fmt.Sprintf("there are %d frontends, want %d", len(have), len(frontends))
	}
	for _, f := range have {
		if f.L7 != frontends[f.FrontendKey].L7 {
			return fmt.Sprintf("%s port %d is balanced at L7: %v", f.Address, f.Port, f.L7)
		}
		if want := frontends[f.FrontendKey].SessionAffinity; f.SessionAffinity != want {
			return fmt.Sprintf("%s port %d has a session affinity of %d s, want %d", f.Address, f.Port, f.SessionAffinity, want)
		}
		if diff := compareBackends(f, frontends[f.FrontendKey].Target, targets); diff != "" {
			return diff
		}
	}
	return compareL7Addresses(m, frontends)
}

// compareL7Addresses compares which addresses are the proxy's.
func compareL7Addresses(m *Maps, frontends map[lb.FrontendKey]lb.Frontend) string {
	want := make(map[bpfL7AddressKey]bool)
	for key, f := range frontends {
		if f.L7 {
			want[bpfL7AddressKey{Address: toIP(key.Address), Cluster: addressSpace}] = true
		}
	}
	var err error
	have := make(map[bpfL7AddressKey]bool)
	for key := range m.l7Addresses.all(&err) {
		have[key] = true
	}
	if err != nil {
		return err.Error()
	}
	if !maps.Equal(have, want) {
		return fmt.Sprintf("the proxy has the addresses %v, want %v", have, want)
	}
	return ""
}

func compareBackends(f FrontendEntry, port lb.PortKey, targets map[lb.TargetKey]lb.Target) string {
	var active, inQuarantine []string
	for _, t := range targets {
		if t.Port != port {
			continue
		}
		if name := fmt.Sprint(netip.AddrPortFrom(t.Address, t.Number), t.Local); t.Quarantined {
			inQuarantine = append(inQuarantine, name)
		} else {
			active = append(active, name)
		}
	}
	failOpen := len(active) == 0 && len(inQuarantine) > 0
	if failOpen {
		active, inQuarantine = inQuarantine, nil
	}
	for _, c := range []struct {
		kind string
		got  []BackendEntry
		want []string
	}{{"active", f.Backends, active}, {"quarantined", f.Quarantined, inQuarantine}} {
		var got []string
		for _, b := range c.got {
			got = append(got, fmt.Sprint(b.Address, b.Local))
		}
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			return fmt.Sprintf("%s has as %s\n%s, want\n%s", f.Address, c.kind, strings.Join(got, " "), strings.Join(c.want, " "))
		}
	}
	if f.FailOpen != failOpen {
		return fmt.Sprintf("%s fails open: %v, want %v", f.Address, f.FailOpen, failOpen)
	}
	return ""
}

// entries counts frontends, services, slots, backends.
func entries(m *Maps) (n [4]int) {
	var err error
	for _, outside := range []bool{false, true} {
		for range m.frontendsOf(outside).all(&err) {
			n[0]++
		}
	}
	for range m.services.all(&err) {
		n[1]++
	}
	for range m.slots.all(&err) {
		n[2]++
	}
	for range m.backends.all(&err) {
		n[3]++
	}
	return n
}

// TestRestoreFinishesWhatWasHalfDone: an agent may die between any two writes.
func TestRestoreFinishesWhatWasHalfDone(t *testing.T) {
	slot := func(i int) bpfSlotKey { return slotKey(1, 0, i) }
	for name, c := range map[string]struct {
		crash func(*Maps) error
		want  []int // targets that are left
	}{
		"backend in no slot":          {func(m *Maps) error { return m.backends.put(9, bpfBackend{Port: 1}) }, []int{0, 1, 2}},
		"slot not counted in":         {func(m *Maps) error { return putBoth(m, slot(3), 9) }, []int{0, 1, 2}},
		"hole filled, not counted":    {func(m *Maps) error { return m.slots.put(slot(0), 3) }, []int{1, 2}},
		"counted out, slot not freed": {func(m *Maps) error { return m.services.put(1, countOf(m, 2)) }, []int{0, 1}},
		"slot freed, backend not":     {func(m *Maps) error { return errors.Join(m.services.put(1, countOf(m, 2)), m.slots.del(slot(2))) }, []int{0, 1}},
		"service without a frontend": {func(m *Maps) error {
			return errors.Join(m.services.put(7, bpfService{PortId: 7}), putBoth(m, slotKey(7, 0, 0), 9))
		}, []int{0, 1, 2}},
		"slots of a service that was": {func(m *Maps) error { return putBoth(m, slotKey(7, 0, 0), 9) }, []int{0, 1, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newTestMaps(t, nil)
			frontends, targets := newTestBalancer(t, m)
			must(t, frontends.Update(t.Context(), testFrontend(1, 1)))
			wantFrontends := map[lb.FrontendKey]lb.Frontend{testFrontend(1, 1).FrontendKey: testFrontend(1, 1)}
			left, all := make(map[lb.TargetKey]lb.Target), make(map[lb.TargetKey]lb.Target)
			for i := range 3 {
				target := testTarget(1, i, true)
				must(t, targets.Update(t.Context(), target))
				all[target.TargetKey] = target
				if slices.Contains(c.want, i) {
					left[target.TargetKey] = target
				}
			}
			must(t, c.crash(m))
			_, targets = newTestBalancer(t, m)
			if diff := compareLB(m, wantFrontends, left); diff != "" {
				t.Error("after restoring: " + diff)
			}
			for target := range maps.Values(all) {
				must(t, targets.Update(t.Context(), target))
			}
			if diff := compareLB(m, wantFrontends, all); diff != "" {
				t.Error("after being told again: " + diff)
			}
		})
	}
}

func putBoth(m *Maps, slot bpfSlotKey, id uint32) error {
	return errors.Join(m.backends.put(id, bpfBackend{Port: 1}), m.slots.put(slot, id))
}

func countOf(m *Maps, n uint32) bpfService {
	record, _, _ := m.services.get(1)
	record.Count[0] = n
	return record
}

// TestFullMap: what doesn't fit is refused with a reason, disturbs nothing, and fits once there is room.
func TestFullMap(t *testing.T) {
	for name, size := range map[string]uint32{"slots": 2, "backends": 2} {
		t.Run(name, func(t *testing.T) {
			m := newTestMaps(t, map[string]uint32{name: size})
			frontends, targets := newTestBalancer(t, m)
			must(t, frontends.Update(t.Context(), testFrontend(1, 1)))
			for i := range 2 {
				must(t, targets.Update(t.Context(), testTarget(1, i, true)))
			}
			err := targets.Update(t.Context(), testTarget(1, 2, true))
			if err == nil || !strings.Contains(err.Error(), "full with 2 entries") {
				t.Errorf("error is %v", err)
			}
			if got := entries(m); got != [4]int{1, 1, 2, 2} {
				t.Errorf("frontends, services, slots, backends: there are %v", got)
			}
			must(t, targets.Delete(t.Context(), testTarget(1, 0, true)))
			must(t, targets.Update(t.Context(), testTarget(1, 2, true)))
			if got := entries(m); got != [4]int{1, 1, 2, 2} {
				t.Errorf("frontends, services, slots, backends: there are %v", got)
			}
		})
	}
}

func TestBadRowsAreRefused(t *testing.T) {
	m := newTestMaps(t, nil)
	frontends, targets := newTestBalancer(t, m)
	f := testFrontend(1, 1)
	f.Affinity = "nearest"
	if err := frontends.Update(t.Context(), f); err == nil {
		t.Error("an unknown affinity was accepted")
	}
	f = testFrontend(1, 1)
	f.Protocol = "SCTP"
	if err := frontends.Update(t.Context(), f); err == nil {
		t.Error("an unknown protocol was accepted")
	}
	target := testTarget(1, 1, true)
	target.Number = 0
	if err := targets.Update(t.Context(), target); err == nil {
		t.Error("a target without a port was accepted")
	}
	if got := entries(m); got != [4]int{} {
		t.Errorf("frontends, services, slots, backends: there are %v", got)
	}
}

// BenchmarkBackendChange adds a backend to a service of the given size and removes it.
func BenchmarkBackendChange(b *testing.B) {
	for _, size := range []int{10, 1000, 50000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			m := newTestMaps(b, nil)
			frontends, targets := newTestBalancer(b, m)
			must(b, frontends.Update(b.Context(), testFrontend(1, 1)))
			for i := range size {
				must(b, targets.Update(b.Context(), testTarget(1, i, true)))
			}
			one := testTarget(1, size, true)
			for b.Loop() {
				must(b, targets.Update(b.Context(), one))
				must(b, targets.Delete(b.Context(), one))
			}
		})
	}
}

// BenchmarkAddressChange adds an address to a mesh of the given size and removes it.
func BenchmarkAddressChange(b *testing.B) {
	for _, size := range []int{10, 1000, 50000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			m := newTestMaps(b, nil)
			addresses := &AddressMap{t: &m.addresses}
			row := func(n int) identity.Address {
				return identity.Address{
					ClusterID: 2, Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(n >> 8), byte(n)}), 32),
					Identity: 2<<16 | 300, NodeAddress: netip.AddrFrom4([4]byte{172, 29, 2, 10}),
				}
			}
			for i := range size {
				must(b, addresses.Update(b.Context(), row(i)))
			}
			for b.Loop() {
				must(b, addresses.Update(b.Context(), row(size)))
				must(b, addresses.Delete(b.Context(), row(size)))
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
