/* This node's own addresses on the pods' side, which no pod has: echoes are sent from the first one, and the L7 proxy's connections from both. */
#pragma once

#include <linux/tcp.h>

#include "net.h"

/* Of the first pod range, and of the second one, which is of the other family; unset: none. */
volatile const struct ip_addr pod_side_address = {};
volatile const struct ip_addr pod_side_other = {};

/* What marks a connection of the L7 proxy, besides the identity in whose name it is: ProxyMark of package identity. */
#define PROXY_MARK 0xcb000000
#define PROXY_MARK_MASK 0xff000000

static __always_inline bool is_pod_side(const struct ip_addr *a)
{
	return ip_addr_is(a, &pod_side_address) || ip_addr_is(a, &pod_side_other);
}

#define TCP_FLAGS_BYTE 13
#define TCP_SYN 0x02
#define TCP_ACK 0x10

/* Tells whether a packet may belong to a connection that this node has opened: TCP, and no SYN alone. Nothing of the node is
 * reachable by what passes. */
static __always_inline bool is_answer(struct __sk_buff *skb, const struct packet *p)
{
	__u8 flags;

	if (p->protocol != IPPROTO_TCP || p->fragment ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + p->header_len + TCP_FLAGS_BYTE, &flags, sizeof(flags)))
		return false;
	return (flags & (TCP_SYN | TCP_ACK)) != TCP_SYN;
}
