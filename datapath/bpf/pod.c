/* What a pod sends: tc ingress on the node's end of its veth. One program serves all pods. */
#include "lib/addresses.h"
#include "lib/drops.h"
#include "lib/endpoints.h"
#include "lib/net.h"
#include "lib/nodes.h"
#include "lib/tunnel.h"

/* Tells whether the packet, or what segmentation will make of it, exceeds an MTU in bytes. */
static __always_inline bool too_big(struct __sk_buff *skb, const struct packet *p, __u32 mtu)
{
	__u32 header = p->header_len;

	if (!skb->gso_size)
		return skb->len - ETH_HLEN > mtu;
	if (p->protocol == IPPROTO_TCP) {
		__u8 doff = 0;

		/* The upper 4 bits of byte 12 are the header's length in words. */
		bpf_skb_load_bytes(skb, ETH_HLEN + header + 12, &doff, sizeof(doff));
		header += (doff >> 4) * 4;
	} else {
		header += 8;
	}
	return header + skb->gso_size > mtu;
}

static __always_inline int drop_too_big(struct __sk_buff *skb, const struct packet *p, __u32 mtu)
{
	return drop(skb, DROP_TOO_BIG, EGRESS);
}

static __always_inline int send_to_node(struct __sk_buff *skb, const struct packet *p, const struct endpoint *src,
					const struct address *dst)
{
	const struct node *node = node_lookup(&dst->tunnel);
	int reason;

	if (node && too_big(skb, p, node->mtu))
		return drop_too_big(skb, p, node->mtu);
	reason = tunnel_prepare(skb, node, src->identity);
	if (reason)
		return drop(skb, reason, EGRESS);
	if (!packet_hop(skb, p))
		return drop(skb, DROP_TTL_EXPIRED, EGRESS);
	return bpf_redirect(tunnel_ifindex, 0);
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	const struct endpoint *src, *dst;
	const struct address *address;
	struct packet p;

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

	if (ip_addr_is(&p.dst, &node_address))
		return PASS;
	dst = endpoint_lookup(&p.dst);
	if (dst)
		return endpoint_deliver(skb, &p, dst, EGRESS);

	address = address_lookup(&p.dst);
	if (!address)
		return PASS; /* The world outside of the mesh is the stack's. */
	switch (address->kind) {
	case ADDRESS_REMOTE:
		return send_to_node(skb, &p, src, address);
	case ADDRESS_LOCAL:
		return drop(skb, DROP_NO_ENDPOINT, EGRESS);
	default:
		return drop(skb, DROP_UNUSED_ADDRESS, EGRESS);
	}
}

char _license[] SEC("license") = "Dual MIT/GPL";
