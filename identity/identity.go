// Package identity says who is who: labels map to numeric identities that hold
// in the whole mesh, and addresses map to identities and to the nodes that
// own them. It defines these rows, their stored form, their StateDB tables and
// the allocation of numbers.
package identity

import (
	"fmt"
	"strconv"
)

// ClusterID numbers a cluster of the mesh, 1–255; 0 is none.
type ClusterID uint8

// Number is a security identity: 24 bits, the upper 8 the cluster's ID, the lower
// 16 local to that cluster. 0–255 are reserved and the same everywhere. It
// travels as the VNI of every VXLAN packet.
type Number uint32

// Reserved identities; the numbers are those of Cilium, so that tools agree.
const (
	Unknown    Number = 0
	Host       Number = 1 // the node that the packet is on
	World      Number = 2 // outside of the mesh
	Health     Number = 4
	Init       Number = 5 // an endpoint whose labels are not known yet
	RemoteNode Number = 6 // another node of the mesh

	// MaxReserved is the last reserved number.
	MaxReserved Number = 255
	// MinLocal and MaxLocal bound the lower 16 bits of an allocated identity.
	MinLocal Number = 256
	MaxLocal Number = 65535
	// Max is the largest identity there can be.
	Max Number = 1<<24 - 1
)

var reservedNames = map[Number]string{
	Unknown: "unknown", Host: "host", World: "world", Health: "health", Init: "init", RemoteNode: "remote-node",
}

// Compose returns the identity of a cluster with the given lower 16 bits.
func Compose(cluster ClusterID, local uint16) Number {
	return Number(cluster)<<16 | Number(local)
}

// Cluster returns the upper 8 bits: whose identity this is, 0 if it is reserved.
func (n Number) Cluster() ClusterID { return ClusterID(n >> 16) }

// Reserved tells whether n is one of the numbers that no cluster allocates.
func (n Number) Reserved() bool { return n <= MaxReserved }

// Valid tells whether n may be allocated by a cluster: 24 bits, a cluster, a local part that isn't reserved.
func (n Number) Valid() bool {
	return n <= Max && n.Cluster() != 0 && n&0xffff >= MinLocal
}

// String returns the decimal number, or the name of a reserved identity.
func (n Number) String() string {
	if name, ok := reservedNames[n]; ok {
		return name
	}
	return strconv.FormatUint(uint64(n), 10)
}

// Detail returns the number with its cluster, "65792 (cluster 1, local 256)".
func (n Number) Detail() string {
	if n.Reserved() {
		return "reserved:" + n.String()
	}
	return fmt.Sprintf("%d (cluster %d, local %d)", uint32(n), n.Cluster(), n&0xffff)
}

// ProxyMark is the SO_MARK that a connection of the L7 proxy has, besides the identity of the client in whose name it is; ProxyMarkMask is its part of a mark. The
// program on the tunnel device sends what is so marked as that identity.
const (
	ProxyMark     = 0xcb000000
	ProxyMarkMask = 0xff000000
)
