/* Lost packets for the test-bed, IPv4 and IPv6 alike: tc ingress on the ports of its underlay's bridge. No part of a node. */
#include <linux/ipv6.h>
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

/* Sender's and target's IPv4 address in an ARP packet. What asks for an IPv6 address goes to a multicast address, which is
 * nobody's path; the answer goes to one host. */
#define ARP_HLEN 8
#define ARP_SENDER_OFFSET (ETH_HLEN + ARP_HLEN + ETH_ALEN)
#define ARP_TARGET_OFFSET (ARP_SENDER_OFFSET + 4 + ETH_ALEN)

static __always_inline bool read_pair4(struct __sk_buff *skb, __u32 from_offset, __u32 to_offset, struct path_key *path)
{
	__be32 from, to;

	if (bpf_skb_load_bytes(skb, from_offset, &from, 4) || bpf_skb_load_bytes(skb, to_offset, &to, 4))
		return false;
	path->from = ip_addr_v4(from);
	path->to = ip_addr_v4(to);
	return true;
}

static __always_inline bool read_addresses(struct __sk_buff *skb, struct path_key *path)
{
	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
		return read_pair4(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, saddr), ETH_HLEN + __builtin_offsetof(struct iphdr, daddr), path);
	case bpf_htons(ETH_P_ARP):
		return read_pair4(skb, ARP_SENDER_OFFSET, ARP_TARGET_OFFSET, path);
	case bpf_htons(ETH_P_IPV6):
		return !bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct ipv6hdr, saddr), &path->from, sizeof(path->from)) &&
		       !bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct ipv6hdr, daddr), &path->to, sizeof(path->to));
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

/* What an IP header says: how long it is, and what follows it. */
struct ip_info {
	__u32 len;
	__u8 protocol;
	bool later_fragment;
};

/* Reads the IP header at an offset. Of IPv6 the fixed header alone: nothing on the underlay has extensions but fragments, whose
 * protocol is that of the extension. */
static __always_inline bool read_ip(struct __sk_buff *skb, __u32 offset, struct ip_info *info)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return false;
	info->later_fragment = false;
	if (ip.version == 6) {
		info->len = sizeof(struct ipv6hdr);
		return !bpf_skb_load_bytes(skb, offset + __builtin_offsetof(struct ipv6hdr, nexthdr), &info->protocol, 1);
	}
	info->len = ip.ihl * 4;
	info->protocol = ip.protocol;
	info->later_fragment = ip.frag_off & bpf_htons(FRAGMENT_OFFSET);
	return true;
}

static __always_inline bool is_ip(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_IP) || skb->protocol == bpf_htons(ETH_P_IPV6);
}

static __always_inline bool read_ports(struct __sk_buff *skb, __u8 *protocol, struct ports *ports)
{
	struct ip_info ip;

	if (!is_ip(skb) || !read_ip(skb, ETH_HLEN, &ip) || ip.later_fragment)
		return false;
	if (ip.protocol != IPPROTO_TCP && ip.protocol != IPPROTO_UDP)
		return false;
	*protocol = ip.protocol;
	return !bpf_skb_load_bytes(skb, ETH_HLEN + ip.len, ports, sizeof(*ports));
}

#define VXLAN_PORT 4789 /* RFC 7348 */
#define VXLAN_HLEN 8

/* Returns how long the IP header at an offset and TCP's or UDP's behind it are together, and sets within to the offset of the
 * IP header in the VXLAN packet that it is, or to 0. */
static __always_inline __u32 header_len(struct __sk_buff *skb, __u32 offset, __u32 *within)
{
	struct tcphdr tcp;
	struct udphdr udp;
	struct ip_info ip;
	__u32 len;

	*within = 0;
	if (!read_ip(skb, offset, &ip))
		return 0;
	len = ip.len;
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

	if (!path || !is_ip(skb) || packet_len(skb) <= path->mtu)
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

	if (!read_addresses(skb, &path))
		return PASS;
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
