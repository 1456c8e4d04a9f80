/* The outermost headers of packets that carry the tunnel, or should not: which are VXLAN, between whom. For the underlay's link and WireGuard's
 * devices, whose packets are of either family, and begin with an Ethernet header or not. */
#pragma once

#include <linux/ipv6.h>
#include <linux/udp.h>

#include "net.h"

/* UDP port of VXLAN, by which all nodes of the mesh know it. */
volatile const __u16 vxlan_port = 4789;

/* A packet has each extension header once, but for the destination options: RFC 8200, section 4.1. Fragments and what is
 * encrypted end the walk, so no honest packet has more. */
#define EXTENSIONS_MAX 8

#define IPV4_OFFSET 0x1fff
#define IPV4_MORE 0x2000
#define IPV6_OFFSET 0xfff8
#define IPV6_MORE 0x0001

enum datagram_kind {
	DATAGRAM_OTHER = 0, /* nothing to do with VXLAN */
	DATAGRAM_VXLAN, /* one, or the first fragment of one */
	DATAGRAM_FRAGMENT, /* a later fragment of UDP or of what can't be told, which shows no port */
};

struct datagram {
	struct ip_addr src;
	struct ip_addr dst;
	__u32 id; /* that a fragment has in common with the others of the packet; 0: no fragment */
	bool fragment;
	bool last; /* of the fragments */
};

/* What follows Ethernet and IP's headers: an extension header, as far as the walk looks at it. */
struct extension {
	__u8 next;
	__u8 len; /* in 8 bytes, less the first ones */
	__be16 offset; /* of a fragment, and its flags */
	__be32 id;
};

static __always_inline enum datagram_kind datagram_by_port(struct __sk_buff *skb, __u32 offset, const struct datagram *d)
{
	struct udphdr udp;

	/* A first fragment without a whole header hides it. Of a packet that is no fragment nobody reads it. */
	if (bpf_skb_load_bytes(skb, offset, &udp, sizeof(udp)))
		return d->fragment ? DATAGRAM_VXLAN : DATAGRAM_OTHER;
	return udp.dest == bpf_htons(vxlan_port) ? DATAGRAM_VXLAN : DATAGRAM_OTHER;
}

static __always_inline enum datagram_kind datagram_parse4(struct __sk_buff *skb, __u32 offset, struct datagram *d)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.protocol != IPPROTO_UDP)
		return DATAGRAM_OTHER;
	d->src = ip_addr_v4(ip.saddr);
	d->dst = ip_addr_v4(ip.daddr);
	d->id = ip.id;
	d->fragment = ip.frag_off & bpf_htons(IPV4_MORE | IPV4_OFFSET);
	d->last = !(ip.frag_off & bpf_htons(IPV4_MORE));
	if (ip.frag_off & bpf_htons(IPV4_OFFSET))
		return DATAGRAM_FRAGMENT;
	return datagram_by_port(skb, offset + ip.ihl * 4, d);
}

static __always_inline enum datagram_kind datagram_parse6(struct __sk_buff *skb, __u32 offset, struct datagram *d)
{
	struct extension ext;
	struct ipv6hdr ip;
	__u8 next;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return DATAGRAM_OTHER;
	__builtin_memcpy(&d->src, &ip.saddr, sizeof(d->src));
	__builtin_memcpy(&d->dst, &ip.daddr, sizeof(d->dst));
	next = ip.nexthdr;
	offset += sizeof(ip);
	for (int i = 0; i < EXTENSIONS_MAX; i++) {
		if (next == IPPROTO_UDP)
			return datagram_by_port(skb, offset, d);
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS && next != IPPROTO_MH &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			return DATAGRAM_OTHER;
		if (bpf_skb_load_bytes(skb, offset, &ext, sizeof(ext)))
			return d->fragment ? DATAGRAM_VXLAN : DATAGRAM_OTHER;
		if (next == IPPROTO_FRAGMENT) {
			d->id = ext.id;
			d->fragment |= (ext.offset & bpf_htons(IPV6_MORE | IPV6_OFFSET)) != 0;
			d->last = !(ext.offset & bpf_htons(IPV6_MORE));
			if (ext.offset & bpf_htons(IPV6_OFFSET))
				return DATAGRAM_FRAGMENT;
			offset += sizeof(ext);
		} else if (next == IPPROTO_AH) {
			offset += (ext.len + 2) * 4;
		} else {
			offset += (ext.len + 1) * 8;
		}
		next = ext.next;
	}
	return DATAGRAM_VXLAN; /* What is that deep wants to hide. */
}

/* Tells what a packet is whose IP header is at the offset. What it says of a packet that is DATAGRAM_OTHER is right only if that is a
 * fragment of UDP. */
static __always_inline enum datagram_kind datagram_parse(struct __sk_buff *skb, __u32 offset, struct datagram *d)
{
	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
		return datagram_parse4(skb, offset, d);
	case bpf_htons(ETH_P_IPV6):
		return datagram_parse6(skb, offset, d);
	default:
		return DATAGRAM_OTHER;
	}
}
