/* Echoes: a probe from node to node, through the tunnel, that the overlay program answers without any process. So
 * a node whose agent is dead, but whose data path lives, can be told from a dead node.
 *
 * A probe is an IP packet without options, extension headers or fragments, with the identity of a remote node, which only nodes can
 * send as. In it is UDP, over IPv4 without a checksum, and in that an echo_message. The answer is the same packet turned round, never
 * larger. Whatever changes places does so at even distances, so no checksum has to be computed: a sum doesn't depend on order.
 *
 * There are two kinds. One is between the nodes' addresses on the underlay, as small as possible, and needs no entry in the
 * address map: it says that a node's data path lives. The other is between the nodes' addresses on the pods' side, and finds
 * its way by the address map, there and back, as pods' packets do: it says that pods reach each other. It may be
 * as large as theirs, for what a path carries depends on the size. */
#pragma once

#include <linux/udp.h>

#include "net.h"
#include "nodes.h"

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
	__u8 pad;
	__u8 other_type; /* the type that this isn't */
	__u8 pad2[5];
	__u64 nonce; /* of the asker's choice; comes back unchanged */
};

/* What follows the IP header. */
struct echo {
	struct udphdr udp;
	struct echo_message message;
};

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

/* Returns whether the packet is an echo, and which, or 0; exact ones have nothing behind the message, which is
 * not looked at otherwise. Of a packet without a whole message nothing can be loaded. */
static __always_inline int echo_parse(struct __sk_buff *skb, const struct packet *p, bool exact, struct echo *echo)
{
	const __u32 header = p->version == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);

	if (p->protocol != IPPROTO_UDP || p->header_len != header || p->fragment || skb->len != ETH_HLEN + p->len ||
	    (exact && p->len != header + sizeof(*echo)))
		return 0;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + header, echo, sizeof(*echo)))
		return 0;
	if (bpf_ntohs(echo->udp.len) != p->len - header || (p->version == 4 && echo->udp.check) ||
	    __builtin_memcmp(echo->message.magic, ECHO_MAGIC, sizeof(echo->message.magic)))
		return 0;
	if (echo->message.type == ECHO_REQUEST && echo->message.other_type == ECHO_REPLY && echo->udp.dest == bpf_htons(ECHO_PORT))
		return ECHO_REQUEST;
	if (echo->message.type == ECHO_REPLY && echo->message.other_type == ECHO_REQUEST && echo->udp.source == bpf_htons(ECHO_PORT))
		return ECHO_REPLY;
	return 0;
}

/* Makes a request the reply to it. Returns false if the kernel refuses. */
static __always_inline bool echo_turn_round(struct __sk_buff *skb, const struct packet *p, struct echo *echo)
{
	const bool v4 = p->version == 4;
	const __u32 addresses = ETH_HLEN + (v4 ? __builtin_offsetof(struct iphdr, saddr) : __builtin_offsetof(struct ipv6hdr, saddr));
	const __be16 port = echo->udp.source;
	struct ip_addr swapped[2];
	__u8 macs[2 * ETH_ALEN];

	/* Ethernet addresses mean nothing in the tunnel, but a VXLAN device drops as looped what comes from its own, which the
	 * asker's may be. */
	__builtin_memcpy(macs, p->mac, ETH_ALEN);
	__builtin_memcpy(macs + ETH_ALEN, p->mac, ETH_ALEN);
	macs[2 * ETH_ALEN - 1] ^= 1;
	echo->udp.source = echo->udp.dest;
	echo->udp.dest = port;
	echo->message.type = ECHO_REPLY;
	echo->message.other_type = ECHO_REQUEST;
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + p->header_len, echo, sizeof(*echo), 0))
		return false;
	if (v4) {
		const __be32 words[2] = { ip_addr_to_v4(&p->dst), ip_addr_to_v4(&p->src) };

		return !bpf_skb_store_bytes(skb, addresses, words, sizeof(words), 0);
	}
	swapped[0] = p->dst;
	swapped[1] = p->src;
	return !bpf_skb_store_bytes(skb, addresses, swapped, sizeof(swapped), 0);
}

/* Hands a reply of a node to the agent, if one reads and has not fallen behind. */
static __always_inline void echo_answered(const struct node *node, const struct echo *echo)
{
	struct echo_answer answer = {
		.node = node->address,
		.nonce = echo->message.nonce,
	};

	bpf_ringbuf_output(&echo_answers, &answer, sizeof(answer), 0);
}
