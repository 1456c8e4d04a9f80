/* The way to other nodes: one VXLAN device in external mode, whose VNI is the source's identity. */
#pragma once

#include "net.h"

/* This node's address on the underlay. */
volatile const __be32 node_address = 0;
/* The VXLAN device. */
volatile const __u32 tunnel_ifindex = 0;

/* Says where the VXLAN device shall send the packet, and from whom it is. Returns false if the
 * kernel refuses.
 *
 * The source address is given so that a node with several of them sends from the one that the
 * others know. Fragments are never made: the pods' MTU leaves room for the headers. The outer UDP
 * checksum is left out, as RFC 7348 recommends: the inner packet has its own. */
static __always_inline bool tunnel_set_key4(struct __sk_buff *skb, __be32 remote, __u32 identity)
{
	struct bpf_tunnel_key key = {
		.tunnel_id = identity,
		.remote_ipv4 = bpf_ntohl(remote),
		.local_ipv4 = bpf_ntohl(node_address),
		.tunnel_ttl = 64,
	};

	return !bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX | BPF_F_DONT_FRAGMENT);
}
