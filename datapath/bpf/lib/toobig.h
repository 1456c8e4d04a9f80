/* Packets of pods that are larger than what gets to a node: which they are, and the answer that they get, from which the sender learns how
 * large they may be (RFC 1191, RFC 8201). Nothing else would tell it, since the packet has not met a device that is too small. */
#pragma once

#include "drops.h"
#include "net.h"
#include "nodes.h"
#include "tunnel.h"

/* The least that IPv6 may count on everywhere, in bytes: RFC 8200, section 5. A smaller size can't be told to anybody. */
#define IPV6_MIN_MTU 1280

/* How much of the packet the answer quotes, in bytes: with it, it is smaller than the 576 bytes that ICMP may have (RFC 1812, section
 * 4.3.2.3) and every path carries, and its checksum is computed in one go. */
#define TOO_BIG_QUOTE 504

#define ICMP_DEST_UNREACH 3
#define ICMP_FRAG_NEEDED 4
#define ICMPV6_PKT_TOOBIG 2
#define ICMPV6_ERROR_MAX 127

#define IP_OFFSET_MASK 0x1fff
#define ANSWER_HOPS 64
#define ANSWER_TOS 0xc0 /* internetwork control, RFC 1812, section 4.3.2.5 */

/* Of both families: over IPv4 the upper half of mtu is unused. */
struct icmp_too_big {
	__u8 type;
	__u8 code;
	__be16 check;
	__be32 mtu;
};

enum fit {
	FIT = 0,
	/* Of IPv6, and larger than what gets to the node, but no larger than what it must be able to send: the tunnel's packet
	 * is cut, inside of WireGuard. */
	FIT_IN_FRAGMENTS,
	FIT_NOT,
};

/* Returns the length of the IP packet, in bytes, or of the largest that segmentation will make of it. */
static __always_inline __u32 segment_len(struct __sk_buff *skb, const struct packet *p)
{
	__u8 doff = 0;

	if (!skb->gso_size)
		return skb->len - ETH_HLEN;
	if (p->protocol != IPPROTO_TCP)
		return p->header_len + 8 + skb->gso_size; /* UDP's header */
	/* The upper 4 bits of byte 12 are the header's length in words. */
	bpf_skb_load_bytes(skb, ETH_HLEN + p->header_len + 12, &doff, sizeof(doff));
	return p->header_len + (doff >> 4) * 4 + skb->gso_size;
}

/* Tells whether a packet gets to a node. */
static __always_inline enum fit packet_fit(struct __sk_buff *skb, const struct packet *p, const struct node *node)
{
	const __u32 len = segment_len(skb, p);

	if (len <= node->mtu)
		return FIT;
	/* Linux cuts nothing that it sends in an IPv6 tunnel, and nothing may be cut on the underlay. */
	if (p->version == 6 && len <= IPV6_MIN_MTU && node->mode == NODE_WIREGUARD && ip_addr_is_v4(&node->remote))
		return FIT_IN_FRAGMENTS;
	return FIT_NOT;
}

/* No answer is given to errors, nor to any but the first fragment: RFC 1812, section 4.3.2.7. */
static __always_inline bool may_be_answered(struct __sk_buff *skb, const struct packet *p)
{
	__be16 offset = 0;
	__u8 type = 0;

	if (p->protocol == IPPROTO_ICMPV6 && p->version == 6)
		return !bpf_skb_load_bytes(skb, ETH_HLEN + p->header_len, &type, sizeof(type)) && type > ICMPV6_ERROR_MAX;
	if (p->version == 6)
		return true;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, frag_off), &offset, sizeof(offset)) ||
	    (offset & bpf_htons(IP_OFFSET_MASK)))
		return false;
	if (p->protocol != IPPROTO_ICMP)
		return true;
	/* Unreachable, quench, redirect, time exceeded, parameter problem. */
	return !bpf_skb_load_bytes(skb, ETH_HLEN + p->header_len, &type, sizeof(type)) &&
	       type != 3 && type != 4 && type != 5 && type != 11 && type != 12;
}

static __always_inline __be16 checksum_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Writes the Ethernet header of the answer, whose IP header is of the given length, in place of the packet's. Returns the IP header, or NULL. */
static __always_inline void *answer_open(struct __sk_buff *skb, const struct packet *p, __u32 ip_len)
{
	const __u32 added = ip_len + sizeof(struct icmp_too_big);
	struct ethhdr *eth;

	if (skb->len < ETH_HLEN + TOO_BIG_QUOTE || bpf_skb_change_tail(skb, ETH_HLEN + TOO_BIG_QUOTE, 0) ||
	    bpf_skb_adjust_room(skb, added, BPF_ADJ_ROOM_MAC, 0))
		return NULL;
	eth = packet_pull(skb, ETH_HLEN + added + TOO_BIG_QUOTE);
	if (!eth)
		return NULL;
	__builtin_memcpy(eth->h_source, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, p->mac, ETH_ALEN);
	return eth + 1;
}

static __always_inline bool answer4(struct __sk_buff *skb, const struct packet *p, const struct ip_addr *from, __u32 mtu)
{
	struct iphdr *ip = answer_open(skb, p, sizeof(*ip));
	struct icmp_too_big *icmp;

	if (!ip)
		return false;
	icmp = (void *)(ip + 1);
	*ip = (struct iphdr){
		.version = 4,
		.ihl = sizeof(*ip) / 4,
		.tos = ANSWER_TOS,
		.tot_len = bpf_htons(sizeof(*ip) + sizeof(*icmp) + TOO_BIG_QUOTE),
		.ttl = ANSWER_HOPS,
		.protocol = IPPROTO_ICMP,
		.saddr = ip_addr_to_v4(from),
		.daddr = ip_addr_to_v4(&p->src),
	};
	ip->check = checksum_fold(bpf_csum_diff(NULL, 0, (__be32 *)ip, sizeof(*ip), 0));
	*icmp = (struct icmp_too_big){ .type = ICMP_DEST_UNREACH, .code = ICMP_FRAG_NEEDED, .mtu = bpf_htonl(mtu) };
	icmp->check = checksum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, sizeof(*icmp) + TOO_BIG_QUOTE, 0));
	return true;
}

static __always_inline bool answer6(struct __sk_buff *skb, const struct packet *p, const struct ip_addr *from, __u32 mtu)
{
	/* RFC 8200, section 8.1: addresses, length, next header. */
	const __u32 len = sizeof(struct icmp_too_big) + TOO_BIG_QUOTE;
	struct ipv6hdr *ip = answer_open(skb, p, sizeof(*ip));
	struct icmp_too_big *icmp;
	__u32 sum;

	if (!ip)
		return false;
	icmp = (void *)(ip + 1);
	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 6;
	ip->payload_len = bpf_htons(len);
	ip->nexthdr = IPPROTO_ICMPV6;
	ip->hop_limit = ANSWER_HOPS;
	__builtin_memcpy(&ip->saddr, from, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &p->src, sizeof(ip->daddr));
	*icmp = (struct icmp_too_big){ .type = ICMPV6_PKT_TOOBIG, .mtu = bpf_htonl(mtu) };
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&ip->saddr, 2 * sizeof(ip->saddr), bpf_htonl(len + IPPROTO_ICMPV6));
	icmp->check = checksum_fold(bpf_csum_diff(NULL, 0, (__be32 *)icmp, len, sum));
	return true;
}

/* Replaces an address by this node's, if that is of the same family. */
static __always_inline void prefer_own(struct ip_addr *addr)
{
	const struct ip_addr own = ip_addr_set(&node_address);

	if (ip_addr_is_v4(&own) == ip_addr_is_v4(addr))
		*addr = own;
}

/* Makes a packet that is too big for a node the answer to its sender. It comes from this node, or if that
 * has no address of the packet's family, from where the packet was going. Returns false if it gets none. */
static __always_inline bool too_big_answer(struct __sk_buff *skb, const struct packet *p, const struct node *node)
{
	struct ip_addr from = p->dst;
	__u32 mtu = node->mtu;

	if (!may_be_answered(skb, p))
		return false;
	if (p->version == 6 && mtu < IPV6_MIN_MTU)
		mtu = IPV6_MIN_MTU;
	prefer_own(&from);
	return p->version == 4 ? answer4(skb, p, &from, mtu) : answer6(skb, p, &from, mtu);
}

/* Counts a packet to a node as too big, and answers its sender, a pod, on whose device it is. Returns what is to become of it. */
static __always_inline int too_big(struct __sk_buff *skb, const struct packet *p, const struct node *node)
{
	count_drop(DROP_TOO_BIG, EGRESS, skb->len);
	return too_big_answer(skb, p, node) ? bpf_redirect_peer(skb->ifindex, 0) : TC_ACT_SHOT;
}
