package tunnel

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// two returns two machines with a session.
func two(t *testing.T, kind string) (a, b *machine) {
	t.Helper()
	list := machines(t, kind, 2, families{})
	a, b = list[0], list[1]
	a.open()
	b.open()
	meet(t, a, b)
	a.awaitSession(b, 0, 0, 5*time.Second)
	b.awaitSession(a, 0, 0, 5*time.Second)
	return a, b
}

func TestAgentRestartLosesNothing(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		before, err := a.wg.Status()
		must(t, err)
		s := newStream(t, a, b)
		s.next(100, 5*time.Second)
		for range 3 {
			for _, m := range []*machine{a, b} {
				m.close()
				s.next(100, 5*time.Second)
				m.open()
				s.next(100, 5*time.Second)
			}
		}
		if sent, lost, _ := s.end(); lost > 0 {
			t.Errorf("%d of %d packets were lost", lost, sent)
		}
		after, err := a.wg.Status()
		must(t, err)
		if !a.wg.Shaken(b.row.NodeName(), 0, 0) || len(after.Repairs) > 0 || after.Devices[0] != before.Devices[0] {
			t.Errorf("after it: %+v\nbefore: %+v", after, before)
		}
	})
}

func TestProcessKilled(t *testing.T) {
	if !slices.Contains(kinds(t), KindUserspace) {
		t.Skip("no devices in user space here")
	}
	a, b := two(t, KindUserspace)
	s := newStream(t, a, b)
	for _, m := range []*machine{a, b, a, b} {
		s.next(100, 5*time.Second)
		status, err := m.wg.Status()
		must(t, err)
		must(t, unix.Kill(status.Devices[0].PID, unix.SIGKILL))
		awaitStatus(t, m, "a new process", 5*time.Second, func(now WireGuardStatus) bool {
			return now.Devices[0].PID != 0 && now.Devices[0].PID != status.Devices[0].PID && now.Devices[0].Index != status.Devices[0].Index && now.Devices[0].Index != 0
		})
		s.next(100, 5*time.Second)
	}
	_, _, gap := s.end()
	t.Logf("the longest gap was %s", gap)
	if gap > 2*time.Second {
		t.Errorf("after a kill nothing arrived for %s", gap)
	}
	status, err := a.wg.Status()
	must(t, err)
	if status.Repairs["device"] != 2 {
		t.Errorf("repairs of %v, want 2 devices", status.Repairs)
	}
}

// awaitStatus waits until a machine's status is as it should be.
func awaitStatus(t *testing.T, m *machine, what string, within time.Duration, right func(WireGuardStatus) bool) {
	t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		status, err := m.wg.Status()
		if err == nil && right(status) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %s: %+v, %v", what, within, status, err)
		}
	}
}

// TestNodeComesBack lets a node lose its device while no agent runs, so that the other one has a session with nobody.
func TestNodeComesBack(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		for _, m := range []*machine{a, b} { // whichever has the smaller key
			other := b
			if m == b {
				other = a
			}
			m.awaitSaved(hasPeers)
			m.close()
			m.removeDevice(0)
			start := time.Now()
			m.open()
			awaitPacket(t, other, m, 0, 0, 2*time.Second)
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("%s is reachable %s after its agent's start", m.row.Node, took)
			}
			awaitPacket(t, m, other, 0, 0, time.Second)
		}
	})
}

// TestBothComeBack lets both ask at once.
func TestBothComeBack(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		for range 3 {
			for _, m := range []*machine{a, b} {
				m.awaitSaved(hasPeers)
				m.close()
				m.removeDevice(0)
			}
			start := time.Now()
			a.open()
			b.open()
			a.awaitSession(b, 0, 0, 4*time.Second)
			b.awaitSession(a, 0, 0, 4*time.Second)
			t.Logf("sessions after %s", time.Since(start))
			awaitPacket(t, a, b, 0, 0, time.Second)
		}
	})
}
