/* What comes out of the tunnel, and what this node's own processes send into it: tc ingress and egress on
 * the VXLAN device. */
#include "lib/addresses.h"
#include "lib/drops.h"
#include "lib/echo.h"
#include "lib/endpoints.h"
#include "lib/identity.h"
#include "lib/net.h"
#include "lib/nodes.h"
#include "lib/tunnel.h"

/* This node's address on the pods' side, which no pod has; 0: none. */
volatile const __be32 pod_side_address = 0;

/* Tells whether a node may send as identity: only as its own cluster's, or as itself. */
static __always_inline bool may_send_as(const struct node *node, __be32 node_addr, __u32 identity, __be32 inner_src)
{
	if (identity == IDENTITY_HOST || identity == IDENTITY_REMOTE_NODE)
		return inner_src == node_addr;
	return identity_cluster(identity) == node->cluster && !identity_is_reserved(identity & 0xffff);
}

static __always_inline int echo_send_back(struct __sk_buff *skb, struct packet4 *p, struct echo *echo, __be32 asker)
{
	if (!echo_turn_round(skb, p, echo) || !tunnel_set_key4(skb, asker, IDENTITY_REMOTE_NODE))
		return drop(skb, DROP_NO_TUNNEL, EGRESS);
	return bpf_redirect(tunnel_ifindex, 0);
}

/* What a node sends to this node's own address: an echo ends here, everything else is the stack's. */
static __always_inline int to_this_node(struct __sk_buff *skb, struct packet4 *p, __be32 sender, __u32 identity)
{
	struct echo echo;

	/* Only a node as itself: what a pod sends is never taken for an echo. */
	if (identity != IDENTITY_REMOTE_NODE)
		return PASS;
	switch (echo_parse(skb, p->ip, ECHO_LEN, &echo)) {
	case ECHO_REQUEST:
		return echo_send_back(skb, p, &echo, sender);
	case ECHO_REPLY:
		echo_answered(sender, &echo);
		return TC_ACT_SHOT; /* It has arrived, so it counts as no drop. */
	default:
		return PASS;
	}
}

/* What a node sends as itself, but from an address on the pods' side, to this node's: an echo, or nothing. The sender must be
 * where the address map has the source, which is where the answer goes. */
static __always_inline int to_pod_side(struct __sk_buff *skb, struct packet4 *p, __be32 sender)
{
	const struct address *src = address_lookup4(p->ip->saddr);
	struct echo echo;

	if (!src || src->kind != ADDRESS_REMOTE || ip_addr_to_v4(&src->tunnel) != sender)
		return drop(skb, DROP_FOREIGN_IDENTITY, INGRESS);
	switch (echo_parse(skb, p->ip, 0xffff, &echo)) {
	case ECHO_REQUEST:
		return echo_send_back(skb, p, &echo, ip_addr_to_v4(&src->tunnel));
	case ECHO_REPLY:
		echo_answered(sender, &echo);
		return TC_ACT_SHOT; /* It has arrived, so it counts as no drop. */
	default:
		return drop(skb, DROP_NO_ENDPOINT, INGRESS);
	}
}

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = {};
	const struct endpoint *dst;
	const struct node *node;
	struct packet4 p;
	__be32 sender;

	if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		return drop(skb, DROP_NO_TUNNEL_KEY, INGRESS);
	sender = bpf_htonl(key.remote_ipv4);
	node = node_lookup4(sender);
	if (!node)
		return drop(skb, DROP_UNKNOWN_NODE, INGRESS);
	if (skb->protocol != bpf_htons(ETH_P_IP))
		return drop(skb, DROP_NOT_IP, INGRESS);
	/* The inner Ethernet addresses are meaningless, so the kernel took the packet for another host's. */
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	if (!packet4_parse(skb, &p))
		return drop(skb, DROP_MALFORMED, INGRESS);
	if (pod_side_address && p.ip->daddr == pod_side_address && key.tunnel_id == IDENTITY_REMOTE_NODE && p.ip->saddr != sender)
		return to_pod_side(skb, &p, sender);
	if (!may_send_as(node, sender, key.tunnel_id, p.ip->saddr))
		return drop(skb, DROP_FOREIGN_IDENTITY, INGRESS);

	dst = endpoint_lookup4(p.ip->daddr);
	if (dst)
		return endpoint_deliver4(skb, &p, dst, INGRESS);
	if (p.ip->daddr == node_address)
		return to_this_node(skb, &p, sender, key.tunnel_id);
	return drop(skb, DROP_NO_ENDPOINT, INGRESS);
}

/* Packets that a pod's program has sent here know where to go already; others are from this node's own
 * processes, which reach remote pods through a route to the device. */
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key;
	const struct address *dst;
	struct packet4 p;

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		return PASS;
	if (skb->protocol != bpf_htons(ETH_P_IP))
		return drop(skb, DROP_NOT_IP, EGRESS);
	if (!packet4_parse(skb, &p))
		return drop(skb, DROP_MALFORMED, EGRESS);
	dst = address_lookup4(p.ip->daddr);
	if (!dst || dst->kind != ADDRESS_REMOTE)
		return drop(skb, DROP_UNUSED_ADDRESS, EGRESS);
	if (!tunnel_set_key4(skb, ip_addr_to_v4(&dst->tunnel), IDENTITY_REMOTE_NODE))
		return drop(skb, DROP_NO_TUNNEL, EGRESS);
	return PASS;
}

char _license[] SEC("license") = "Dual MIT/GPL";
