/* Packets of connections that have come from outside: which connection's they are, and translating them. */
#pragma once

#include <linux/tcp.h>
#include <linux/udp.h>

#include "nat.h"
#include "net.h"

#define ICMP_CHECK 2 /* offset in ICMP's header */
#define ICMP_LEN 8

/* A packet's addresses, in the order in which headers have them. */
struct nat_addresses {
	struct ip_addr src;
	struct ip_addr dst;
};

/* A packet that may be of a connection. */
struct nat_packet {
	/* Its tuple; of an ICMP error, that of the packets which the quoted one has answered. */
	struct nat_tuple tuple;
	struct nat_addresses own; /* the packet's own, also of an error */
	__u32 ports; /* where the ports are, of the quoted packet if it is an error */
	__u32 quoted; /* where the quoted packet begins; 0: it is no error */
	__u8 version; /* 4 or 6 */
	__u8 flags; /* TCP's */
	__u8 pad[2];
};

/* What a program works with while it has one packet, as the stack has no room for it. */
struct nat_work {
	struct nat_packet packet;
	struct nat_tuple to; /* what it becomes */
	struct nat entry; /* to be written */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct nat_work);
} nat_work SEC(".maps");

static __always_inline struct nat_work *nat_work_of_cpu(void)
{
	const __u32 only = 0;

	return bpf_map_lookup_elem(&nat_work, &only);
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
	n->version = p->version;
	n->own.src = p->src;
	n->own.dst = p->dst;
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
static __always_inline bool nat_store_addresses(struct __sk_buff *skb, __u8 version, __u32 ip, const struct nat_addresses *to, __u64 flags)
{
	__be32 v4[2] = { ip_addr_to_v4(&to->src), ip_addr_to_v4(&to->dst) };

	if (version == 4)
		return !bpf_skb_store_bytes(skb, ip + __builtin_offsetof(struct iphdr, saddr), v4, sizeof(v4), 0);
	return !bpf_skb_store_bytes(skb, ip + __builtin_offsetof(struct ipv6hdr, saddr), to, sizeof(*to), flags);
}

/* Replaces the packet's own addresses, and mends the checksums over them: IPv4's header's, and that at an offset, which is over
 * a pseudo header; 0: there is none. IPv6 has no checksum of its own, so where the kernel has computed the sum over the packet it must be told of
 * the addresses: of the checksum it hears by BPF_F_PSEUDO_HDR. */
static __always_inline bool nat_replace_addresses(struct __sk_buff *skb, const struct nat_packet *n, const struct nat_addresses *to,
						  __u32 check, __u64 flags)
{
	const __s64 sum = bpf_csum_diff((__be32 *)&n->own, sizeof(n->own), (__be32 *)to, sizeof(*to), 0);

	if (check && bpf_l4_csum_replace(skb, check, 0, sum, BPF_F_PSEUDO_HDR | flags))
		return false;
	if (n->version == 4 && bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), 0, sum, 0))
		return false;
	return nat_store_addresses(skb, n->version, ETH_HLEN, to, BPF_F_RECOMPUTE_CSUM);
}

/* Makes an ICMP error say that it is about the packet which the quoted one was before it was translated. It comes from where that was sent,
 * unless it has come from elsewhere to a backend that sees the client's address. The quoted checksum of TCP or UDP stays wrong: nobody reads it, and
 * it may not be there. */
static __always_inline bool nat_translate_error(struct __sk_buff *skb, const struct nat_packet *n, const struct nat_tuple *to)
{
	const bool kept = ip_addr_equal(&n->tuple.src, &to->src);
	struct nat_addresses own = { .src = kept ? n->own.src : to->src, .dst = to->dst }, quoted = { .src = to->dst, .dst = to->src };
	const __u32 check = n->quoted - ICMP_LEN + ICMP_CHECK;
	const __be16 ports[2] = { to->dport, to->sport };
	__s64 sum, addresses;

	addresses = bpf_csum_diff((__be32 *)&n->tuple.src, sizeof(quoted), (__be32 *)&to->src, sizeof(quoted), 0);
	sum = bpf_csum_diff((__be32 *)&n->tuple.sport, sizeof(ports), (__be32 *)&to->sport, sizeof(ports), 0);
	/* IPv4's checksum, which is mended too, makes good for its addresses. */
	if (n->version == 6)
		sum = bpf_csum_diff((__be32 *)&n->tuple.src, sizeof(quoted), (__be32 *)&to->src, sizeof(quoted), sum);
	else if (bpf_l3_csum_replace(skb, n->quoted + __builtin_offsetof(struct iphdr, check), 0, addresses, 0))
		return false;
	return !bpf_l4_csum_replace(skb, check, 0, sum, 0) && !bpf_skb_store_bytes(skb, n->ports, ports, sizeof(ports), 0) &&
	       nat_store_addresses(skb, n->version, n->quoted, &quoted, 0) &&
	       nat_replace_addresses(skb, n, &own, n->version == 6 ? check : 0, 0);
}

static __always_inline bool nat_translate_own(struct __sk_buff *skb, const struct nat_packet *n, const struct nat_tuple *to)
{
	const bool tcp = n->tuple.protocol == IPPROTO_TCP;
	const __u32 check = n->ports + (tcp ? __builtin_offsetof(struct tcphdr, check) : __builtin_offsetof(struct udphdr, check));
	const __u64 flags = tcp ? 0 : BPF_F_MARK_MANGLED_0; /* UDP over IPv4 may have none, which is 0. */
	struct nat_addresses own = { .src = to->src, .dst = to->dst };
	const __be16 ports[2] = { to->sport, to->dport };
	__s64 sum;

	sum = bpf_csum_diff((__be32 *)&n->tuple.sport, sizeof(ports), (__be32 *)&to->sport, sizeof(ports), 0);
	return !bpf_l4_csum_replace(skb, check, 0, sum, flags) && !bpf_skb_store_bytes(skb, n->ports, ports, sizeof(ports), 0) &&
	       nat_replace_addresses(skb, n, &own, check, flags);
}

/* Replaces the packet's addresses and ports, or those that it quotes. Returns 0, or another number if the kernel refuses. Pointers into the packet
 * are invalid afterwards. It is a global function so that the verifier looks at it once, and not for each way that leads here. */
__noinline int nat_translate(struct __sk_buff *skb, const struct nat_packet *n, const struct nat_tuple *to)
{
	if (!n || !to)
		return 1;
	return !(n->quoted ? nat_translate_error(skb, n, to) : nat_translate_own(skb, n, to));
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

/* Returns the backend's entry of a connection of which this is the client's, or NULL if it has been pushed out or is another's by now. */
static __always_inline struct nat *nat_answers_of(const struct nat_packet *n, const struct nat *client)
{
	const struct nat_tuple key = nat_turn_round(&client->to), to = nat_turn_round(&n->tuple);
	struct nat *answers = bpf_map_lookup_elem(&nat, &key);

	return answers && nat_tuple_equal(&answers->to, &to) ? answers : NULL;
}
