/* Lost packets for the test-bed: tc ingress on the ports of its underlay's bridge. No part of a node. */
#include "lib/net.h"

#define FAULTS_MAX (64 * 1024)

/* What a fault is about. Without addresses: every packet. With a port: only packets of the protocol that go to it or
 * come from it. */
struct fault_key {
	struct ip_addr from;
	struct ip_addr to;
	__be16 port;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 pad;
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

/* Ports of TCP and UDP, which are at the same place in both; the first fragment alone has them. */
struct ports {
	__be16 source;
	__be16 dest;
};

#define FRAGMENT_OFFSET 0x1fff

static __always_inline bool read_ports(struct __sk_buff *skb, __u8 *protocol, struct ports *ports)
{
	struct iphdr ip;

	if (skb->protocol != bpf_htons(ETH_P_IP) || bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
		return false;
	if (ip.protocol != IPPROTO_TCP && ip.protocol != IPPROTO_UDP)
		return false;
	if (ip.frag_off & bpf_htons(FRAGMENT_OFFSET))
		return false;
	*protocol = ip.protocol;
	return !bpf_skb_load_bytes(skb, ETH_HLEN + ip.ihl * 4, ports, sizeof(*ports));
}

/* Returns the worse of a fault found so far and the one of a key. */
static __always_inline struct fault *worse(struct fault *fault, const struct fault_key *key)
{
	struct fault *other = bpf_map_lookup_elem(&faults, key);

	return !fault || (other && other->loss > fault->loss) ? other : fault;
}

SEC("tc")
int lose(struct __sk_buff *skb)
{
	struct fault_key key = {};
	struct fault *fault;
	struct ports ports;
	__be32 from, to;

	if (!read_addresses(skb, &from, &to))
		return PASS;
	fault = worse(NULL, &key);
	key.from = ip_addr_v4(from);
	key.to = ip_addr_v4(to);
	fault = worse(fault, &key);
	if (read_ports(skb, &key.protocol, &ports)) {
		key.port = ports.dest;
		fault = worse(fault, &key);
		key.port = ports.source;
		fault = worse(fault, &key);
	}
	if (!fault || bpf_get_prandom_u32() > fault->loss)
		return PASS;
	__sync_fetch_and_add(&fault->lost, 1);
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Dual MIT/GPL";
