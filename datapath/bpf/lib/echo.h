/* Echoes: a probe from node to node, through the tunnel, that the overlay program answers without any process. So
 * a node whose agent is dead, but whose data path lives, can be told from a dead node.
 *
 * A probe is an IPv4 packet without options or fragments, with the identity of a remote node, which only nodes can send
 * as. In it is UDP without a checksum, so that turning it round leaves nothing to compute, and in that an echo_message. The
 * answer is the same packet turned round, never larger.
 *
 * There are two kinds. One is between the nodes' addresses on the underlay, as small as possible, and needs no entry in the
 * address map: it says that a node's data path lives. The other is between the nodes' addresses on the pods' side, and finds
 * its way by the address map, there and back, as pods' packets do: it says that pods reach each other. It may be
 * as large as theirs, for what a path carries depends on the size. */
#pragma once

#include <linux/udp.h>

#include "net.h"

/* UDP port that a request goes to, and a reply comes from. No process listens there. */
enum echo_port {
	ECHO_PORT = 8473,
};

enum echo_type {
	ECHO_REQUEST = 1,
	ECHO_REPLY,
};

#define ECHO_MAGIC "causeway"

struct echo_message {
	__u8 magic[8]; /* ECHO_MAGIC */
	__u8 type; /* enum echo_type */
	__u8 pad[7];
	__u64 nonce; /* of the asker's choice; comes back unchanged */
};

/* What follows the IPv4 header. */
struct echo {
	struct udphdr udp;
	struct echo_message message;
};

#define ECHO_OFFSET (ETH_HLEN + sizeof(struct iphdr))

/* Length of the smallest echo's IPv4 packet, in bytes, which is also the largest between addresses of the underlay. */
#define ECHO_LEN (sizeof(struct iphdr) + sizeof(struct echo))

/* A reply, as user space gets it. */
struct echo_answer {
	struct ip_addr node; /* underlay address of the node that sent it */
	__u64 nonce;
};

/* In bytes: about 2000 answers. If no agent reads it is full after those, and further answers are lost. */
#define ECHO_ANSWERS_SIZE (64 * 1024)

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, ECHO_ANSWERS_SIZE);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} echo_answers SEC(".maps");

/* Returns whether the packet is an echo of at most max bytes from the IPv4 header on, and which, or 0. What follows the
 * message is not looked at; of a packet without a whole message nothing can be loaded. */
static __always_inline int echo_parse(struct __sk_buff *skb, const struct iphdr *ip, __u32 max, struct echo *echo)
{
	const __u16 not_fragment = bpf_htons(0x4000); /* Don't-fragment is all that may be set. */
	const __u32 len = bpf_ntohs(ip->tot_len);

	if (ip->protocol != IPPROTO_UDP || ip->ihl != 5 || (ip->frag_off & ~not_fragment) ||
	    len > max || skb->len != ETH_HLEN + len)
		return 0;
	if (bpf_skb_load_bytes(skb, ECHO_OFFSET, echo, sizeof(*echo)))
		return 0;
	if (bpf_ntohs(echo->udp.len) != len - sizeof(*ip) || echo->udp.check ||
	    __builtin_memcmp(echo->message.magic, ECHO_MAGIC, sizeof(echo->message.magic)))
		return 0;
	if (echo->message.type == ECHO_REQUEST && echo->udp.dest == bpf_htons(ECHO_PORT))
		return ECHO_REQUEST;
	if (echo->message.type == ECHO_REPLY && echo->udp.source == bpf_htons(ECHO_PORT))
		return ECHO_REPLY;
	return 0;
}

/* Makes a request the reply to it. The IPv4 header's checksum stays right, as a sum doesn't depend on order. Returns
 * false if the kernel refuses. Pointers into the packet are invalid afterwards. */
static __always_inline bool echo_turn_round(struct __sk_buff *skb, struct packet4 *p, struct echo *echo)
{
	const __be32 asker = p->ip->saddr;
	const __be16 port = echo->udp.source;

	/* Ethernet addresses mean nothing in the tunnel, but a VXLAN device drops as looped what comes from its own. The
	 * asker's kernel, which finds no neighbour behind the device, has its address as both. */
	__builtin_memcpy(p->eth->h_dest, p->eth->h_source, ETH_ALEN);
	p->eth->h_source[ETH_ALEN - 1] ^= 1;
	p->ip->saddr = p->ip->daddr;
	p->ip->daddr = asker;
	echo->udp.source = echo->udp.dest;
	echo->udp.dest = port;
	echo->message.type = ECHO_REPLY;
	return !bpf_skb_store_bytes(skb, ECHO_OFFSET, echo, sizeof(*echo), 0);
}

/* Hands a reply to the agent, if one reads and has not fallen behind. */
static __always_inline void echo_answered(__be32 node, const struct echo *echo)
{
	struct echo_answer answer = {
		.node = ip_addr_v4(node),
		.nonce = echo->message.nonce,
	};

	bpf_ringbuf_output(&echo_answers, &answer, sizeof(answer), 0);
}
