/* What comes out of the tunnel, and what this node's own processes send into it: tc ingress and egress on
 * the VXLAN device. */
#include "lib/addresses.h"
#include "lib/drops.h"
#include "lib/echo.h"
#include "lib/endpoints.h"
#include "lib/identity.h"
#include "lib/mss.h"
#include "lib/natanswer.h"
#include "lib/net.h"
#include "lib/nodes.h"
#include "lib/podside.h"
#include "lib/toobig.h"
#include "lib/tunnel.h"
#include "lib/wireguard.h"

/* Tells whether a packet came the way that its node is to be reached: from its address on the underlay, or out of WireGuard from
 * one of its tunnel addresses, each of which WireGuard binds to a key of the node. */
static __always_inline bool came_by_its_way(const struct __sk_buff *skb, const struct node *node, const struct ip_addr *sender)
{
	const bool in_wireguard = (skb->mark & WIREGUARD_MARK_MASK) == WIREGUARD_MARK;
	const bool on_underlay = ip_addr_equal(sender, &node->address);

	switch (node->mode) {
	case NODE_PLAIN:
		return on_underlay && !in_wireguard;
	case NODE_WIREGUARD:
		return !on_underlay && in_wireguard;
	default:
		return false;
	}
}

/* Tells whether an address is one of a node's own on the pods' side: in its pod ranges, but no pod's. */
static __always_inline bool is_own_pod_side(const struct node *node, const struct ip_addr *a)
{
	const struct address *address = address_lookup(a);

	return address && address->kind == ADDRESS_REMOTE && !address->identity && ip_addr_equal(&address->tunnel, &node->address);
}

/* Tells whether a node may send as identity: only as its own cluster's, or as itself. For its own processes its
 * proxy does that by TCP from the pods' side, and what clients from outside send comes from there too. */
static __always_inline bool may_send_as(const struct node *node, __u32 identity, const struct packet *p)
{
	if (identity == IDENTITY_HOST || identity == IDENTITY_REMOTE_NODE)
		return ip_addr_equal(&p->src, &node->address) ||
		       (identity == IDENTITY_REMOTE_NODE && p->protocol == IPPROTO_TCP && is_own_pod_side(node, &p->src));
	if (identity == IDENTITY_WORLD)
		return is_own_pod_side(node, &p->src);
	return identity_cluster(identity) == node->cluster && !identity_is_reserved(identity & 0xffff);
}

static __always_inline int echo_send_back(struct __sk_buff *skb, const struct packet *p, struct echo *echo, const struct node *asker)
{
	int reason;

	if (!echo_turn_round(skb, p, echo))
		return drop(skb, DROP_NO_TUNNEL, EGRESS);
	reason = tunnel_prepare(skb, asker, IDENTITY_REMOTE_NODE, false);
	if (reason)
		return drop(skb, reason, EGRESS);
	return bpf_redirect(tunnel_ifindex, 0);
}

/* An echo that a node has sent as itself to this one: it ends here. What is none is left to the stack if it is to the address
 * on the underlay. To the one on the pods' side there is nothing else, and the sender must be where the address map has the source, which is
 * where the answer goes. */
static __always_inline int to_this_node(struct __sk_buff *skb, const struct packet *p, const struct node *sender, bool pod_side)
{
	const struct address *src = NULL;
	struct echo echo;

	if (pod_side) {
		src = address_lookup(&p->src);
		if (!src || src->kind != ADDRESS_REMOTE || !ip_addr_equal(&src->tunnel, &sender->address))
			return drop(skb, DROP_FOREIGN_IDENTITY, INGRESS);
	}
	switch (echo_parse(skb, p, !pod_side, &echo)) {
	case ECHO_REQUEST:
		return echo_send_back(skb, p, &echo, sender);
	case ECHO_REPLY:
		echo_answered(sender, &echo);
		return TC_ACT_SHOT; /* It has arrived, so it counts as no drop. */
	default:
		return pod_side ? drop(skb, DROP_NO_ENDPOINT, INGRESS) : PASS;
	}
}

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	const struct endpoint *dst;
	const struct node *node;
	struct ip_addr sender;
	__u32 identity;
	struct packet p;
	int verdict;

	if (!tunnel_get_key(skb, &sender, &identity))
		return drop(skb, DROP_NO_TUNNEL_KEY, INGRESS);
	node = node_lookup(&sender);
	if (!node)
		return drop(skb, DROP_UNKNOWN_NODE, INGRESS);
	if (!came_by_its_way(skb, node, &sender))
		return drop(skb, DROP_CLEARTEXT, INGRESS);
	if (node->mode == NODE_WIREGUARD)
		skb->mark = 0; /* It has served; pods and other programs have marks of their own. */
	if (!packet_is_ip(skb))
		return drop(skb, DROP_NOT_IP, INGRESS);
	/* The inner Ethernet addresses are meaningless, so the kernel took the packet for another host's. */
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	if (!packet_parse(skb, &p))
		return drop(skb, DROP_MALFORMED, INGRESS);
	if (identity == IDENTITY_REMOTE_NODE && ip_addr_is(&p.dst, &pod_side_address) && !ip_addr_equal(&p.src, &node->address))
		return to_this_node(skb, &p, node, true);
	if (!may_send_as(node, identity, &p))
		return drop(skb, DROP_FOREIGN_IDENTITY, INGRESS);

	mss_clamp(skb, &p, node->mtu);
	dst = endpoint_lookup(&p.dst);
	if (dst)
		return endpoint_deliver(skb, &p, dst, INGRESS);
	if (is_pod_side(&p.dst)) {
		if (nat_answer(skb, &p, INGRESS, &verdict))
			return verdict;
		return is_answer(skb, &p) ? PASS : drop(skb, DROP_NO_ENDPOINT, INGRESS);
	}
	if (!ip_addr_is(&p.dst, &node_address))
		return drop(skb, DROP_NO_ENDPOINT, INGRESS);
	/* Only a node as itself: what a pod sends is never taken for an echo. */
	return identity == IDENTITY_REMOTE_NODE ? to_this_node(skb, &p, node, false) : PASS;
}

/* Returns who has sent a packet that does not come from a pod's program: this node, or in whose name its proxy has. */
static __always_inline __u32 sender_identity(struct __sk_buff *skb, const struct packet *p)
{
	__u32 identity;

	if ((skb->mark & PROXY_MARK_MASK) != PROXY_MARK || !is_pod_side(&p->src))
		return IDENTITY_REMOTE_NODE;
	identity = skb->mark & ~PROXY_MARK_MASK;
	skb->mark = 0; /* It has served; the underlay has marks of its own. */
	return identity_is_reserved(identity) ? IDENTITY_REMOTE_NODE : identity;
}

/* Packets that a pod's program has sent here know where to go already; others are from this node's own
 * processes, which reach remote pods through a route to the device. */
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	const struct address *dst;
	const struct node *node;
	struct ip_addr remote;
	struct packet p;
	__u32 identity;
	int reason;

	if (tunnel_get_key(skb, &remote, &identity))
		return PASS;
	if (!packet_is_ip(skb))
		return drop(skb, DROP_NOT_IP, EGRESS);
	if (!packet_parse(skb, &p))
		return drop(skb, DROP_MALFORMED, EGRESS);
	if (packet_is_small_talk(&p))
		return drop(skb, DROP_IPV6_LINK_LOCAL, EGRESS);
	dst = address_lookup(&p.dst);
	if (!dst || dst->kind != ADDRESS_REMOTE)
		return drop(skb, DROP_UNUSED_ADDRESS, EGRESS);
	node = node_lookup(&dst->tunnel);
	identity = sender_identity(skb, &p);
	reason = tunnel_prepare(skb, node, identity, node && packet_fit(skb, &p, node) == FIT_IN_FRAGMENTS);
	if (reason)
		return drop(skb, reason, EGRESS);
	mss_clamp(skb, &p, node->mtu);
	return PASS;
}

char _license[] SEC("license") = "Dual MIT/GPL";
