/* The pods of this node. */
#pragma once

#include "drops.h"
#include "net.h"

#define ENDPOINTS_MAX 4096

struct endpoint_key {
	struct ip_addr address;
	__u8 cluster;
	__u8 pad[3];
};

struct endpoint {
	__u32 ifindex; /* of the node's end of the veth */
	__u32 identity;
	__u8 mac[ETH_ALEN]; /* of the pod's end */
	__u8 host_mac[ETH_ALEN]; /* of the node's end */
	__u8 owner; /* ID of the cluster that the entry is of */
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENDPOINTS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct endpoint_key);
	__type(value, struct endpoint);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} endpoints SEC(".maps");

static __always_inline const struct endpoint *endpoint_lookup(const struct ip_addr *a)
{
	struct endpoint_key key = {
		.address = *a,
		.cluster = CLUSTER_MESH,
	};

	return bpf_map_lookup_elem(&endpoints, &key);
}

/* Hands the packet to a pod of this node, as if its veth had received it. */
static __always_inline int endpoint_deliver(struct __sk_buff *skb, const struct packet *p, const struct endpoint *ep,
					    enum direction direction)
{
	struct ethhdr *eth;

	if (!packet_hop(skb, p))
		return drop(skb, DROP_TTL_EXPIRED, direction);
	eth = (void *)(long)skb->data;
	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return drop(skb, DROP_MALFORMED, direction);
	__builtin_memcpy(eth->h_dest, ep->mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, ep->host_mac, ETH_ALEN);
	return bpf_redirect_peer(ep->ifindex, 0);
}
