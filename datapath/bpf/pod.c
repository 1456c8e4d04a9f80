/* What a pod sends: tc ingress on the node's end of its veth. One program serves all pods. */
#include <linux/ipv6.h>
#include <linux/tcp.h>

#include "lib/addresses.h"
#include "lib/drops.h"
#include "lib/endpoints.h"
#include "lib/net.h"
#include "lib/tunnel.h"

/* The largest IP packet, in bytes, that still fits the underlay inside of the tunnel. */
volatile const __u32 pod_mtu = 1450;

/* Neighbour and router discovery and multicast reports, which every kernel sends when a link comes up,
 * have a reason of their own: they are no sign of trouble. */
static __always_inline int drop_ipv6(struct __sk_buff *skb)
{
	__u8 dst[2] = {};

	bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct ipv6hdr, daddr), dst, sizeof(dst));
	if ((dst[0] == 0xff && (dst[1] & 0x0f) <= 2) || (dst[0] == 0xfe && (dst[1] & 0xc0) == 0x80))
		return drop(skb, DROP_IPV6_LINK_LOCAL, EGRESS);
	return drop(skb, DROP_IPV6, EGRESS);
}

/* Tells whether the packet, or what segmentation will make of it, exceeds the pods' MTU. */
static __always_inline bool too_big(struct __sk_buff *skb, const struct iphdr *ip)
{
	__u32 header = ip->ihl * 4;

	if (!skb->gso_size)
		return skb->len - ETH_HLEN > pod_mtu;
	if (ip->protocol == IPPROTO_TCP) {
		__u8 doff = 0;

		/* The upper 4 bits of byte 12 are the header's length in words. */
		bpf_skb_load_bytes(skb, ETH_HLEN + header + 12, &doff, sizeof(doff));
		header += (doff >> 4) * 4;
	} else {
		header += 8;
	}
	return header + skb->gso_size > pod_mtu;
}

static __always_inline int send_to_node(struct __sk_buff *skb, struct iphdr *ip, const struct endpoint *src,
					const struct address *dst)
{
	if (too_big(skb, ip))
		return drop(skb, DROP_TOO_BIG, EGRESS);
	if (!packet4_hop(ip))
		return drop(skb, DROP_TTL_EXPIRED, EGRESS);
	if (!tunnel_set_key4(skb, ip_addr_to_v4(&dst->tunnel), src->identity))
		return drop(skb, DROP_NO_TUNNEL, EGRESS);
	return bpf_redirect(tunnel_ifindex, 0);
}

static __always_inline int from_pod4(struct __sk_buff *skb)
{
	const struct endpoint *src, *dst;
	const struct address *address;
	struct packet4 p;

	if (!packet4_parse(skb, &p))
		return drop(skb, DROP_MALFORMED, EGRESS);

	src = endpoint_lookup4(p.ip->saddr);
	if (!src || src->ifindex != skb->ifindex)
		return drop(skb, DROP_SPOOFED_ADDRESS, EGRESS);
	if (__builtin_memcmp(p.eth->h_source, src->mac, ETH_ALEN))
		return drop(skb, DROP_SPOOFED_MAC, EGRESS);

	if (p.ip->daddr == node_address)
		return PASS;
	dst = endpoint_lookup4(p.ip->daddr);
	if (dst)
		return endpoint_deliver4(skb, &p, dst, EGRESS);

	address = address_lookup4(p.ip->daddr);
	if (!address)
		return PASS; /* The world outside of the mesh is the stack's. */
	switch (address->kind) {
	case ADDRESS_REMOTE:
		return send_to_node(skb, p.ip, src, address);
	case ADDRESS_LOCAL:
		return drop(skb, DROP_NO_ENDPOINT, EGRESS);
	default:
		return drop(skb, DROP_UNUSED_ADDRESS, EGRESS);
	}
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
		return from_pod4(skb);
	case bpf_htons(ETH_P_ARP):
		return PASS;
	case bpf_htons(ETH_P_IPV6):
		return drop_ipv6(skb);
	default:
		return drop(skb, DROP_NOT_IP, EGRESS);
	}
}

char _license[] SEC("license") = "Dual MIT/GPL";
