package main

import (
	"causeway/agent/api"

	"github.com/spf13/cobra"
)

func newBPFCommand(e *env) *cobra.Command {
	return family("bpf", "What is in the kernel, read back, with names", `  clustermesh bpf lb list
  clustermesh bpf drops`,
		family("lb", "Services in the kernel", "  clustermesh bpf lb list", newBPFLBCommand(e)),
		family("address", "Addresses in the kernel", "  clustermesh bpf address list", newBPFAddressCommand(e)),
		newBPFDropsCommand(e))
}

func newBPFLBCommand(e *env) *cobra.Command {
	return query[[]api.BPFFrontend]{
		use:     "list",
		short:   "List the services that the kernel translates, for sockets on the node and for packets from outside, a row for each backend and whether it gets new connections",
		example: "  clustermesh bpf lb list --node east/node1\n  clustermesh bpf lb list -o json",
		get:     (*api.Client).BPFLB,
		print:   func(p *printer, frontends []api.BPFFrontend) { p.table(bpfLBTable(frontends)) },
	}.command(e)
}

// States of a backend in the kernel.
const (
	stateActive      = "active"
	stateQuarantined = "quarantined"
	// stateFailOpen is that of every backend if all are quarantined: they get new connections all the same.
	stateFailOpen = "active (fail open)"
)

func bpfLBTable(frontends []api.BPFFrontend) *table {
	t := newTable("FRONTEND", "SERVICE", "LEVEL", "AFFINITY", "GROUP", "SLOT", "BACKEND", "STATE", "NODE", "ENDPOINT")
	for _, f := range frontends {
		frontend := hostPort(f.Address, f.Port, f.Protocol)
		if f.Outside {
			frontend += "/outside"
		}
		level := "L4"
		if f.L7 {
			level = "L7"
		}
		add := func(state string, backends []api.BPFBackend) {
			for _, b := range backends {
				t.add(frontend, f.Service, level, f.Affinity, b.Group, b.Slot, hostPort(b.Address, b.Port, f.Protocol), state, qualified(b.Cluster, b.Node), b.Endpoint)
			}
		}
		if len(f.Backends)+len(f.Quarantined) == 0 {
			t.add(frontend, f.Service, level, f.Affinity, "", "", "none", "", "", "")
		}
		state := stateActive
		if f.FailOpen {
			state = stateFailOpen
		}
		add(state, f.Backends)
		add(stateQuarantined, f.Quarantined)
	}
	return t
}

func newBPFAddressCommand(e *env) *cobra.Command {
	return query[[]api.BPFAddress]{
		use:     "list",
		short:   "List the addresses that the kernel knows: whose they are, and the node that packets are sent to",
		example: "  clustermesh bpf address list --node east/node1",
		get:     (*api.Client).BPFAddresses,
		print: func(p *printer, addresses []api.BPFAddress) {
			t := newTable("PREFIX", "IDENTITY", "LABELS", "NODE", "ENDPOINT", "WHERE")
			for _, a := range addresses {
				t.add(a.Prefix, a.Identity, a.Labels, qualified(a.Cluster, a.Node), a.Endpoint, where(a))
			}
			p.table(t)
		},
	}.command(e)
}

func newBPFDropsCommand(e *env) *cobra.Command {
	return query[[]api.BPFDrop]{
		use:     "drops",
		short:   "Count the packets that the kernel's programs dropped, by reason",
		example: "  clustermesh bpf drops --node east/node1\n  clustermesh bpf drops -o json",
		get:     (*api.Client).BPFDrops,
		print: func(p *printer, drops []api.BPFDrop) {
			t := newTable("REASON", "DIRECTION", "PACKETS", "BYTES")
			for _, d := range drops {
				t.add(d.Reason, d.Direction, d.Packets, d.Bytes)
			}
			p.table(t)
		},
	}.command(e)
}

// where says what happens to packets for an address that no longer prefix knows better.
func where(a api.BPFAddress) string {
	switch {
	case a.Blackhole:
		return "nowhere"
	case a.Tunnel == "":
		return "this node"
	}
	return "tunnel to " + a.Tunnel
}

// qualified returns CLUSTER/NODE, or the cluster alone where the node isn't known.
func qualified(cluster, node string) string {
	if node == "" {
		return cluster
	}
	return cluster + "/" + node
}
