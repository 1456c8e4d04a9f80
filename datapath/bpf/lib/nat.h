/* Connections that have come from outside of the cluster: what becomes of the client's packets, and of the backend's answers.
 *
 * A connection has two entries, one by what the client sends and one by what the backend answers, each of which says what such a packet
 * becomes; either follows from the other. A backend on this node sees the client's address. For any other the client is this
 * node's address on the pods' side, with a port that is the connection's: the answers have to come back to this node. ICMP errors are told by the packet
 * that they quote, and translated with it. */
#pragma once

#include <linux/tcp.h>
#include <linux/udp.h>

#include "net.h"

/* Two a connection. Preallocated, as every LRU map is: about 20 MiB. The connections that have been silent for longest are pushed out. */
#define NAT_MAX (128 * 1024)

/* Who sends a packet, and whom to. */
struct nat_tuple {
	struct ip_addr src;
	struct ip_addr dst;
	__be16 sport;
	__be16 dport;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 cluster; /* address space */
	__u8 pad[2];
};

enum nat_state {
	NAT_ANSWERED = 1, /* the backend has sent something */
	NAT_CLIENT_CLOSED = 2, /* the client has sent a FIN */
	NAT_BACKEND_CLOSED = 4, /* the backend has */
	NAT_RESET = 8, /* either has sent a RST */
};

struct nat {
	struct nat_tuple to; /* what the packet becomes */
	__u32 backend; /* number of the backend; of the client's entry */
	__u32 state; /* of enum nat_state; of the backend's entry */
	__u64 seen; /* when a packet of the connection passed last, in ns since boot, to NAT_TICK; of the backend's entry */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, NAT_MAX);
	__type(key, struct nat_tuple);
	__type(value, struct nat);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} nat SEC(".maps");

#define SECOND 1000000000ULL

#define NAT_TICK SECOND

/* After how long a connection's tuple may be given to another, in ns since its last packet. Packets of a connection that nobody wanted the
 * tuple of pass for longer. */
#define NAT_IDLE_CLOSED (10 * SECOND)
#define NAT_IDLE_UNANSWERED (60 * SECOND)
#define NAT_IDLE_UDP (120 * SECOND)
#define NAT_IDLE_TCP (6 * 3600 * SECOND)

#define TCP_FLAGS 13 /* offset in TCP's header */
#define TCP_FIN 0x01
#define TCP_RST 0x04

#define ICMP_CHECK 2 /* offset in ICMP's header */
#define ICMP_LEN 8

/* Room for the IPv4 header of a quoted packet's addresses, in the order in which they are in memory. */
struct nat_addresses {
	struct ip_addr src;
	struct ip_addr dst;
};

/* A packet that may be of a connection. */
struct nat_packet {
	/* Its tuple; of an ICMP error, that of the packets which the quoted one has answered. */
	struct nat_tuple tuple;
	__u32 ports; /* where the ports are, of the quoted packet if it is an error */
	__u32 quoted; /* where the quoted packet begins; 0: it is no error */
	__u8 flags; /* TCP's */
};

static __always_inline struct nat_tuple nat_turn_round(const struct nat_tuple *t)
{
	struct nat_tuple r = {
		.src = t->dst,
		.dst = t->src,
		.sport = t->dport,
		.dport = t->sport,
		.protocol = t->protocol,
		.cluster = t->cluster,
	};

	return r;
}

static __always_inline bool nat_tuple_equal(const struct nat_tuple *a, const struct nat_tuple *b)
{
	return ip_addr_equal(&a->src, &b->src) && ip_addr_equal(&a->dst, &b->dst) && a->sport == b->sport && a->dport == b->dport &&
	       a->protocol == b->protocol;
}

/* Tells whether a packet is an ICMP error of those that end a connection, or make it send smaller packets. */
static __always_inline bool nat_is_error(struct __sk_buff *skb, const struct packet *p)
{
	__u8 type;

	if (p->fragment || p->protocol != (p->version == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + p->header_len, &type, sizeof(type)))
		return false;
	/* Unreachable, time exceeded, parameter problem; of IPv6 too big as well. */
	return p->version == 4 ? type == 3 || type == 11 || type == 12 : type >= 1 && type <= 4;
}

/* Reads the addresses and the protocol of the packet that an ICMP error quotes, turned round. */
static __always_inline bool nat_parse_quoted(struct __sk_buff *skb, const struct packet *p, struct nat_packet *n)
{
	const __u32 at = ETH_HLEN + p->header_len + ICMP_LEN;
	struct ipv6hdr v6;
	struct iphdr v4;

	n->quoted = at;
	if (p->version == 6) {
		if (bpf_skb_load_bytes(skb, at, &v6, sizeof(v6)))
			return false;
		__builtin_memcpy(&n->tuple.dst, &v6.saddr, sizeof(n->tuple.dst));
		__builtin_memcpy(&n->tuple.src, &v6.daddr, sizeof(n->tuple.src));
		n->tuple.protocol = v6.nexthdr;
		n->ports = at + sizeof(v6);
		return true;
	}
	if (bpf_skb_load_bytes(skb, at, &v4, sizeof(v4)) || (v4.frag_off & bpf_htons(IP_FRAGMENT)))
		return false;
	n->tuple.dst = ip_addr_v4(v4.saddr);
	n->tuple.src = ip_addr_v4(v4.daddr);
	n->tuple.protocol = v4.protocol;
	n->ports = at + v4.ihl * 4;
	return true;
}

/* Reads what tells a packet's connection. Returns false for one that is of none: neither TCP nor UDP, a fragment, or no error about
 * such a packet. */
static __always_inline bool nat_parse(struct __sk_buff *skb, const struct packet *p, struct nat_packet *n)
{
	__be16 ports[2];

	__builtin_memset(n, 0, sizeof(*n));
	if (nat_is_error(skb, p)) {
		if (!nat_parse_quoted(skb, p, n))
			return false;
	} else {
		if (p->fragment)
			return false;
		n->tuple.src = p->src;
		n->tuple.dst = p->dst;
		n->tuple.protocol = p->protocol;
		n->ports = ETH_HLEN + p->header_len;
	}
	if ((n->tuple.protocol != IPPROTO_TCP && n->tuple.protocol != IPPROTO_UDP) ||
	    bpf_skb_load_bytes(skb, n->ports, ports, sizeof(ports)))
		return false;
	n->tuple.sport = n->quoted ? ports[1] : ports[0];
	n->tuple.dport = n->quoted ? ports[0] : ports[1];
	return n->tuple.protocol != IPPROTO_TCP || n->quoted ||
	       !bpf_skb_load_bytes(skb, n->ports + TCP_FLAGS, &n->flags, sizeof(n->flags));
}

/* Puts addresses into the IP header at an offset. */
static __always_inline bool nat_store_addresses(struct __sk_buff *skb, __u8 version, __u32 ip, const struct ip_addr *src,
						const struct ip_addr *dst, __u64 flags)
{
	struct nat_addresses both = { .src = *src, .dst = *dst };
	__be32 v4[2] = { ip_addr_to_v4(src), ip_addr_to_v4(dst) };

	if (version == 4)
		return !bpf_skb_store_bytes(skb, ip + __builtin_offsetof(struct iphdr, saddr), v4, sizeof(v4), 0);
	return !bpf_skb_store_bytes(skb, ip + __builtin_offsetof(struct ipv6hdr, saddr), &both, sizeof(both), flags);
}

/* Replaces the packet's own addresses, and mends the checksums over them: IPv4's header's, and that at an offset, which is over
 * a pseudo header; 0: there is none. IPv6 has no checksum of its own, so where the kernel has computed the sum over the packet it must be told of
 * the addresses: of the checksum it hears by BPF_F_PSEUDO_HDR. */
static __always_inline bool nat_replace_addresses(struct __sk_buff *skb, struct packet *p, const struct ip_addr *src, const struct ip_addr *dst,
						  __u32 check, __u64 flags)
{
	struct nat_addresses from = { .src = p->src, .dst = p->dst }, to = { .src = *src, .dst = *dst };
	const __s64 sum = bpf_csum_diff((__be32 *)&from, sizeof(from), (__be32 *)&to, sizeof(to), 0);

	p->src = *src;
	p->dst = *dst;
	if (check && bpf_l4_csum_replace(skb, check, 0, sum, BPF_F_PSEUDO_HDR | flags))
		return false;
	if (p->version == 4 && bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), 0, sum, 0))
		return false;
	return nat_store_addresses(skb, p->version, ETH_HLEN, src, dst, BPF_F_RECOMPUTE_CSUM);
}

/* Makes an ICMP error say that it is about the packet which the quoted one was before it was translated. It comes from where that was sent,
 * unless it has come from elsewhere to a backend that sees the client's address. The quoted checksum of TCP or UDP stays wrong: nobody reads it, and
 * it may not be there. */
static __always_inline bool nat_translate_error(struct __sk_buff *skb, struct packet *p, const struct nat_packet *n, const struct nat_tuple *to)
{
	const bool kept = ip_addr_equal(&n->tuple.src, &to->src);
	const struct ip_addr src = kept ? p->src : to->src;
	const __u32 check = ETH_HLEN + p->header_len + ICMP_CHECK;
	const __be16 ports[2] = { to->dport, to->sport };
	__s64 sum, addresses;

	addresses = bpf_csum_diff((__be32 *)&n->tuple.src, 2 * sizeof(n->tuple.src), (__be32 *)&to->src, 2 * sizeof(to->src), 0);
	sum = bpf_csum_diff((__be32 *)&n->tuple.sport, sizeof(ports), (__be32 *)&to->sport, sizeof(ports), 0);
	/* IPv4's checksum, which is mended too, makes good for its addresses. */
	if (p->version == 6)
		sum = bpf_csum_diff((__be32 *)&n->tuple.src, 2 * sizeof(n->tuple.src), (__be32 *)&to->src, 2 * sizeof(to->src), sum);
	else if (bpf_l3_csum_replace(skb, n->quoted + __builtin_offsetof(struct iphdr, check), 0, addresses, 0))
		return false;
	return !bpf_l4_csum_replace(skb, check, 0, sum, 0) && !bpf_skb_store_bytes(skb, n->ports, ports, sizeof(ports), 0) &&
	       nat_store_addresses(skb, p->version, n->quoted, &to->dst, &to->src, 0) &&
	       nat_replace_addresses(skb, p, &src, &to->dst, p->version == 6 ? check : 0, 0);
}

/* Replaces the packet's addresses and ports, or those that it quotes. Returns false if the kernel refuses. Pointers into the packet are invalid
 * afterwards. */
static __always_inline bool nat_translate(struct __sk_buff *skb, struct packet *p, const struct nat_packet *n, const struct nat_tuple *to)
{
	const bool tcp = n->tuple.protocol == IPPROTO_TCP;
	const __u32 check = n->ports + (tcp ? __builtin_offsetof(struct tcphdr, check) : __builtin_offsetof(struct udphdr, check));
	const __be16 ports[2] = { to->sport, to->dport };
	const __u64 flags = tcp ? 0 : BPF_F_MARK_MANGLED_0; /* UDP over IPv4 may have none, which is 0. */
	__s64 sum;

	if (n->quoted)
		return nat_translate_error(skb, p, n, to);
	sum = bpf_csum_diff((__be32 *)&n->tuple.sport, sizeof(ports), (__be32 *)&to->sport, sizeof(ports), 0);
	return !bpf_l4_csum_replace(skb, check, 0, sum, flags) && !bpf_skb_store_bytes(skb, n->ports, ports, sizeof(ports), 0) &&
	       nat_replace_addresses(skb, p, &to->src, &to->dst, check, flags);
}

/* Notes that a packet of the connection passes. */
static __always_inline void nat_touch(struct nat *answers, const struct nat_packet *n, bool from_client)
{
	const __u64 now = bpf_ktime_get_coarse_ns();
	__u32 state = answers->state;

	if (n->quoted)
		return;
	if (!from_client)
		state |= NAT_ANSWERED;
	if (n->flags & TCP_FIN)
		state |= from_client ? NAT_CLIENT_CLOSED : NAT_BACKEND_CLOSED;
	if (n->flags & TCP_RST)
		state |= NAT_RESET;
	if (state != answers->state)
		answers->state = state;
	if (now - answers->seen >= NAT_TICK)
		answers->seen = now;
}

static __always_inline bool nat_is_closed(const struct nat *answers)
{
	const __u32 both = NAT_CLIENT_CLOSED | NAT_BACKEND_CLOSED;

	return (answers->state & NAT_RESET) || (answers->state & both) == both;
}

/* Tells whether the tuple of a connection may be given to another. */
static __always_inline bool nat_is_over(const struct nat *answers)
{
	const __u64 idle = bpf_ktime_get_coarse_ns() - answers->seen;

	if (nat_is_closed(answers))
		return idle >= NAT_IDLE_CLOSED;
	if (answers->to.protocol == IPPROTO_UDP)
		return idle >= NAT_IDLE_UDP;
	return idle >= (answers->state & NAT_ANSWERED ? NAT_IDLE_TCP : NAT_IDLE_UNANSWERED);
}

/* Returns the backend's entry of a connection of which this is the client's, or NULL if it has been pushed out or is another's by now. */
static __always_inline struct nat *nat_answers_of(const struct nat_packet *n, const struct nat *client)
{
	const struct nat_tuple key = nat_turn_round(&client->to), to = nat_turn_round(&n->tuple);
	struct nat *answers = bpf_map_lookup_elem(&nat, &key);

	return answers && nat_tuple_equal(&answers->to, &to) ? answers : NULL;
}
