/* Services as clients outside of the cluster know them: a node's address with a node port, or an external IP. */
#pragma once

#include "net.h"
#include "services.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FRONTENDS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} outside_frontends SEC(".maps");

/* Not 0 as soon as there has been a frontend for clients outside. Packets of a node that never had one are not looked at. It is not taken back:
 * connections may outlive the frontend. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} outside_used SEC(".maps");

static __always_inline bool outside_is_used(void)
{
	const __u32 only = 0;
	const __u32 *used = bpf_map_lookup_elem(&outside_used, &only);

	return used && *used;
}

static __always_inline const struct frontend *outside_lookup(const struct ip_addr *address, __be16 port, __u8 protocol)
{
	struct frontend_key key = {
		.address = *address,
		.port = port,
		.protocol = protocol,
		.cluster = CLUSTER_MESH,
	};

	return bpf_map_lookup_elem(&outside_frontends, &key);
}
