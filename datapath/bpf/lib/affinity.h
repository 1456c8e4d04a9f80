/* Session affinity: which backend a client had last, so that its next connection to the same service gets it too. */
#pragma once

#include "net.h"
#include "services.h"

/* Preallocated, as every LRU map is: about 8 MiB. A client whose entry is pushed out is as one that has been away for too long. */
#define SESSIONS_MAX (64 * 1024)

enum session_client_kind {
	SESSION_NAMESPACE = 0, /* a pod, or the node itself, by the cookie of its network namespace */
	SESSION_ADDRESS, /* who sends from an address outside of the cluster */
};

struct session_key {
	struct ip_addr client; /* the address; or the cookie, and zeros */
	__u32 service;
	__u8 kind; /* enum session_client_kind */
	__u8 cluster; /* address space of client */
	__u8 pad[2];
};

struct session {
	__u64 used; /* when the client last connected, in nanoseconds since boot */
	__u32 backend;
	__u8 pad[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, SESSIONS_MAX);
	__type(key, struct session_key);
	__type(value, struct session);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} sessions SEC(".maps");

/* The client that a process is which has a socket in the network namespace. */
static __always_inline struct session_key session_of_namespace(__u64 cookie)
{
	struct session_key key = {
		.kind = SESSION_NAMESPACE,
		.cluster = CLUSTER_MESH,
	};
	__u32 *words = (__u32 *)key.client.bytes;

	words[0] = cookie;
	words[1] = cookie >> 32;
	return key;
}

/* The client that sends from an address. */
static __always_inline struct session_key session_of_address(const struct ip_addr *address)
{
	struct session_key key = {
		.client = *address,
		.kind = SESSION_ADDRESS,
		.cluster = CLUSTER_MESH,
	};

	return key;
}

/* Returns the backend that the client had last, or NULL if that is too long ago or it can't have that one any more. */
static __always_inline const struct backend *session_backend(const struct frontend *f, const struct session *last, __u64 now)
{
	const struct backend *backend;

	if (now > last->used + (__u64)f->session_seconds * 1000000000) /* Another CPU may have set it later than now. */
		return NULL;
	backend = bpf_map_lookup_elem(&backends, &last->backend);
	/* A backend that has gone may have left its number to one of another service. */
	if (!backend || backend->service != f->service)
		return NULL;
	if (backend->state == BACKEND_QUARANTINED && service_has_active(f))
		return NULL;
	return backend;
}

/* Returns the backend that the client had last and still can have, and its number, or NULL. */
static __always_inline const struct backend *session_resume(const struct frontend *f, const struct session_key *client, __u64 now, __u32 *number)
{
	struct session *last = bpf_map_lookup_elem(&sessions, client);
	const struct backend *backend;

	if (!last)
		return NULL;
	*number = last->backend;
	backend = session_backend(f, last, now);
	if (backend)
		last->used = now;
	else
		bpf_map_delete_elem(&sessions, client);
	return backend;
}

/* Returns the backend for a client's new connection, and its number, or NULL if the service has none: the one that it had last, if the frontend
 * wants that. It sets the client's service. */
static __always_inline const struct backend *session_choose(const struct frontend *f, struct session_key *client, __u32 *number)
{
	const struct backend *backend, *others;
	struct session chosen = {};

	if (!f->session_seconds)
		return service_choose(f, number);
	chosen.used = bpf_ktime_get_boot_ns();
	client->service = f->service;
	backend = session_resume(f, client, chosen.used, number);
	if (backend)
		return backend;
	backend = service_choose(f, &chosen.backend);
	*number = chosen.backend;
	if (!backend || !bpf_map_update_elem(&sessions, client, &chosen, BPF_NOEXIST))
		return backend;
	/* A connection that the client makes at the same time was faster; or the map takes no more, and then each goes where it may. */
	others = session_resume(f, client, chosen.used, number);
	if (others)
		return others;
	*number = chosen.backend;
	return backend;
}
