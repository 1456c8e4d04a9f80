/* Addresses, Ethernet and IPv4 headers. */
#pragma once

#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
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

/* The headers of an IPv4 packet. */
struct packet4 {
	struct ethhdr *eth;
	struct iphdr *ip;
};

/* Finds the headers, pulling them into the linear part of the packet if need be. Returns false
 * for a packet that is too short or no IPv4. */
static __always_inline bool packet4_parse(struct __sk_buff *skb, struct packet4 *p)
{
	const __u32 len = sizeof(*p->eth) + sizeof(*p->ip);
	void *data = (void *)(long)skb->data;

	if (data + len > (void *)(long)skb->data_end) {
		if (bpf_skb_pull_data(skb, len))
			return false;
		data = (void *)(long)skb->data;
		if (data + len > (void *)(long)skb->data_end)
			return false;
	}
	p->eth = data;
	p->ip = data + sizeof(*p->eth);
	return p->ip->version == 4 && p->ip->ihl >= 5;
}

/* Counts a hop. Returns false if it was the packet's last; the packet is unchanged then.
 * The checksum is updated as in RFC 1141. */
static __always_inline bool packet4_hop(struct iphdr *ip)
{
	__u32 check = ip->check;

	if (ip->ttl <= 1)
		return false;
	check += bpf_htons(0x0100);
	ip->check = (__u16)(check + (check >= 0xffff));
	ip->ttl--;
	return true;
}
