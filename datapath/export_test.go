package datapath

import "github.com/cilium/ebpf"

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
