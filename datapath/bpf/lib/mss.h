/* Lowers the segment size that TCP's ends tell each other (RFC 9293, section 3.7.1) to what gets to the other node, so that no segment is
 * too large to begin with. */
#pragma once

#include <linux/tcp.h>

#include "net.h"

#define MSS_KIND_END 0
#define MSS_KIND_NOP 1
#define MSS_KIND_MSS 2
#define MSS_LEN 4

/* In bytes, which bounds their number too. */
#define TCP_OPTIONS_MAX 40

/* Bytes 12 and 13 of TCP's header: its length in words, and flags. */
#define TCP_FLAGS_OFFSET 12
#define TCP_FLAG_SYN_BIT 0x02
#define TCP_CHECK_OFFSET 16

struct tcp_option {
	__u8 kind;
	__u8 len;
	__be16 value;
};

/* Puts the segment size at the offset into the packet; tcp is where TCP's header begins. */
static __always_inline void mss_store(struct __sk_buff *skb, __u32 tcp, __u32 offset, __be16 old, __be16 new)
{
	const bool odd = (offset - tcp) & 1;

	if (bpf_skb_store_bytes(skb, offset, &new, sizeof(new), 0))
		return;
	/* The sum is over words of 16 bits from the header's first byte on (RFC 1071, section 2 (B)). */
	if (odd) {
		old = __builtin_bswap16(old);
		new = __builtin_bswap16(new);
	}
	bpf_l4_csum_replace(skb, tcp + TCP_CHECK_OFFSET, old, new, sizeof(new));
}

/* Lowers the segment size that a TCP option says to at most max bytes, in the TCP header at an offset. Returns 0. It is a global function so
 * that the verifier looks at the walk over the options once, and not for each way that leads here. */
__noinline int mss_lower(struct __sk_buff *skb, __u32 tcp, __u32 max)
{
	struct tcp_option option;
	__u8 flags[2];
	__u32 at, end;

	if (bpf_skb_load_bytes(skb, tcp + TCP_FLAGS_OFFSET, flags, sizeof(flags)) || !(flags[1] & TCP_FLAG_SYN_BIT))
		return 0;
	at = tcp + sizeof(struct tcphdr);
	end = tcp + (flags[0] >> 4) * 4;
	for (int i = 0; i < TCP_OPTIONS_MAX; i++) {
		/* The last options of a packet may be shorter, but the one that is looked for is not. */
		if (at + MSS_LEN > end || bpf_skb_load_bytes(skb, at, &option, sizeof(option)))
			return 0;
		if (option.kind == MSS_KIND_END)
			return 0;
		if (option.kind == MSS_KIND_NOP) {
			at++;
			continue;
		}
		if (option.len < 2)
			return 0;
		if (option.kind == MSS_KIND_MSS) {
			if (option.len == MSS_LEN && bpf_ntohs(option.value) > max)
				mss_store(skb, tcp, at + 2, option.value, bpf_htons(max));
			return 0;
		}
		at += option.len;
	}
	return 0;
}

/* Lowers the segment size in a SYN or its answer to what fits into IP packets of an MTU, in bytes. It is never raised, and none is put where
 * there is none. Pointers into the packet are invalid afterwards. */
static __always_inline void mss_clamp(struct __sk_buff *skb, const struct packet *p, __u16 mtu)
{
	const __u16 headers = (p->version == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) + sizeof(struct tcphdr);

	if (p->protocol == IPPROTO_TCP && !p->fragment && mtu > headers)
		mss_lower(skb, ETH_HLEN + p->header_len, mtu - headers);
}
