/* Lost packets for the test-bed: tc ingress on the ports of its underlay's bridge. No part of a node. */
#include "lib/net.h"

#define FAULTS_MAX (64 * 1024)

struct fault_key {
	struct ip_addr from;
	struct ip_addr to;
};

struct fault {
	__u32 loss; /* drop if a random 32-bit number is at most this */
	__u8 pad[4];
	__u64 lost; /* packets */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FAULTS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct fault_key);
	__type(value, struct fault);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} faults SEC(".maps");

/* Sender's and target's IPv4 address in an ARP packet. */
#define ARP_HLEN 8
#define ARP_SENDER_OFFSET (ETH_HLEN + ARP_HLEN + ETH_ALEN)
#define ARP_TARGET_OFFSET (ARP_SENDER_OFFSET + 4 + ETH_ALEN)

static __always_inline bool read_addresses(struct __sk_buff *skb, __be32 *from, __be32 *to)
{
	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
		return !bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, saddr), from, 4) &&
		       !bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, daddr), to, 4);
	case bpf_htons(ETH_P_ARP):
		return !bpf_skb_load_bytes(skb, ARP_SENDER_OFFSET, from, 4) &&
		       !bpf_skb_load_bytes(skb, ARP_TARGET_OFFSET, to, 4);
	default:
		return false;
	}
}

SEC("tc")
int lose(struct __sk_buff *skb)
{
	struct fault_key key;
	struct fault *fault;
	__be32 from, to;

	if (!read_addresses(skb, &from, &to))
		return PASS;
	key.from = ip_addr_v4(from);
	key.to = ip_addr_v4(to);
	fault = bpf_map_lookup_elem(&faults, &key);
	if (!fault || bpf_get_prandom_u32() > fault->loss)
		return PASS;
	__sync_fetch_and_add(&fault->lost, 1);
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Dual MIT/GPL";
