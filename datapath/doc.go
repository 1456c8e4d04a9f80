// Package datapath is Causeway in the kernel, and the only importer of
// github.com/cilium/ebpf: it loads, attaches and pins the programs in bpf/, and
// keeps their maps as the rest of Causeway wants them.
//
// The programs, each with its attach point:
//
//	bpf/pod.c      tc ingress on the node's end of every pod's veth
//	bpf/overlay.c  tc ingress and egress on the VXLAN device; answers echoes
//	bpf/socket.c   the cgroup's connect, sendmsg, recvmsg, getpeername hooks
//	bpf/fault.c    tc ingress in the test-bed's underlay, to lose packets
//
// Maps, links and programs are pinned in a directory of a bpf file system, where
// they go on forwarding while no agent runs. An agent that starts takes the maps as they
// are, replaces the programs atomically, and writes only what differs.
//
// A map type's Update and Delete are idempotent, and Prune removes what
// nobody wants, but only of owners that have been heard in full.
package datapath
