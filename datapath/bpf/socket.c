/* Services, translated where sockets name their peer: the cgroup's connect, sendmsg, recvmsg and
 * getpeername hooks. Packets never carry a service's address. */
#include "lib/drops.h"
#include "lib/net.h"
#include "lib/services.h"
#include "lib/translations.h"

#define ALLOW 1
#define REFUSE 0

#define ECONNREFUSED 111

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

static __always_inline struct translation_key translation_key4(struct bpf_sock_addr *ctx, __u8 protocol)
{
	struct translation_key key = {
		.cookie = bpf_get_socket_cookie(ctx),
		.address = ip_addr_v4(ctx->user_ip4),
		.port = (__be16)ctx->user_port,
		.protocol = protocol,
		.cluster = CLUSTER_MESH,
	};

	return key;
}

/* Replaces a service's address with that of one of its backends. */
static __always_inline int to_backend4(struct bpf_sock_addr *ctx)
{
	const __u8 protocol = frontend_protocol(ctx);
	const struct frontend *frontend;
	const struct backend *backend;
	struct translation service = {};
	struct translation_key key;

	if (!protocol)
		return ALLOW;
	frontend = frontend_lookup4(ctx->user_ip4, (__be16)ctx->user_port, protocol);
	if (!frontend)
		return ALLOW;
	backend = service_choose(frontend);
	if (!backend) {
		count_drop(DROP_NO_BACKEND, EGRESS, 0);
		bpf_set_retval(-ECONNREFUSED);
		return REFUSE;
	}

	service.address = ip_addr_v4(ctx->user_ip4);
	service.port = (__be16)ctx->user_port;
	ctx->user_ip4 = ip_addr_to_v4(&backend->address);
	ctx->user_port = backend->port;
	key = translation_key4(ctx, protocol);
	bpf_map_update_elem(&translations, &key, &service, BPF_ANY);
	return ALLOW;
}

/* Replaces a backend's address with that of the service that the socket named. */
static __always_inline int to_service4(struct bpf_sock_addr *ctx)
{
	const __u8 protocol = frontend_protocol(ctx);
	const struct translation *service;
	struct translation_key key;

	if (!protocol)
		return ALLOW;
	key = translation_key4(ctx, protocol);
	service = bpf_map_lookup_elem(&translations, &key);
	if (service) {
		ctx->user_ip4 = ip_addr_to_v4(&service->address);
		ctx->user_port = service->port;
	}
	return ALLOW;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return to_backend4(ctx);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return to_backend4(ctx);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return to_service4(ctx);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return to_service4(ctx);
}

char _license[] SEC("license") = "Dual MIT/GPL";
