/* Who is behind an address, and where it is. */
#pragma once

#include "net.h"

/* Without preallocation: an entry costs memory only while it exists. */
#define ADDRESSES_MAX (512 * 1024)

/* The cluster precedes the address, so that one prefix holds both: prefix lengths count from the
 * cluster's first bit and are 32 longer than the address's own. */
struct address_key {
	__u32 prefix_len;
	__u8 cluster;
	__u8 pad[3];
	struct ip_addr address;
};

#define ADDRESS_FULL_PREFIX (32 + 128)

enum address_kind {
	ADDRESS_REMOTE = 1, /* on another node: through the tunnel */
	ADDRESS_LOCAL, /* on this node */
	ADDRESS_BLACKHOLE, /* in a range of the mesh that has nothing more specific: nowhere */
};

struct address {
	__u32 identity;
	__u8 owner; /* ID of the cluster that the entry is of */
	__u8 kind; /* enum address_kind */
	__u8 prefix_len; /* as in the key: a lookup doesn't tell which of the prefixes matched */
	__u8 pad;
	struct ip_addr tunnel; /* underlay address of the node, if kind is ADDRESS_REMOTE */
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, ADDRESSES_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address_key);
	__type(value, struct address);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} addresses SEC(".maps");

static __always_inline const struct address *address_lookup(const struct ip_addr *a)
{
	struct address_key key = {
		.prefix_len = ADDRESS_FULL_PREFIX,
		.cluster = CLUSTER_MESH,
		.address = *a,
	};

	return bpf_map_lookup_elem(&addresses, &key);
}
