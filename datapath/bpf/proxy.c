/* New connections to services that are balanced at L7, on their way into this node's stack: sk_lookup, on the node's network namespace.
 * It sees what comes to local addresses, from pods and from the node's own processes, once a connection. */
#include "lib/l7.h"
#include "lib/net.h"
#include "lib/services.h"

/* This node's address on the underlay, which no service has. */
volatile const struct ip_addr node_address = {};

#define AF_INET 2

/* Keeps the compiler from reading a field of either family through one pointer, which the verifier refuses. */
#define READ_NOW(variable) asm volatile("" : "+r"(variable))

static __always_inline struct ip_addr local_address(const struct bpf_sk_lookup *ctx)
{
	struct ip_addr a = {};
	__be32 *words = (__be32 *)a.bytes;
	__be32 v4 = ctx->local_ip4;

	READ_NOW(v4);
	if (ctx->family == AF_INET)
		return ip_addr_v4(v4);
	words[0] = ctx->local_ip6[0];
	words[1] = ctx->local_ip6[1];
	words[2] = ctx->local_ip6[2];
	words[3] = ctx->local_ip6[3];
	return a;
}

/* Gives a connection to an L7 frontend to the proxy. Whatever else is sent to the frontend's address is refused: the address is local, but
 * the node's own listeners are not the service's. */
SEC("sk_lookup")
int to_proxy(struct bpf_sk_lookup *ctx)
{
	const struct ip_addr address = local_address(ctx);
	const struct frontend *frontend;
	void *listener;
	long failed;

	if (ip_addr_is(&address, &node_address) || !l7_has_address(&address))
		return SK_PASS;
	if (ctx->protocol != IPPROTO_TCP)
		return SK_DROP;
	frontend = frontend_lookup(&address, bpf_htons(ctx->local_port), IPPROTO_TCP);
	if (!frontend || !frontend_is_l7(frontend, IPPROTO_TCP))
		return SK_DROP;
	listener = l7_listener(&address);
	if (!listener)
		return SK_DROP;
	failed = bpf_sk_assign(ctx, listener, 0);
	bpf_sk_release(listener);
	return failed ? SK_DROP : SK_PASS;
}

char _license[] SEC("license") = "Dual MIT/GPL";
