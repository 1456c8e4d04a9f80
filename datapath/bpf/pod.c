/* What a pod sends: tc ingress on the node's end of its veth. One program serves all pods. */
#include "lib/addresses.h"
#include "lib/drops.h"
#include "lib/endpoints.h"
#include "lib/l7.h"
#include "lib/natanswer.h"
#include "lib/net.h"
#include "lib/nodes.h"
#include "lib/outside.h"
#include "lib/podside.h"
#include "lib/send.h"
#include "lib/toobig.h"
#include "lib/tunnel.h"

static __always_inline int to_other_node(struct __sk_buff *skb, const struct packet *p, const struct endpoint *src, const struct address *dst)
{
	const struct node *node = node_lookup(&dst->tunnel);
	enum fit fit;

	if (!node)
		return drop(skb, DROP_NO_NODE, EGRESS);
	fit = packet_fit(skb, p, node);
	if (fit == FIT_NOT)
		return too_big(skb, p, node);
	return send_to_node(skb, p, node, src->identity, fit, EGRESS);
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	const struct endpoint *src, *dst;
	const struct address *address;
	struct packet p;
	int verdict;

	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return PASS;
	if (!packet_is_ip(skb))
		return drop(skb, DROP_NOT_IP, EGRESS);
	if (!packet_parse(skb, &p))
		return drop(skb, DROP_MALFORMED, EGRESS);
	if (packet_is_small_talk(&p))
		return drop(skb, DROP_IPV6_LINK_LOCAL, EGRESS);

	src = endpoint_lookup(&p.src);
	if (!src || src->ifindex != skb->ifindex)
		return drop(skb, DROP_SPOOFED_ADDRESS, EGRESS);
	if (__builtin_memcmp(p.mac, src->mac, ETH_ALEN))
		return drop(skb, DROP_SPOOFED_MAC, EGRESS);

	if (outside_is_used() && nat_answer(skb, &p, EGRESS, &verdict))
		return verdict;
	if (ip_addr_is(&p.dst, &node_address))
		return PASS;
	dst = endpoint_lookup(&p.dst);
	if (dst)
		return endpoint_deliver(skb, &p, dst, EGRESS);
	if (is_pod_side(&p.dst))
		return is_answer(skb, &p) ? PASS : drop(skb, DROP_NO_ENDPOINT, EGRESS);

	address = address_lookup(&p.dst);
	if (!address)
		return PASS; /* The world outside of the mesh is the stack's. */
	switch (address->kind) {
	case ADDRESS_REMOTE:
		return to_other_node(skb, &p, src, address);
	case ADDRESS_LOCAL:
		return drop(skb, DROP_NO_ENDPOINT, EGRESS);
	default:
		if (l7_has_address(&p.dst))
			return PASS; /* The proxy's, or refused: see proxy.c. */
		return drop(skb, DROP_UNUSED_ADDRESS, EGRESS);
	}
}

char _license[] SEC("license") = "Dual MIT/GPL";
