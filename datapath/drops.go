package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// Drop counts the packets that were dropped for one reason in one direction.
type Drop struct {
	Reason string
	// Direction as seen from the node's workloads: "egress" is what they send.
	Direction string
	Packets   uint64
	Bytes     uint64
}

// Reasons for drops, as Drops names them.
const (
	DropMalformed       = "malformed packet"
	DropNotIP           = "neither IP nor ARP"
	DropIPv6LinkLocal   = "IPv6 link-local (harmless)"
	DropSpoofedAddress  = "source address is not the pod's"
	DropSpoofedMAC      = "source MAC is not the pod's"
	DropTTLExpired      = "TTL expired"
	DropTooBig          = "larger than the way's MTU"
	DropNoEndpoint      = "no such endpoint on the node"
	DropUnusedAddress   = "no endpoint or service at the address"
	DropNoTunnelKey     = "came without a tunnel key"
	DropUnknownNode     = "sent by an unknown node"
	DropForeignIdentity = "identity is not of the sending node's cluster"
	DropNoBackend       = "service has no backend"
	DropNoTunnel        = "tunnel refused by the kernel"
	DropNoNode          = "no such node"
	DropUnencrypted     = "must be encrypted and cannot be"
	DropCleartext       = "not encrypted as agreed with the sending node"
	DropNotVXLAN        = "not the tunnel's, in WireGuard"
	DropNoNATPort       = "no port is left for a connection from outside"
	DropNoConnection    = "of no connection from outside"
	DropFragment        = "fragment of a packet to a service, from outside"
)

var dropReasons = map[bpfDropReason]string{
	bpfDropReasonDROP_MALFORMED:        DropMalformed,
	bpfDropReasonDROP_NOT_IP:           DropNotIP,
	bpfDropReasonDROP_IPV6LINK_LOCAL:   DropIPv6LinkLocal,
	bpfDropReasonDROP_SPOOFED_ADDRESS:  DropSpoofedAddress,
	bpfDropReasonDROP_SPOOFED_MAC:      DropSpoofedMAC,
	bpfDropReasonDROP_TTL_EXPIRED:      DropTTLExpired,
	bpfDropReasonDROP_TOO_BIG:          DropTooBig,
	bpfDropReasonDROP_NO_ENDPOINT:      DropNoEndpoint,
	bpfDropReasonDROP_UNUSED_ADDRESS:   DropUnusedAddress,
	bpfDropReasonDROP_NO_TUNNEL_KEY:    DropNoTunnelKey,
	bpfDropReasonDROP_UNKNOWN_NODE:     DropUnknownNode,
	bpfDropReasonDROP_FOREIGN_IDENTITY: DropForeignIdentity,
	bpfDropReasonDROP_NO_BACKEND:       DropNoBackend,
	bpfDropReasonDROP_NO_TUNNEL:        DropNoTunnel,
	bpfDropReasonDROP_NO_NODE:          DropNoNode,
	bpfDropReasonDROP_UNENCRYPTED:      DropUnencrypted,
	bpfDropReasonDROP_CLEARTEXT:        DropCleartext,
	bpfDropReasonDROP_NOT_VXLAN:        DropNotVXLAN,
	bpfDropReasonDROP_NO_NAT_PORT:      DropNoNATPort,
	bpfDropReasonDROP_NO_CONNECTION:    DropNoConnection,
	bpfDropReasonDROP_FRAGMENT:         DropFragment,
}

var directions = map[bpfDirection]string{bpfDirectionEGRESS: "egress", bpfDirectionINGRESS: "ingress"}

// Drops returns the counters that aren't zero, summed over CPUs, ordered by
// reason. They count since the maps were made, across restarts of the agent.
func (m *Maps) Drops() ([]Drop, error) {
	var all []Drop
	for reason := bpfDropReason(1); reason < bpfDropReasonDROP_REASON_MAX; reason++ {
		for _, direction := range []bpfDirection{bpfDirectionEGRESS, bpfDirectionINGRESS} {
			sum, err := sumDrops(m.drops, uint32(reason)*2+uint32(direction))
			if err != nil {
				return nil, err
			}
			if sum.Packets != 0 {
				all = append(all, Drop{Reason: dropReasons[reason], Direction: directions[direction], Packets: sum.Packets, Bytes: sum.Bytes})
			}
		}
	}
	return all, nil
}

func sumDrops(m *ebpf.Map, slot uint32) (sum bpfDropCount, err error) {
	var perCPU []bpfDropCount
	if err := m.Lookup(slot, &perCPU); err != nil {
		return sum, fmt.Errorf("reading the drop counters: %w", err)
	}
	for _, c := range perCPU {
		sum.Packets += c.Packets
		sum.Bytes += c.Bytes
	}
	return sum, nil
}
