/* The nodes of the mesh, by their address on the underlay. */
#pragma once

#include "net.h"

#define NODES_MAX (16 * 1024)

struct node_key {
	struct ip_addr address;
};

struct node {
	__u8 cluster; /* ID of the cluster that the node is of, which owns the entry too */
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, NODES_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct node_key);
	__type(value, struct node);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} nodes SEC(".maps");

static __always_inline const struct node *node_lookup4(__be32 v4)
{
	struct node_key key = { .address = ip_addr_v4(v4) };

	return bpf_map_lookup_elem(&nodes, &key);
}
