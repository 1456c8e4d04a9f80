/* All maps of a node, and no program: the Go types of their keys and values are made from this object, once. */
#include "lib/addresses.h"
#include "lib/affinity.h"
#include "lib/drops.h"
#include "lib/echo.h"
#include "lib/endpoints.h"
#include "lib/l7.h"
#include "lib/nat.h"
#include "lib/nodes.h"
#include "lib/outside.h"
#include "lib/services.h"
#include "lib/translations.h"

/* Counts up when a map's layout changes in a way that its sizes don't show. Loading
 * refuses maps of another layout. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} layout SEC(".maps");

/* Mentioned so that Go gets them too. */
const enum drop_reason unused_drop_reason __attribute__((unused));
const enum direction unused_direction __attribute__((unused));
const enum address_kind unused_address_kind __attribute__((unused));
const enum frontend_flag unused_frontend_flag __attribute__((unused));
const enum l7_family unused_l7_family __attribute__((unused));
const enum affinity unused_affinity __attribute__((unused));
const enum backend_group unused_backend_group __attribute__((unused));
const enum backend_state unused_backend_state __attribute__((unused));
const enum node_mode unused_node_mode __attribute__((unused));
const enum echo_port unused_echo_port __attribute__((unused));
const enum echo_type unused_echo_type __attribute__((unused));
const struct echo_message unused_echo_message __attribute__((unused));
const struct echo_answer unused_echo_answer __attribute__((unused));

char _license[] SEC("license") = "Dual MIT/GPL";
