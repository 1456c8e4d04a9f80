/* The nodes of the mesh but this one: how packets get there, and what may come from there.
 *
 * A node has an entry at its address on the underlay, by which the address map names it, and in mode wireguard one at each of its
 * tunnel addresses too. All of them say the same. */
#pragma once

#include "net.h"

#define NODES_MAX (48 * 1024)

/* How packets get to a node. */
enum node_mode {
	NODE_PLAIN = 1, /* in VXLAN on the underlay */
	NODE_WIREGUARD, /* in VXLAN between tunnel addresses, which exist inside of WireGuard only */
	NODE_CLOSED, /* not at all: they must be encrypted and cannot be */
};

struct node_key {
	struct ip_addr address;
};

struct node {
	__u8 cluster; /* ID of the cluster that the node is of, which owns the entry too */
	__u8 mode; /* enum node_mode */
	__u8 flags;
	__u8 pad;
	__u16 mtu; /* the largest IP packet of pods that gets there, in bytes */
	__u8 pad2[2];
	struct ip_addr address; /* on the underlay */
	/* Outer addresses of what is sent there, both of one family; unset in mode closed. */
	struct ip_addr local;
	struct ip_addr remote;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, NODES_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct node_key);
	__type(value, struct node);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} nodes SEC(".maps");

/* Returns the node that has an address of the underlay or of a tunnel, or NULL. */
static __always_inline const struct node *node_lookup(const struct ip_addr *a)
{
	struct node_key key = { .address = *a };

	return bpf_map_lookup_elem(&nodes, &key);
}
