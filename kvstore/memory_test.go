package kvstore

import (
	"errors"
	"testing"
)

func TestMemoryFaults(t *testing.T) {
	m := NewMemory()
	other := m.Client()
	defer m.Close()
	defer other.Close()
	ctx := t.Context()
	w := follow(t, m, "")
	w.want("listed: ")

	fault := errors.New("disk on fire")
	m.Fail(fault)
	if err := m.Put(ctx, "a", nil); !errors.Is(err, fault) {
		t.Errorf("put returned %v", err)
	}
	must(t, other.Put(ctx, "b", nil))
	w.want("put b=")
	m.Fail(nil)
	must(t, m.Put(ctx, "a", nil, Leased))
	w.want("put a=")

	m.Disconnect()
	if err := m.Put(ctx, "c", nil); !errors.Is(err, ErrUnavailable) {
		t.Errorf("put returned %v", err)
	}
	if status := m.Status(); status.Connected || status.LastError == "" {
		t.Errorf("status %+v", status)
	}
	must(t, other.Delete(ctx, "b"))
	m.ExpireLeases()
	if keys := listKeys(t, other, ""); len(keys) > 0 {
		t.Errorf("a disconnected client kept %v", keys)
	}
	m.Reconnect()
	w.want("delete b, delete a, put a=")
	if status := m.Status(); !status.Connected || status.LastError != "" || status.Reconnects != 1 {
		t.Errorf("status %+v", status)
	}
}
