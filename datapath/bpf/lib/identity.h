/* Security identities: 24 bits, the upper 8 the cluster's ID. See package identity. */
#pragma once

#include "net.h"

#define IDENTITY_HOST 1
#define IDENTITY_WORLD 2
#define IDENTITY_REMOTE_NODE 6
#define IDENTITY_RESERVED_MAX 255

static __always_inline __u8 identity_cluster(__u32 identity)
{
	return (identity >> 16) & 0xff;
}

static __always_inline bool identity_is_reserved(__u32 identity)
{
	return identity <= IDENTITY_RESERVED_MAX;
}
