package datapath

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"causeway/lb"
)

var errWrite = errors.New("no more writes")

// frail is a map whose writes fail after a number of them, which several maps share: one fails, or all that follow.
type frail struct {
	kernelMap
	fuse *fuse
}

type fuse struct {
	left int  // writes that still succeed
	once bool // only the next one fails then
}

func (f *fuse) burn() error {
	if f.left--; f.left == -1 || f.left < -1 && !f.once {
		return errWrite
	}
	return nil
}

func (m frail) Put(key, value any) error {
	if err := m.fuse.burn(); err != nil {
		return err
	}
	return m.kernelMap.Put(key, value)
}

func (m frail) Delete(key any) error {
	if err := m.fuse.burn(); err != nil {
		return err
	}
	return m.kernelMap.Delete(key)
}

// breaking returns the same maps, written to until the fuse burns.
func (m *Maps) breaking(f *fuse) *Maps {
	broken := &Maps{}
	broken.frontends.m, broken.outsideFrontends.m, broken.outsideUsed.m = m.frontends.m, m.outsideFrontends.m, m.outsideUsed.m
	broken.l7Addresses.m = m.l7Addresses.m
	broken.services.m = frail{m.services.m, f}
	broken.slots.m = frail{m.slots.m, f}
	broken.backends.m = frail{m.backends.m, f}
	return broken
}

// slotsCase is a service's backends, and a change of one.
type slotsCase struct {
	name   string
	before []lb.Target
	change lb.Target
	remove bool
}

func (c slotsCase) apply(t *testing.T, targets *TargetMap) error {
	if c.remove {
		return targets.Delete(t.Context(), c.change)
	}
	return targets.Update(t.Context(), c.change)
}

func (c slotsCase) after() []lb.Target {
	after := slices.DeleteFunc(slices.Clone(c.before), func(t lb.Target) bool { return t.TargetKey == c.change.TargetKey })
	if !c.remove {
		after = append(after, c.change)
	}
	return after
}

// others are the backends that the change isn't about.
func (c slotsCase) others() []lb.Target {
	return slices.DeleteFunc(slices.Clone(c.before), func(t lb.Target) bool { return t.TargetKey == c.change.TargetKey })
}

// slotsCases has every change to every service of up to two active and two quarantined local backends, with a
// remote one of either kind or none.
func slotsCases() (cases []slotsCase) {
	for active := range 3 {
		for inQuarantine := range 3 {
			for remote := range 3 {
				before := serviceWith(active, inQuarantine, remote)
				name := fmt.Sprintf("%d active, %d quarantined, remote %d", active, inQuarantine, remote)
				add := func(what string, change lb.Target, remove bool) {
					cases = append(cases, slotsCase{name + ": " + what, before, change, remove})
				}
				add("add", testTarget(1, 100, true), false)
				add("add quarantined", quarantined(testTarget(1, 100, true)), false)
				for i, t := range before {
					flipped, moved := t, t
					flipped.Quarantined, moved.Local = !t.Quarantined, !t.Local
					both := moved
					both.Quarantined = !moved.Quarantined
					add(fmt.Sprint("remove ", i), t, true)
					add(fmt.Sprint("flip ", i), flipped, false)
					add(fmt.Sprint("change the group of ", i), moved, false)
					add(fmt.Sprint("change the group and flip ", i), both, false)
				}
			}
		}
	}
	return cases
}

func serviceWith(active, inQuarantine, remote int) (targets []lb.Target) {
	for range active {
		targets = append(targets, testTarget(1, len(targets), true))
	}
	for range inQuarantine {
		targets = append(targets, quarantined(testTarget(1, len(targets), true)))
	}
	switch remote {
	case 1:
		targets = append(targets, testTarget(1, len(targets), false))
	case 2:
		targets = append(targets, quarantined(testTarget(1, len(targets), false)))
	}
	return targets
}

func byKey(targets []lb.Target) map[lb.TargetKey]lb.Target {
	m := make(map[lb.TargetKey]lb.Target)
	for _, t := range targets {
		m[t.TargetKey] = t
	}
	return m
}

var oneFrontend = map[lb.FrontendKey]lb.Frontend{testFrontend(1, 1).FrontendKey: testFrontend(1, 1)}

// fill makes the maps hold the service alone, and returns the state of an agent that works on broken.
func (c slotsCase) fill(t *testing.T, m, broken *Maps, f *fuse) *TargetMap {
	frontends, _ := newTestBalancer(t, m)
	must(t, frontends.Delete(t.Context(), testFrontend(1, 1)))
	writesLeft := f.left
	f.left = 1 << 30
	frontends, targets := newTestBalancer(t, broken)
	must(t, frontends.Update(t.Context(), testFrontend(1, 1)))
	for _, target := range c.before {
		must(t, targets.Update(t.Context(), target))
	}
	f.left = writesLeft
	return targets
}

// TestAgentDiesWithinAChange: after every write of every change connections find whom they should, and
// the next agent finds every backend but the changed one as it was.
func TestAgentDiesWithinAChange(t *testing.T) {
	m := newTestMaps(t, smallMaps)
	for _, c := range slotsCases() {
		for writes := 0; ; writes++ {
			f := &fuse{left: writes}
			err := c.apply(t, c.fill(t, m, m.breaking(f), f))
			where := fmt.Sprintf("%s, died after %d writes", c.name, writes)
			if diff := c.chosen(m); diff != "" {
				t.Fatalf("%s: %s", where, diff)
			}
			_, targets := newTestBalancer(t, m)
			if diff := c.restored(m); diff != "" {
				t.Fatalf("%s, restored: %s", where, diff)
			}
			for _, target := range c.after() {
				must(t, targets.Update(t.Context(), target))
			}
			if c.remove {
				must(t, targets.Delete(t.Context(), c.change))
			}
			if diff := compareLB(m, oneFrontend, byKey(c.after())); diff != "" {
				t.Fatalf("%s, told again: %s", where, diff)
			}
			if err == nil {
				break
			}
		}
	}
}

// chosen returns what is wrong with what connections choose from, as the kernel does, whatever is in the slots.
func (c slotsCase) chosen(m *Maps) string {
	frontends, err := m.ListFrontends()
	if err != nil || len(frontends) != 1 {
		return fmt.Sprintf("frontends are %v, %v", frontends, err)
	}
	before, after := byKey(c.before), byKey(c.after())
	hasActive := func(targets map[lb.TargetKey]lb.Target) bool {
		return slices.ContainsFunc(slices.Collect(maps.Values(targets)), func(t lb.Target) bool { return !t.Quarantined })
	}
	if len(before) > 0 && len(after) > 0 && len(frontends[0].Backends) == 0 {
		return "connections find no backend"
	}
	for _, b := range frontends[0].Backends {
		key := lb.TargetKey{Port: testPort(1), Address: b.Address.Addr(), Number: b.Address.Port()}
		was, existed := before[key]
		is, exists := after[key]
		healthy := existed && !was.Quarantined || exists && !is.Quarantined
		if !healthy && hasActive(before) && hasActive(after) {
			return fmt.Sprintf("connections find %s, which is quarantined, while others are not", b.Address)
		}
	}
	return ""
}

// restored returns what is wrong with what an agent found that started after the death of another.
func (c slotsCase) restored(m *Maps) string {
	changed := c.change
	may := [][]lb.Target{c.others(), c.before, c.after(), append(c.others(), quarantined(changed))}
	changed.Quarantined = false
	may = append(may, append(c.others(), changed))
	if was, ok := byKey(c.before)[changed.TargetKey]; ok {
		may = append(may, append(c.others(), quarantined(was)))
	}
	var diffs []string
	for _, targets := range may {
		diff := compareLB(m, oneFrontend, byKey(targets))
		if diff == "" {
			return ""
		}
		diffs = append(diffs, diff)
	}
	return diffs[0]
}

// TestAWriteFailsWithinAChange: whatever change comes next, the agent puts right what one left half done.
func TestAWriteFailsWithinAChange(t *testing.T) {
	m := newTestMaps(t, smallMaps)
	for _, c := range slotsCases() {
		for writes := 0; ; writes++ {
			f := &fuse{left: writes, once: true}
			targets := c.fill(t, m, m.breaking(f), f)
			err := c.apply(t, targets)
			f.left = 1 << 30
			want := append(c.after(), testTarget(1, 101, true), quarantined(testTarget(1, 102, true)))
			for _, target := range want[len(want)-2:] {
				must(t, targets.Update(t.Context(), target))
			}
			must(t, c.apply(t, targets))
			where := fmt.Sprintf("%s, write %d failed", c.name, writes)
			if diff := compareFrontends(m, oneFrontend, byKey(want)); diff != "" {
				t.Fatalf("%s: %s", where, diff)
			}
			newTestBalancer(t, m)
			if diff := compareLB(m, oneFrontend, byKey(want)); diff != "" {
				t.Fatalf("%s, restarted: %s", where, diff)
			}
			if err == nil {
				break
			}
		}
	}
}
