/* How programs tell what came out of WireGuard. */
#pragma once

/* skb->mark of what a WireGuard device of ours has received; the slot is in the lower half. It outlives the removal of VXLAN's headers. */
#define WIREGUARD_MARK 0xca5e0000
#define WIREGUARD_MARK_MASK 0xffff0000
