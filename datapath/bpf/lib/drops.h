/* Every packet that is dropped is counted, by reason and direction. */
#pragma once

#include "net.h"

/* Why a packet was dropped. Numbers are never reused: the counters outlive a version.
 * dropReasons in drops.go has the names. */
enum drop_reason {
	DROP_MALFORMED = 1,
	DROP_NOT_IP,
	DROP_IPV6_LINK_LOCAL,
	DROP_SPOOFED_ADDRESS,
	DROP_SPOOFED_MAC,
	DROP_TTL_EXPIRED,
	DROP_TOO_BIG,
	DROP_NO_ENDPOINT,
	DROP_UNUSED_ADDRESS,
	DROP_NO_TUNNEL_KEY,
	DROP_UNKNOWN_NODE,
	DROP_FOREIGN_IDENTITY,
	DROP_NO_BACKEND,
	DROP_NO_TUNNEL,
	DROP_NO_NODE,
	DROP_UNENCRYPTED,
	DROP_CLEARTEXT,
	DROP_NOT_VXLAN,
	DROP_NO_NAT_PORT,
	DROP_NO_CONNECTION,
	DROP_FRAGMENT,
	DROP_REASON_MAX,
};

/* Which way the packet went, as seen from the node's workloads. */
enum direction {
	EGRESS = 0,
	INGRESS = 1,
};

#define DROP_SLOTS 256 /* reasons up to 127, two directions each */

struct drop_count {
	__u64 packets;
	__u64 bytes;
};

/* Index: reason * 2 + direction. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROP_SLOTS);
	__type(key, __u32);
	__type(value, struct drop_count);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} drops SEC(".maps");

static __always_inline void count_drop(enum drop_reason reason, enum direction direction, __u32 bytes)
{
	__u32 slot = reason * 2 + direction;
	struct drop_count *count = bpf_map_lookup_elem(&drops, &slot);

	if (count) {
		count->packets++;
		count->bytes += bytes;
	}
}

static __always_inline int drop(struct __sk_buff *skb, enum drop_reason reason, enum direction direction)
{
	count_drop(reason, direction, skb->len);
	return TC_ACT_SHOT;
}
