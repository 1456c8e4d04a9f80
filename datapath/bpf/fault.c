/* Lost packets for the test-bed: tc ingress on the ports of its underlay's bridge. No part of a node. */
#include <linux/tcp.h>
#include <linux/udp.h>

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

/* The way from one address to another. */
struct path_key {
	struct ip_addr from;
	struct ip_addr to;
};

struct path {
	__u32 mtu; /* the largest IP packet that it carries, in bytes */
	__u8 pad[4];
	__u64 lost; /* packets that were larger */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FAULTS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct path_key);
	__type(value, struct path);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} paths SEC(".maps");

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

#define VXLAN_PORT 4789 /* RFC 7348 */
#define VXLAN_HLEN 8

/* Returns how long the IPv4 header at an offset and TCP's or UDP's behind it are together, and sets within to the offset of the
 * IPv4 header in the VXLAN packet that it is, or to 0. */
static __always_inline __u32 header_len(struct __sk_buff *skb, __u32 offset, __u32 *within)
{
	struct tcphdr tcp;
	struct udphdr udp;
	struct iphdr ip;
	__u32 len;

	*within = 0;
	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return 0;
	len = ip.ihl * 4;
	if (ip.protocol == IPPROTO_TCP)
		return bpf_skb_load_bytes(skb, offset + len, &tcp, sizeof(tcp)) ? len : len + tcp.doff * 4;
	if (ip.protocol != IPPROTO_UDP || bpf_skb_load_bytes(skb, offset + len, &udp, sizeof(udp)))
		return len;
	len += sizeof(udp);
	if (udp.dest == bpf_htons(VXLAN_PORT))
		*within = offset + len + VXLAN_HLEN + ETH_HLEN;
	return len;
}

/* Returns how long an IP packet is, or, if it is still to be cut into segments, the largest of them: the kernel hands it
 * from device to device whole. */
static __always_inline __u32 packet_len(struct __sk_buff *skb)
{
	const __u32 segment = skb->gso_size;
	__u32 len, within;

	if (!segment)
		return skb->len - ETH_HLEN;
	len = header_len(skb, ETH_HLEN, &within);
	if (within) {
		len = within - ETH_HLEN;
		len += header_len(skb, within, &within);
	}
	return len + segment;
}

/* Tells whether the packet is larger than the path carries, and counts it. */
static __always_inline bool exceeds_path(struct __sk_buff *skb, const struct path_key *key)
{
	struct path *path = bpf_map_lookup_elem(&paths, key);

	if (!path || skb->protocol != bpf_htons(ETH_P_IP) || packet_len(skb) <= path->mtu)
		return false;
	__sync_fetch_and_add(&path->lost, 1);
	return true;
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
	struct path_key path;
	struct fault *fault;
	struct ports ports;
	__be32 from, to;

	if (!read_addresses(skb, &from, &to))
		return PASS;
	path.from = ip_addr_v4(from);
	path.to = ip_addr_v4(to);
	if (exceeds_path(skb, &path))
		return TC_ACT_SHOT;
	fault = worse(NULL, &key);
	key.from = path.from;
	key.to = path.to;
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
