/* The way to other nodes: one VXLAN device in external mode, whose VNI is the source's identity. */
#pragma once

#include "drops.h"
#include "net.h"
#include "nodes.h"

/* This node's address on the underlay. */
volatile const struct ip_addr node_address = {};
/* The VXLAN device. */
volatile const __u32 tunnel_ifindex = 0;

/* Type of service of a tunnel's packet that may be cut into fragments: the routes inside of WireGuard that are for it have the path's
 * MTU. See package tunnel. */
#define TUNNEL_TOS 0x10

/* Says where the VXLAN device shall send the packet, and from whom it is. Returns false if the kernel refuses.
 *
 * The source address is given so that a node with several of them sends from the one that the others know, and because in mode wireguard
 * it is what routes the packet into WireGuard. Fragments are never made, unless the packet is to be cut: then the routes to tunnel addresses
 * that have TUNNEL_TOS say how. The outer UDP checksum is left out over IPv4, as RFC 7348 recommends: the inner packet has its own.
 * Receivers refuse that over IPv6. */
static __always_inline bool tunnel_set_key(struct __sk_buff *skb, const struct node *node, __u32 identity, bool cut)
{
	struct bpf_tunnel_key key = {
		.tunnel_id = identity,
		.tunnel_ttl = 64,
	};
	__u64 flags = BPF_F_DONT_FRAGMENT;

	if (cut) {
		key.tunnel_tos = TUNNEL_TOS;
		flags = 0;
	}
	if (ip_addr_is_v4(&node->remote)) {
		key.remote_ipv4 = bpf_ntohl(ip_addr_to_v4(&node->remote));
		key.local_ipv4 = bpf_ntohl(ip_addr_to_v4(&node->local));
		flags |= BPF_F_ZERO_CSUM_TX;
	} else {
		__builtin_memcpy(key.remote_ipv6, &node->remote, sizeof(key.remote_ipv6));
		__builtin_memcpy(key.local_ipv6, &node->local, sizeof(key.local_ipv6));
		flags |= BPF_F_TUNINFO_IPV6;
	}
	return !bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags);
}

/* Makes the packet ready for the VXLAN device. Returns 0, or the reason to drop it: what must be encrypted and cannot be is never sent. */
static __always_inline int tunnel_prepare(struct __sk_buff *skb, const struct node *node, __u32 identity, bool cut)
{
	if (!node)
		return DROP_NO_NODE;
	if (node->mode != NODE_PLAIN && node->mode != NODE_WIREGUARD)
		return DROP_UNENCRYPTED;
	if (!tunnel_set_key(skb, node, identity, cut))
		return DROP_NO_TUNNEL;
	return 0;
}

/* Reads what the VXLAN device took off the packet: the outer source and the VNI. Returns false if the packet did not come out of a tunnel. */
static __always_inline bool tunnel_get_key(struct __sk_buff *skb, struct ip_addr *from, __u32 *identity)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		*from = ip_addr_v4(bpf_htonl(key.remote_ipv4));
	else if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
		__builtin_memcpy(from, key.remote_ipv6, sizeof(*from));
	else
		return false;
	*identity = key.tunnel_id;
	return true;
}
