/* Sending a packet to a node. */
#pragma once

#include "drops.h"
#include "mss.h"
#include "net.h"
#include "nodes.h"
#include "toobig.h"
#include "tunnel.h"

/* Sends a packet, which fits, to a node in the name of an identity. Returns what is to become of it. */
static __always_inline int send_to_node(struct __sk_buff *skb, const struct packet *p, const struct node *node, __u32 identity, enum fit fit,
					enum direction direction)
{
	const int reason = tunnel_prepare(skb, node, identity, fit == FIT_IN_FRAGMENTS);

	if (reason)
		return drop(skb, reason, direction);
	if (!packet_hop(skb, p))
		return drop(skb, DROP_TTL_EXPIRED, direction);
	mss_clamp(skb, p, node->mtu);
	return bpf_redirect(tunnel_ifindex, 0);
}
