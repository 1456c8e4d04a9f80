/* Which service a socket meant by the backend that it talks to, so that it hears of the service only. */
#pragma once

#include "net.h"

/* Preallocated, as every LRU map is: about 4 MiB. If a socket's entry is pushed out it still
 * works, but sees the backend's address. */
#define TRANSLATIONS_MAX (32 * 1024)

struct translation_key {
	__u64 cookie; /* of the socket */
	struct ip_addr address; /* of the backend */
	__be16 port;
	__u8 protocol;
	__u8 cluster;
	__u8 pad[4];
};

struct translation {
	struct ip_addr address; /* of the service */
	__be16 port;
	__u8 pad[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, TRANSLATIONS_MAX);
	__type(key, struct translation_key);
	__type(value, struct translation);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} translations SEC(".maps");
