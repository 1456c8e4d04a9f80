/* Answers to clients outside of the cluster, and to pods of other nodes that named this one, as they leave a backend on this node, or come out of
 * the tunnel from one of another. */
#pragma once

#include "addresses.h"
#include "drops.h"
#include "identity.h"
#include "nat.h"
#include "natpacket.h"
#include "net.h"
#include "nodes.h"
#include "send.h"
#include "toobig.h"
#include "tunnel.h"

/* The link to the underlay, by which clients outside come and get their answers. */
volatile const __u32 underlay_ifindex = 0;

/* Sends a translated answer to a client that has come through the tunnel: as this node, which the client named. */
static __always_inline int nat_answer_pod(struct __sk_buff *skb, const struct packet *p, const struct ip_addr *client, enum direction direction)
{
	const struct address *address = address_lookup(client);
	const struct node *node;
	enum fit fit;

	if (!address || address->kind != ADDRESS_REMOTE)
		return drop(skb, DROP_UNUSED_ADDRESS, direction);
	node = node_lookup(&address->tunnel);
	if (!node)
		return drop(skb, DROP_NO_NODE, direction);
	fit = packet_fit(skb, p, node);
	if (fit == FIT_NOT)
		return drop(skb, DROP_TOO_BIG, direction);
	return send_to_node(skb, p, node, IDENTITY_REMOTE_NODE, fit, direction);
}

/* Translates a packet if it is an answer, and sends it to the client; *verdict is what is to become of it then. Returns false for any other. */
static __always_inline bool nat_answer(struct __sk_buff *skb, const struct packet *p, enum direction direction, int *verdict)
{
	struct nat_work *work = nat_work_of_cpu();
	struct nat *answers;
	bool tunneled;

	if (!work || !nat_parse(skb, p, &work->packet))
		return false;
	answers = bpf_map_lookup_elem(&nat, &work->packet.tuple);
	if (!answers)
		return false;
	nat_touch(answers, &work->packet, false);
	tunneled = answers->state & NAT_TUNNELED;
	work->to = answers->to;
	if (nat_translate(skb, &work->packet, &work->to))
		*verdict = drop(skb, DROP_MALFORMED, direction);
	else if (tunneled)
		*verdict = nat_answer_pod(skb, p, &work->to.dst, direction);
	else if (!packet_hop(skb, p))
		*verdict = drop(skb, DROP_TTL_EXPIRED, direction);
	else
		*verdict = bpf_redirect_neigh(underlay_ifindex, NULL, 0, 0);
	return true;
}

/* Translates a packet if it is an answer that this node itself has sent, which the stack has routed already. Returns false if it could not be. */
static __always_inline bool nat_own_answer(struct __sk_buff *skb, const struct packet *p)
{
	struct nat_work *work = nat_work_of_cpu();
	struct nat *answers;

	if (!work || !ip_addr_is(&p->src, &node_address) || !nat_parse(skb, p, &work->packet))
		return true;
	answers = bpf_map_lookup_elem(&nat, &work->packet.tuple);
	if (!answers)
		return true;
	nat_touch(answers, &work->packet, false);
	work->to = answers->to;
	return !nat_translate(skb, &work->packet, &work->to);
}
