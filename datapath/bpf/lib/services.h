/* Services: what clients connect to, and the backends that stand behind it.
 *
 * A frontend (address, port, protocol) says how to choose, a service says how many there are to choose
 * from, a slot says which backend has a number, a backend says where it is. One more or one backend less
 * is a handful of writes, whatever the size of the service: slots are numbered without holes, a
 * removed one is filled by the last. */
#pragma once

#include "net.h"

#define FRONTENDS_MAX (64 * 1024)
#define SERVICES_MAX (64 * 1024)
#define SLOTS_MAX (256 * 1024)
#define BACKENDS_MAX (256 * 1024)

enum affinity {
	AFFINITY_NONE = 0,
	AFFINITY_LOCAL, /* this cluster's backends, if there are any */
	AFFINITY_REMOTE, /* the other clusters' backends, if there are any */
};

enum algorithm {
	ALGORITHM_RANDOM = 0,
};

enum frontend_flag {
	FRONTEND_L7 = 1, /* connections are this node's proxy's, as long as it listens: see l7.h */
};

enum backend_group {
	GROUP_LOCAL = 0, /* backends of this cluster */
	GROUP_REMOTE, /* backends of other clusters */
	GROUPS,
};

enum backend_state {
	BACKEND_ACTIVE = 0,
	BACKEND_QUARANTINED, /* gets no new connections, unless all are so; as its slots say */
};

struct frontend_key {
	struct ip_addr address;
	__be16 port;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 cluster;
};

struct frontend {
	__u32 service;
	__u8 owner; /* ID of the cluster that the address is of */
	__u8 affinity; /* enum affinity */
	__u8 algorithm; /* enum algorithm */
	__u8 flags; /* enum frontend_flag */
	__u32 session_seconds; /* how long a client stays with its backend; 0: not at all */
	__be16 l7_port; /* where this node's L7 proxy listens for it; 0: none */
	__u8 pad[2];
};

struct service {
	/* Names the service's port across restarts of the agent: see portID in lbstate.go. */
	__u64 port_id;
	/* By group: how many slots may be chosen from, which are numbered from 0, and how many
	 * follow them whose backends get no new connections. One map value, so that programs see both change at once. */
	__u32 count[GROUPS];
	__u32 quarantined[GROUPS];
	__u32 flags;
	__u8 pad[4];
};

struct slot_key {
	__u32 service;
	__u32 index;
	__u8 group; /* enum backend_group */
	__u8 pad[3];
};

struct backend {
	struct ip_addr address;
	__be16 port;
	__u8 protocol;
	__u8 cluster; /* address space of address */
	__u8 owner; /* ID of the cluster that the backend is of */
	__u8 state; /* enum backend_state */
	__u8 flags;
	__u8 pad[1];
	__u32 service; /* whose backend it is */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FRONTENDS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} frontends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, SERVICES_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct service);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, SLOTS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct slot_key);
	__type(value, __u32); /* number of the backend */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, BACKENDS_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct backend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} backends SEC(".maps");

static __always_inline const struct frontend *frontend_lookup(const struct ip_addr *address, __be16 port,
							       __u8 protocol)
{
	struct frontend_key key = {
		.address = *address,
		.port = port,
		.protocol = protocol,
		.cluster = CLUSTER_MESH,
	};

	return bpf_map_lookup_elem(&frontends, &key);
}

/* Tells whether the frontend's service has a backend that is not quarantined. */
static __always_inline bool service_has_active(const struct frontend *f)
{
	const struct service *service = bpf_map_lookup_elem(&services, &f->service);

	return service && service->count[GROUP_LOCAL] + service->count[GROUP_REMOTE];
}

/* Picks a slot at random, in the group that the affinity prefers, among those that may be chosen. If there are none in
 * either group, all backends are quarantined, and then quarantine counts for nothing: failure detection may be
 * wrong, and a connection that may fail is better than one that can't succeed. Returns false if there is no slot
 * at all. */
static __always_inline bool service_pick_slot(const struct frontend *f, struct slot_key *slot)
{
	const struct service *service = bpf_map_lookup_elem(&services, &f->service);
	__u32 local, remote;

	if (!service)
		return false;
	local = service->count[GROUP_LOCAL];
	remote = service->count[GROUP_REMOTE];
	if (local + remote == 0) {
		/* They are numbered from 0 then, as nothing precedes them. */
		local = service->quarantined[GROUP_LOCAL];
		remote = service->quarantined[GROUP_REMOTE];
	}
	if (f->affinity == AFFINITY_LOCAL && local)
		remote = 0;
	if (f->affinity == AFFINITY_REMOTE && remote)
		local = 0;
	if (local + remote == 0)
		return false;

	slot->service = f->service;
	slot->group = GROUP_LOCAL;
	slot->index = bpf_get_prandom_u32() % (local + remote);
	if (slot->index >= local) {
		slot->group = GROUP_REMOTE;
		slot->index -= local;
	}
	return true;
}

/* A slot may vanish between reading the count and reading the slot; the next attempt sees the new
 * count. */
#define CHOOSE_ATTEMPTS 4

/* Returns a backend for a new connection, and its number, or NULL if the service has none. */
static __always_inline const struct backend *service_choose(const struct frontend *f, __u32 *number)
{
	struct slot_key slot = {};

	for (int i = 0; i < CHOOSE_ATTEMPTS; i++) {
		const struct backend *backend;
		const __u32 *id;

		if (!service_pick_slot(f, &slot))
			return NULL;
		id = bpf_map_lookup_elem(&slots, &slot);
		if (!id)
			continue;
		*number = *id;
		backend = bpf_map_lookup_elem(&backends, number);
		if (backend)
			return backend;
	}
	return NULL;
}
