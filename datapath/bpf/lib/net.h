/* Addresses, and packets of both address families. */
#pragma once

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Let the next program of the hook, and then the stack, have the packet: TCX_NEXT of tcx, and
 * what clsact calls unspecified. */
#define PASS TC_ACT_UNSPEC

/* The address space that all clusters share. Map keys carry a cluster, so that clusters with
 * overlapping addresses can have spaces of their own. */
#define CLUSTER_MESH 0

/* An IPv6 address, or an IPv4 one as ::ffff:a.b.c.d. */
struct ip_addr {
	__u8 bytes[16];
} __attribute__((aligned(4)));

static __always_inline struct ip_addr ip_addr_v4(__be32 v4)
{
	struct ip_addr a = {};
	__be32 *words = (__be32 *)a.bytes;

	words[2] = bpf_htonl(0xffff);
	words[3] = v4;
	return a;
}

/* Returns the IPv4 address that a maps. */
static __always_inline __be32 ip_addr_to_v4(const struct ip_addr *a)
{
	return ((const __be32 *)a->bytes)[3];
}

static __always_inline bool ip_addr_is_v4(const struct ip_addr *a)
{
	const __be32 *words = (const __be32 *)a->bytes;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

static __always_inline bool ip_addr_equal(const struct ip_addr *a, const struct ip_addr *b)
{
	const __be32 *x = (const __be32 *)a->bytes, *y = (const __be32 *)b->bytes;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

/* Tells whether a is the address that user space has set at loading; where it has set none, no address is. */
static __always_inline bool ip_addr_is(const struct ip_addr *a, const volatile struct ip_addr *set)
{
	const volatile __be32 *x = (const volatile __be32 *)set->bytes;
	const __be32 *y = (const __be32 *)a->bytes;

	return (x[0] || x[1] || x[2] || x[3]) && x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

/* Returns the address that user space has set at loading. */
static __always_inline struct ip_addr ip_addr_set(const volatile struct ip_addr *set)
{
	const volatile __be32 *words = (const volatile __be32 *)set->bytes;
	struct ip_addr a = {};
	__be32 *copy = (__be32 *)a.bytes;

	copy[0] = words[0];
	copy[1] = words[1];
	copy[2] = words[2];
	copy[3] = words[3];
	return a;
}

#define IP_FRAGMENT 0x3fff /* more fragments, or an offset */
#define IPV6_FRAGMENT 44 /* next header, RFC 8200 */

/* What an Ethernet frame's IP packet says of itself. It holds no pointers, so whoever changes the packet need not mind it. */
struct packet {
	struct ip_addr src;
	struct ip_addr dst;
	__u8 mac[ETH_ALEN]; /* that it is from */
	__u16 len; /* of the IP packet, in bytes */
	__u8 version; /* 4 or 6 */
	/* Length of the IP header, in bytes: IPv4's options are part of it, IPv6's extension headers are not. */
	__u8 header_len;
	__u8 protocol; /* what follows the header: of IPv6 it may be an extension header, which passes untouched */
	__u8 hops; /* TTL or hop limit */
	bool fragment; /* a piece of a larger packet, whose first one alone has ports */
};

/* Makes the first len bytes of the packet readable; returns where they are, or NULL. */
static __always_inline void *packet_pull(struct __sk_buff *skb, __u32 len)
{
	void *data = (void *)(long)skb->data;

	if (data + len <= (void *)(long)skb->data_end)
		return data;
	if (bpf_skb_pull_data(skb, len))
		return NULL;
	data = (void *)(long)skb->data;
	return data + len <= (void *)(long)skb->data_end ? data : NULL;
}

static __always_inline bool packet_parse_v4(struct __sk_buff *skb, struct packet *p)
{
	struct ethhdr *eth = packet_pull(skb, ETH_HLEN + sizeof(struct iphdr));
	struct iphdr *ip = (void *)(eth + 1);

	if (!eth || ip->version != 4 || ip->ihl < 5)
		return false;
	__builtin_memcpy(p->mac, eth->h_source, ETH_ALEN);
	p->src = ip_addr_v4(ip->saddr);
	p->dst = ip_addr_v4(ip->daddr);
	p->len = bpf_ntohs(ip->tot_len);
	p->version = 4;
	p->header_len = ip->ihl * 4;
	p->protocol = ip->protocol;
	p->hops = ip->ttl;
	p->fragment = ip->frag_off & bpf_htons(IP_FRAGMENT);
	return true;
}

static __always_inline bool packet_parse_v6(struct __sk_buff *skb, struct packet *p)
{
	struct ethhdr *eth = packet_pull(skb, ETH_HLEN + sizeof(struct ipv6hdr));
	struct ipv6hdr *ip = (void *)(eth + 1);

	if (!eth || ip->version != 6)
		return false;
	__builtin_memcpy(p->mac, eth->h_source, ETH_ALEN);
	__builtin_memcpy(&p->src, &ip->saddr, sizeof(p->src));
	__builtin_memcpy(&p->dst, &ip->daddr, sizeof(p->dst));
	p->len = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	p->version = 6;
	p->header_len = sizeof(*ip);
	p->protocol = ip->nexthdr;
	p->hops = ip->hop_limit;
	p->fragment = ip->nexthdr == IPV6_FRAGMENT;
	return true;
}

/* A VLAN's packets are another network's; tag 0 means none, and the kernel takes such a packet as the link's own. */
static __always_inline bool packet_is_vlans(const struct __sk_buff *skb)
{
	return skb->vlan_present && (skb->vlan_tci & 0x0fff);
}

static __always_inline bool packet_is_ip(const struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_IP) || skb->protocol == bpf_htons(ETH_P_IPV6);
}

/* Reads the headers, pulling them into the linear part of the packet if need be. Returns false
 * for a packet that is too short, or not of the IP version that its frame names. */
static __always_inline bool packet_parse(struct __sk_buff *skb, struct packet *p)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return packet_parse_v4(skb, p);
	return packet_parse_v6(skb, p);
}

/* Counts a hop. Returns false if it was the packet's last; the packet is unchanged then. Pointers into the packet are invalid afterwards.
 *
 * IPv4's checksum is updated as in RFC 1141, so the sum over the packet stays as it was. IPv6 has none, so the kernel must be told: where
 * it has computed that sum itself, of VXLAN over IPv6, it would find the transport's checksum wrong. */
static __always_inline bool packet_hop(struct __sk_buff *skb, const struct packet *p)
{
	struct iphdr *v4 = (void *)(long)skb->data + ETH_HLEN;
	const __u8 hops = p->hops - 1;
	__u32 check;

	if (p->hops <= 1)
		return false;
	if (p->version == 6)
		return !bpf_skb_store_bytes(skb, ETH_HLEN + __builtin_offsetof(struct ipv6hdr, hop_limit), &hops, sizeof(hops),
					    BPF_F_RECOMPUTE_CSUM);
	if ((void *)(v4 + 1) > (void *)(long)skb->data_end)
		return false;
	check = v4->check + bpf_htons(0x0100);
	v4->check = (__u16)(check + (check >= 0xffff));
	v4->ttl--;
	return true;
}

/* Neighbour and router discovery and multicast reports, which every kernel sends when a link comes up. They stay on the
 * link, and are no sign of trouble. */
static __always_inline bool packet_is_small_talk(const struct packet *p)
{
	const __u8 *dst = p->dst.bytes;

	return p->version == 6 && ((dst[0] == 0xff && (dst[1] & 0x0f) <= 2) || (dst[0] == 0xfe && (dst[1] & 0xc0) == 0x80));
}
