/* Services, translated where sockets name their peer: the cgroup's connect, sendmsg, recvmsg and
 * getpeername hooks. Packets never carry a service's address, but
 * for those to the node's own proxy.
 *
 * IPv6 sockets may name IPv4 peers, as ::ffff:a.b.c.d. The verifier lets a hook touch the
 * address fields of one family only, so each reads and writes its own; what happens in between is the same. */
#include "lib/affinity.h"
#include "lib/drops.h"
#include "lib/l7.h"
#include "lib/net.h"
#include "lib/services.h"
#include "lib/translations.h"

#define ALLOW 1
#define REFUSE 0

#define ECONNREFUSED 111

/* Whom a socket talks to. */
struct peer {
	struct ip_addr address;
	__be16 port;
};

static __always_inline struct peer peer_read4(const struct bpf_sock_addr *ctx)
{
	struct peer peer = {
		.address = ip_addr_v4(ctx->user_ip4),
		.port = (__be16)ctx->user_port,
	};

	return peer;
}

static __always_inline void peer_write4(struct bpf_sock_addr *ctx, const struct peer *peer)
{
	ctx->user_ip4 = ip_addr_to_v4(&peer->address);
	ctx->user_port = peer->port;
}

static __always_inline struct peer peer_read6(const struct bpf_sock_addr *ctx)
{
	struct peer peer = { .port = (__be16)ctx->user_port };
	__be32 *words = (__be32 *)peer.address.bytes;

	words[0] = ctx->user_ip6[0];
	words[1] = ctx->user_ip6[1];
	words[2] = ctx->user_ip6[2];
	words[3] = ctx->user_ip6[3];
	return peer;
}

static __always_inline void peer_write6(struct bpf_sock_addr *ctx, const struct peer *peer)
{
	const __be32 *words = (const __be32 *)peer->address.bytes;

	ctx->user_ip6[0] = words[0];
	ctx->user_ip6[1] = words[1];
	ctx->user_ip6[2] = words[2];
	ctx->user_ip6[3] = words[3];
	ctx->user_port = peer->port;
}

/* Returns the protocol that a frontend of the socket has, or 0. */
static __always_inline __u8 frontend_protocol(const struct bpf_sock_addr *ctx)
{
	switch (ctx->protocol) {
	case IPPROTO_TCP:
	case IPPROTO_MPTCP:
		return IPPROTO_TCP;
	case IPPROTO_UDP:
		return IPPROTO_UDP;
	default:
		return 0;
	}
}

static __always_inline struct translation_key translation_key(struct bpf_sock_addr *ctx, const struct peer *backend,
							     __u8 protocol)
{
	struct translation_key key = {
		.cookie = bpf_get_socket_cookie(ctx),
		.address = backend->address,
		.port = backend->port,
		.protocol = protocol,
		.cluster = CLUSTER_MESH,
	};

	return key;
}

/* Tells whether this node's proxy takes connections to an address. */
static __always_inline bool proxy_listens(const struct ip_addr *a)
{
	void *listener = l7_listener(a);

	if (!listener)
		return false;
	bpf_sk_release(listener);
	return true;
}

/* Replaces a service's address with that of one of its backends, unless its connections are the proxy's. Returns the hook's verdict. */
static __always_inline int to_backend(struct bpf_sock_addr *ctx, struct peer *peer)
{
	const __u8 protocol = frontend_protocol(ctx);
	const struct frontend *frontend;
	const struct backend *backend;
	struct translation service = {};
	struct translation_key key;
	struct session_key client;
	__u32 number;

	if (!protocol)
		return ALLOW;
	frontend = frontend_lookup(&peer->address, peer->port, protocol);
	if (!frontend)
		return ALLOW;
	if (frontend_is_l7(frontend, protocol)) {
		if (proxy_listens(&peer->address))
			return ALLOW;
		count_l7_fallback();
	}
	client = session_of_namespace(bpf_get_netns_cookie(ctx));
	backend = session_choose(frontend, &client, &number);
	/* Of the other family it could not be written where it has to be. */
	if (!backend || ip_addr_is_v4(&backend->address) != ip_addr_is_v4(&peer->address)) {
		count_drop(DROP_NO_BACKEND, EGRESS, 0);
		bpf_set_retval(-ECONNREFUSED);
		return REFUSE;
	}

	service.address = peer->address;
	service.port = peer->port;
	peer->address = backend->address;
	peer->port = backend->port;
	key = translation_key(ctx, peer, protocol);
	bpf_map_update_elem(&translations, &key, &service, BPF_ANY);
	return ALLOW;
}

/* Replaces a backend's address with that of the service that the socket named. */
static __always_inline void to_service(struct bpf_sock_addr *ctx, struct peer *peer)
{
	const __u8 protocol = frontend_protocol(ctx);
	const struct translation *service;
	struct translation_key key;

	if (!protocol)
		return;
	key = translation_key(ctx, peer, protocol);
	service = bpf_map_lookup_elem(&translations, &key);
	if (service) {
		peer->address = service->address;
		peer->port = service->port;
	}
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read4(ctx);
	const int verdict = to_backend(ctx, &peer);

	peer_write4(ctx, &peer);
	return verdict;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read6(ctx);
	const int verdict = to_backend(ctx, &peer);

	peer_write6(ctx, &peer);
	return verdict;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read4(ctx);
	const int verdict = to_backend(ctx, &peer);

	peer_write4(ctx, &peer);
	return verdict;
}

/* Only for IPv6 peers: the kernel hands an IPv6 socket's datagrams to IPv4 peers to sendmsg4. */
SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read6(ctx);
	const int verdict = to_backend(ctx, &peer);

	peer_write6(ctx, &peer);
	return verdict;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read4(ctx);

	to_service(ctx, &peer);
	peer_write4(ctx, &peer);
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read6(ctx);

	to_service(ctx, &peer);
	peer_write6(ctx, &peer);
	return ALLOW;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read4(ctx);

	to_service(ctx, &peer);
	peer_write4(ctx, &peer);
	return ALLOW;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct peer peer = peer_read6(ctx);

	to_service(ctx, &peer);
	peer_write6(ctx, &peer);
	return ALLOW;
}

char _license[] SEC("license") = "Dual MIT/GPL";
