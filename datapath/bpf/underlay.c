/* The guard on the link to the underlay: tc egress and ingress. Packets of the tunnel that aren't encrypted pass only between nodes
 * that are configured so. The other programs send and take no others; this one makes sure of it whatever they,
 * the routes or the tables do. Nothing else that the link carries is looked at beyond its protocol and port. */
#include "lib/datagram.h"
#include "lib/drops.h"
#include "lib/net.h"
#include "lib/nodes.h"

/* Length of the link's own header, in bytes: Ethernet's, or 0 if packets begin with IP's. */
volatile const __u32 link_header_len = ETH_HLEN;

/* Fragmented packets whose first fragment was refused: later ones show no port. Fragments of a packet leave the kernel one
 * after the other, so an entry is needed for a moment only. */
#define REFUSED_MAX 4096

struct refused_key {
	struct ip_addr src;
	struct ip_addr dst;
	__u32 id;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, REFUSED_MAX);
	__type(key, struct refused_key);
	__type(value, __u8);
} refused SEC(".maps");

/* Tells whether VXLAN may go without encryption between an address of this node and another one. */
static __always_inline bool between_plain(const struct ip_addr *own, const struct ip_addr *other)
{
	const struct node *node = node_lookup(other);

	return node && node->mode == NODE_PLAIN && ip_addr_equal(&node->remote, other) && ip_addr_equal(&node->local, own);
}

/* Drops a packet, and makes sure that the rest of it is dropped too. */
static __always_inline int refuse(struct __sk_buff *skb, const struct datagram *d, const struct refused_key *key)
{
	const __u8 yes = 1;

	if (d->fragment)
		bpf_map_update_elem(&refused, key, &yes, BPF_ANY);
	return drop(skb, DROP_UNENCRYPTED, EGRESS);
}

static __always_inline int later_fragment(struct __sk_buff *skb, const struct datagram *d, const struct refused_key *key)
{
	if (!bpf_map_lookup_elem(&refused, key))
		return PASS;
	if (d->last)
		bpf_map_delete_elem(&refused, key);
	return drop(skb, DROP_UNENCRYPTED, EGRESS);
}

SEC("tc")
int to_underlay(struct __sk_buff *skb)
{
	struct datagram d = {};
	struct refused_key key;
	enum datagram_kind kind;

	if (packet_is_vlans(skb))
		return PASS;
	kind = datagram_parse(skb, link_header_len, &d);
	if (kind == DATAGRAM_OTHER && !d.fragment)
		return PASS;
	key.src = d.src;
	key.dst = d.dst;
	key.id = d.id;
	switch (kind) {
	case DATAGRAM_VXLAN:
		return between_plain(&d.src, &d.dst) ? PASS : refuse(skb, &d, &key);
	case DATAGRAM_FRAGMENT:
		return later_fragment(skb, &d, &key);
	default:
		/* A new packet with the number of one that was refused. */
		bpf_map_delete_elem(&refused, &key);
		return PASS;
	}
}

/* Later fragments may come: without the first one the kernel makes no packet of them. */
SEC("tc")
int from_underlay(struct __sk_buff *skb)
{
	struct datagram d = {};

	if (packet_is_vlans(skb) || datagram_parse(skb, link_header_len, &d) != DATAGRAM_VXLAN || between_plain(&d.dst, &d.src))
		return PASS;
	return drop(skb, DROP_CLEARTEXT, INGRESS);
}

char _license[] SEC("license") = "Dual MIT/GPL";
