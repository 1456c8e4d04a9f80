/* What comes from outside of the cluster to a node port or an external IP: tc ingress and egress on the link to the underlay, beside the guard. Other packets
 * pass. */
#include "lib/balance.h"
#include "lib/natanswer.h"
#include "lib/net.h"
#include "lib/outside.h"

SEC("tc")
int from_outside(struct __sk_buff *skb)
{
	struct packet p;
	int verdict;

	/* What is another machine's comes along where a switch does not know whose it is. */
	if (!outside_is_used() || skb->pkt_type != PACKET_HOST || packet_is_vlans(skb) || !packet_is_ip(skb) || !packet_parse(skb, &p))
		return PASS;
	return balance(skb, &p, false, &verdict) ? verdict : PASS;
}

/* Answers of backends that are this node itself. */
SEC("tc")
int to_outside(struct __sk_buff *skb)
{
	struct packet p;

	if (!outside_is_used() || packet_is_vlans(skb) || !packet_is_ip(skb) || !packet_parse(skb, &p))
		return PASS;
	return nat_own_answer(skb, &p) ? PASS : drop(skb, DROP_MALFORMED, EGRESS);
}

char _license[] SEC("license") = "Dual MIT/GPL";
