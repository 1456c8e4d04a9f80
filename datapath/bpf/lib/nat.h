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
	NAT_TUNNELED = 16, /* the client has come through the tunnel */
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
