/* Answers to clients outside of the cluster, as they leave a backend's node by its pod's veth, or come out of the tunnel. */
#pragma once

#include "drops.h"
#include "nat.h"
#include "net.h"

/* The link to the underlay, by which clients outside come and get their answers. */
volatile const __u32 underlay_ifindex = 0;

/* Translates a packet if it is an answer to a client outside, and sends it there; *verdict is what is to become of it then. Returns false for any other. */
static __always_inline bool nat_answer(struct __sk_buff *skb, struct packet *p, enum direction direction, int *verdict)
{
	struct nat_packet n;
	struct nat *answers;
	struct nat_tuple to;

	if (!nat_parse(skb, p, &n))
		return false;
	answers = bpf_map_lookup_elem(&nat, &n.tuple);
	if (!answers)
		return false;
	nat_touch(answers, &n, false);
	to = answers->to;
	if (!packet_hop(skb, p))
		*verdict = drop(skb, DROP_TTL_EXPIRED, direction);
	else if (!nat_translate(skb, p, &n, &to))
		*verdict = drop(skb, DROP_MALFORMED, direction);
	else
		*verdict = bpf_redirect_neigh(underlay_ifindex, NULL, 0, 0);
	return true;
}
