package tunnel

import (
	"os"
	"strings"
	"testing"
	"time"

	"causeway/identity"
)

func TestRotationLosesNothing(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		a, b := two(t, kind)
		s := newStream(t, b, a)
		old := uint8(0)
		for range 3 {
			s.next(50, 5*time.Second)
			key, err := a.wg.Begin(t.Context())
			must(t, err)
			if keys := a.wg.Keys(); len(keys) != 2 || keys[0].Slot != old || keys[1] != key || key.Slot == old {
				t.Fatalf("keys are %v, the new one is %v", keys, key)
			}
			if _, err := a.wg.Begin(t.Context()); err == nil {
				t.Error("a third key was begun")
			}
			a.row.Keys = a.wg.Keys()
			must(t, b.wg.Update(t.Context(), a.row))
			b.awaitSession(a, 0, key.Slot, 3*time.Second)
			a.awaitSession(b, key.Slot, 0, 3*time.Second)
			s.use(0, key.Slot)
			s.next(50, 5*time.Second)
			a.close() // in the midst of it
			a.open()
			if keys := a.wg.Keys(); len(keys) != 2 || keys[0].Slot != old {
				t.Errorf("after a restart the keys are %v", keys)
			}
			if err := a.wg.End(t.Context(), old); err == nil {
				t.Error("the preferred key was ended")
			}
			must(t, a.wg.Prefer(key.Slot))
			a.awaitQuiet(old, 5*time.Second)
			must(t, a.wg.End(t.Context(), old))
			if keys := a.wg.Keys(); len(keys) != 1 || keys[0] != key {
				t.Errorf("keys are %v, want %v", keys, key)
			}
			if _, err := os.Stat(keyFile(a.cfg.StateDir, old)); err == nil {
				t.Error("the old private key is still there")
			}
			a.row.Keys = a.wg.Keys()
			must(t, b.wg.Update(t.Context(), a.row))
			old = key.Slot
		}
		s.next(50, 5*time.Second)
		if sent, lost, _ := s.end(); lost > 0 {
			t.Errorf("%d of %d packets were lost", lost, sent)
		}
		if status, err := b.wg.Status(); err != nil || len(status.Peers) != 1 {
			t.Errorf("b's peers are %+v, %v", status.Peers, err)
		}
	})
}

// awaitQuiet waits until nothing comes in a slot any more.
func (m *machine) awaitQuiet(slot uint8, within time.Duration) {
	m.t.Helper()
	for deadline := time.Now().Add(within); ; {
		before, err := m.wg.Received(slot)
		must(m.t, err)
		time.Sleep(20 * time.Millisecond)
		after, err := m.wg.Received(slot)
		must(m.t, err)
		if before == after {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("slot %d is still in use", slot)
		}
	}
}

func TestBeginFails(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		m := machines(t, kind, 1, families{})[0]
		m.open()
		conn := m.occupy(m.cfg.Ports[1])
		keys := m.wg.Keys()
		if _, err := m.wg.Begin(t.Context()); err == nil || !strings.Contains(err.Error(), "51872") {
			t.Errorf("with a port that is taken: %v", err)
		}
		if now := m.wg.Keys(); len(now) != 1 || now[0] != keys[0] {
			t.Errorf("keys are %v, want %v", now, keys)
		}
		if _, err := os.Stat(keyFile(m.cfg.StateDir, 1)); err == nil {
			t.Error("a private key was left behind")
		}
		conn.Close()
		if _, err := m.wg.Begin(t.Context()); err != nil {
			t.Errorf("with the port free: %v", err)
		}
		must(t, m.wg.Prefer(1))
		if got := m.wg.Keys(); len(got) != 2 || got[0].Slot != 1 || got[1] != keys[0] {
			t.Errorf("keys are %v", got)
		}
		if err := m.wg.Prefer(identity.TunnelSlots); err == nil {
			t.Error("a slot that does not exist is preferred")
		}
	})
}
