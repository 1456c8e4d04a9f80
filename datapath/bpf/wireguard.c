/* What comes out of WireGuard, and what goes in: tc ingress and egress on the device of a slot, which has no Ethernet header. The
 * tunnel is all that it carries, between the tunnel addresses of nodes. WireGuard itself makes sure that a source
 * address is that of the key; the mark says that it did. */
#include "lib/datagram.h"
#include "lib/drops.h"
#include "lib/net.h"
#include "lib/nodes.h"
#include "lib/wireguard.h"

/* This node's tunnel address of the slot. */
volatile const struct ip_addr tunnel_address = {};
/* What the packets get. */
volatile const __u32 wireguard_mark = WIREGUARD_MARK;

/* Drops a packet that is no VXLAN. The kernel sends some over every device with IPv6, which are no sign of trouble. */
static __always_inline int refuse(struct __sk_buff *skb, enum direction direction)
{
	__u8 dst[2] = {};

	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		bpf_skb_load_bytes(skb, __builtin_offsetof(struct ipv6hdr, daddr), dst, sizeof(dst));
	if ((dst[0] == 0xff && (dst[1] & 0x0f) <= 2) || (dst[0] == 0xfe && (dst[1] & 0xc0) == 0x80))
		return drop(skb, DROP_IPV6_LINK_LOCAL, direction);
	return drop(skb, DROP_NOT_VXLAN, direction);
}

/* Fragments may come: large packets of IPv6 pods are fragmented here if they have to be. The kernel puts them together before it looks at
 * the port, so a packet of another kind is refused with its first one. */
SEC("tc")
int from_wireguard(struct __sk_buff *skb)
{
	struct datagram d = {};

	if (datagram_parse(skb, 0, &d) == DATAGRAM_OTHER || !ip_addr_is(&d.dst, &tunnel_address) || !node_lookup(&d.src))
		return refuse(skb, INGRESS);
	skb->mark = wireguard_mark;
	return PASS;
}

SEC("tc")
int to_wireguard(struct __sk_buff *skb)
{
	struct datagram d = {};

	if (datagram_parse(skb, 0, &d) == DATAGRAM_OTHER || !ip_addr_is(&d.src, &tunnel_address) || !node_lookup(&d.dst))
		return refuse(skb, EGRESS);
	return PASS;
}

char _license[] SEC("license") = "Dual MIT/GPL";
