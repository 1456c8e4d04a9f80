/* Services that are balanced at L7: the sockets that this node's proxy listens on, and the addresses that belong to such services.
 *
 * Connections to them are left as they are where a socket names its peer; the node's stack, to which their addresses are local by a route
 * of package tunnel, gives them to the proxy. Nothing is done to a packet. */
#pragma once

#include "net.h"
#include "services.h"

enum l7_family {
	L7_IPV4 = 0,
	L7_IPV6,
	L7_FAMILIES,
};

/* The proxy's listening sockets, by enum l7_family. One that is closed by all who have it vanishes by itself. Without types, which the
 * kernel refuses for such a map; the value is a socket's file for who writes. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, L7_FAMILIES);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u64));
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} l7_listeners SEC(".maps");

struct l7_address_key {
	struct ip_addr address;
	__u8 cluster;
	__u8 pad[3];
};

/* The addresses that at least one L7 frontend has. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FRONTENDS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct l7_address_key);
	__type(value, __u8);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} l7_addresses SEC(".maps");

/* Connections to L7 frontends that were balanced at L4, as there was no proxy. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} l7_fallbacks SEC(".maps");

static __always_inline bool l7_has_address(const struct ip_addr *a)
{
	struct l7_address_key key = {
		.address = *a,
		.cluster = CLUSTER_MESH,
	};

	return bpf_map_lookup_elem(&l7_addresses, &key);
}

/* Returns the proxy's listening socket for connections to an address, or NULL; it is to be released. */
static __always_inline void *l7_listener(const struct ip_addr *a)
{
	const __u32 family = ip_addr_is_v4(a) ? L7_IPV4 : L7_IPV6;

	return bpf_map_lookup_elem(&l7_listeners, &family);
}

static __always_inline bool frontend_is_l7(const struct frontend *f, __u8 protocol)
{
	return (f->flags & FRONTEND_L7) && protocol == IPPROTO_TCP;
}

static __always_inline void count_l7_fallback(void)
{
	const __u32 only = 0;
	__u64 *count = bpf_map_lookup_elem(&l7_fallbacks, &only);

	if (count)
		(*count)++;
}
