/* Balancing what comes to a node from elsewhere: from clients outside of the cluster, and from pods of other nodes that name this one by its own
 * address. */
#pragma once

#include "addresses.h"
#include "affinity.h"
#include "drops.h"
#include "endpoints.h"
#include "identity.h"
#include "nat.h"
#include "natpacket.h"
#include "net.h"
#include "nodes.h"
#include "outside.h"
#include "podside.h"
#include "send.h"
#include "services.h"
#include "toobig.h"
#include "tunnel.h"

/* The ports that connections get on the pods' side: a range that sockets of this node are not given. */
volatile const __u16 nat_first_port = 0;
volatile const __u16 nat_ports = 0;

/* How many ports are tried for a connection. All are in use by chance once in 2^16, if half of those that lead to its backend are. */
#define NAT_TRIES 16

#define IPV4_OFFSET 0x1fff
#define IPV6_OFFSET 0xfff8

/* IPv6's extension header of a fragment: RFC 8200, section 4.5. */
struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

/* What is not to be balanced: this node's stack answers that nobody listens. To an address that is not its own it says nothing. */
static __always_inline int leave(struct __sk_buff *skb, const struct packet *p, enum drop_reason reason)
{
	return ip_addr_is(&p->dst, &node_address) ? PASS : drop(skb, reason, INGRESS);
}

static __always_inline bool is_syn(const struct nat_packet *n)
{
	return n->tuple.protocol == IPPROTO_TCP && (n->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Tells whether a connection's backend is one of a service still. */
static __always_inline bool has_backend(const struct nat *client)
{
	const struct backend *backend = bpf_map_lookup_elem(&backends, &client->backend);

	return backend && ip_addr_equal(&backend->address, &client->to.dst) && backend->port == client->to.dport;
}

/* Tells whether a packet of a known connection begins it anew: datagrams do if their backend is gone, and connections of TCP by a SYN if either
 * they or their backend are. */
static __always_inline bool begins_anew(const struct nat_packet *n, const struct nat *client, const struct nat *answers)
{
	if (n->quoted)
		return false;
	if (n->tuple.protocol == IPPROTO_UDP)
		return !has_backend(client);
	return is_syn(n) && (nat_is_closed(answers) || !has_backend(client));
}

/* Finds the connection of a packet, and what the packet becomes. */
static __always_inline bool find(const struct nat_packet *n, struct nat_tuple *to)
{
	const struct nat *client = bpf_map_lookup_elem(&nat, &n->tuple);
	struct nat_tuple key;
	struct nat *answers;

	if (!client)
		return false;
	answers = nat_answers_of(n, client);
	if (!answers)
		return false;
	*to = client->to;
	if (begins_anew(n, client, answers)) {
		key = nat_turn_round(to);
		bpf_map_delete_elem(&nat, &key);
		return false;
	}
	nat_touch(answers, n, true);
	return true;
}

/* Makes the tuple of a backend's answers the connection's, unless it is another's. */
static __always_inline bool claim(const struct nat_tuple *to, const struct nat *answers)
{
	const struct nat_tuple key = nat_turn_round(to);
	const struct nat *other;

	if (!bpf_map_update_elem(&nat, &key, answers, BPF_NOEXIST))
		return true;
	other = bpf_map_lookup_elem(&nat, &key);
	if (other && !nat_is_over(other) && !nat_tuple_equal(&other->to, &answers->to))
		return false;
	return !bpf_map_update_elem(&nat, &key, answers, BPF_ANY);
}

/* Gives the connection this node's address on the pods' side, with a port. */
static __always_inline bool claim_port(struct nat_tuple *to, const struct nat *answers)
{
	to->src = ip_addr_set(&pod_side_address);
	if (ip_addr_is_v4(&to->src) != ip_addr_is_v4(&to->dst))
		to->src = ip_addr_set(&pod_side_other);
	if (ip_addr_is_v4(&to->src) != ip_addr_is_v4(&to->dst) || !is_pod_side(&to->src) || !nat_ports)
		return false;
	for (int i = 0; i < NAT_TRIES; i++) {
		to->sport = bpf_htons(nat_first_port + bpf_get_prandom_u32() % nat_ports);
		if (claim(to, answers))
			return true;
	}
	return false;
}

/* Chooses a backend for a new connection, and what its packets become. Returns 0, or the reason why there is none. It is a global function as
 * nat_translate is. */
__noinline int nat_begin(struct nat_work *work, const struct frontend *frontend, __u32 tunneled)
{
	const struct backend *backend;
	struct session_key session;
	struct nat_packet *n;
	struct nat_tuple *to;
	struct nat *entry;
	__u32 id;

	if (!work || !frontend)
		return DROP_NO_BACKEND;
	n = &work->packet;
	to = &work->to;
	entry = &work->entry;
	entry->to = nat_turn_round(&n->tuple);
	entry->backend = 0;
	entry->state = tunneled ? NAT_TUNNELED : 0;
	entry->seen = bpf_ktime_get_coarse_ns();
	session = session_of_address(&n->tuple.src);
	backend = session_choose(frontend, &session, &id);
	if (!backend || ip_addr_is_v4(&backend->address) != ip_addr_is_v4(&n->tuple.dst))
		return DROP_NO_BACKEND;
	*to = n->tuple;
	to->dst = backend->address;
	to->dport = backend->port;
	if (endpoint_lookup(&to->dst) || ip_addr_is(&to->dst, &node_address)) {
		if (!claim(to, entry))
			return DROP_NO_NAT_PORT;
	} else if (!claim_port(to, entry)) {
		return DROP_NO_NAT_PORT;
	}
	entry->to = *to;
	entry->backend = id;
	bpf_map_update_elem(&nat, &n->tuple, entry, BPF_ANY);
	return 0;
}

/* Pods need no answer to a packet that is too big: theirs are no larger than what gets to this node, and connections begin with segments that
 * get on from here. */
static __always_inline int to_other_node(struct __sk_buff *skb, const struct packet *p, const struct nat_packet *n, bool tunneled, const struct nat_tuple *to)
{
	const struct address *address = address_lookup(&to->dst);
	const struct node *node;
	enum fit fit;

	if (!address || address->kind != ADDRESS_REMOTE)
		return drop(skb, DROP_NO_ENDPOINT, INGRESS);
	node = node_lookup(&address->tunnel);
	if (!node)
		return drop(skb, DROP_NO_NODE, INGRESS);
	fit = packet_fit(skb, p, node);
	if (fit == FIT_NOT) {
		count_drop(DROP_TOO_BIG, INGRESS, skb->len);
		return !tunneled && too_big_answer(skb, p, node) ? bpf_redirect(skb->ifindex, 0) : TC_ACT_SHOT;
	}
	if (nat_translate(skb, n, to))
		return drop(skb, DROP_MALFORMED, INGRESS);
	return send_to_node(skb, p, node, IDENTITY_WORLD, fit, INGRESS);
}

static __always_inline int to_backend(struct __sk_buff *skb, const struct packet *p, const struct nat_packet *n, bool tunneled, const struct nat_tuple *to)
{
	const struct endpoint *ep = endpoint_lookup(&to->dst);

	if (!ep && !ip_addr_is(&to->dst, &node_address))
		return to_other_node(skb, p, n, tunneled, to);
	if (nat_translate(skb, n, to))
		return drop(skb, DROP_MALFORMED, INGRESS);
	return ep ? endpoint_deliver(skb, p, ep, INGRESS) : PASS;
}

/* Of what is cut into fragments, the first one alone shows the port. It is dropped, so the kernel will make no packet of the others. */
static __always_inline int fragment(struct __sk_buff *skb, const struct packet *p)
{
	struct fragment_header v6 = { .next = p->protocol };
	__u32 at = ETH_HLEN + p->header_len;
	__be16 ports[2], offset = 0;

	if (p->version == 6) {
		if (bpf_skb_load_bytes(skb, at, &v6, sizeof(v6)) || (v6.offset & bpf_htons(IPV6_OFFSET)))
			return PASS;
		at += sizeof(v6);
	} else if (bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, frag_off), &offset, sizeof(offset)) ||
		   (offset & bpf_htons(IPV4_OFFSET))) {
		return PASS;
	}
	if (bpf_skb_load_bytes(skb, at, ports, sizeof(ports)) || !outside_lookup(&p->dst, ports[1], v6.next))
		return PASS;
	return drop(skb, DROP_FRAGMENT, INGRESS);
}

/* Sends a packet that is for a service on to a backend, and says what is to become of it: of one that has come through the tunnel, the answers go
 * back there. Returns false for any other packet. */
static __always_inline bool balance(struct __sk_buff *skb, const struct packet *p, bool tunneled, int *verdict)
{
	struct nat_work *work = nat_work_of_cpu();
	const struct frontend *frontend;
	struct nat_packet *n;
	int reason;

	*verdict = PASS;
	if (p->fragment) {
		*verdict = fragment(skb, p);
		return true;
	}
	if (!work)
		return false;
	n = &work->packet;
	if (!nat_parse(skb, p, n))
		return false;
	frontend = outside_lookup(&n->tuple.dst, n->tuple.dport, n->tuple.protocol);
	if (!frontend)
		return false;
	if (find(n, &work->to)) {
		*verdict = to_backend(skb, p, n, tunneled, &work->to);
		return true;
	}
	if (n->quoted)
		return false;
	if (n->tuple.protocol == IPPROTO_TCP && !is_syn(n))
		reason = DROP_NO_CONNECTION;
	else
		reason = nat_begin(work, frontend, tunneled);
	if (reason == DROP_NO_CONNECTION || reason == DROP_NO_BACKEND)
		*verdict = leave(skb, p, reason);
	else if (reason)
		*verdict = drop(skb, reason, INGRESS);
	else
		*verdict = to_backend(skb, p, n, tunneled, &work->to);
	return true;
}
