package datapath

import (
	"errors"
	"maps"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// PodProgram is for running the program on packets without a network.
func (d *Datapath) PodProgram() *ebpf.Program { return d.pod.FromPod }

// Writes counts the changes that this process has made to maps.
func (d *Datapath) Writes() uint64 {
	m := d.Maps
	return m.addresses.writes.Load() + m.l7Addresses.writes.Load() + m.endpoints.writes.Load() + m.nodes.writes.Load() + m.frontends.writes.Load() +
		m.services.writes.Load() + m.slots.writes.Load() + m.outsideFrontends.writes.Load() + m.outsideUsed.writes.Load() + m.backends.writes.Load()
}

// GuardPrograms are what the underlay's packets meet, egress first.
func (d *Datapath) GuardPrograms() [2]*ebpf.Program {
	return [2]*ebpf.Program{d.guard.ToUnderlay, d.guard.FromUnderlay}
}

// EditSessions changes what a node remembers of its clients: when each last connected, in nanoseconds since boot, and the number of its backend. It
// forgets those that edit returns false for.
func EditSessions(pinDir string, edit func(used *uint64, backend *uint32) (keep bool)) (n int, err error) {
	pinned, err := ebpf.LoadPinnedMap(filepath.Join(pinDir, bpfMapSessions), nil)
	if err != nil {
		return 0, err
	}
	defer pinned.Close()
	sessions := table[bpfSessionKey, bpfSession]{m: pinned}
	for key, s := range maps.Collect(sessions.all(&err)) {
		if n++; edit(&s.Used, &s.Backend) {
			err = errors.Join(err, sessions.put(key, s))
		} else {
			err = errors.Join(err, sessions.del(key))
		}
	}
	return n, err
}
