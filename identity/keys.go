package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"causeway/kvstore"
)

// Keys of the entries that speak for the whole cluster of a store.
const (
	// ClusterKey holds the ClusterInfo.
	ClusterKey = kvstore.Prefix + "cluster"
	// HeartbeatKey holds a Heartbeat that any node renews: who reads it knows that the store takes writes.
	HeartbeatKey = kvstore.Prefix + "heartbeat"
)

// NodesPrefix starts the keys of a cluster's nodes.
func NodesPrefix(cluster string) string { return kvstore.Prefix + "nodes/" + cluster + "/" }

// NodeKey is where a node describes itself.
func NodeKey(cluster, node string) string { return NodesPrefix(cluster) + node }

// AddressesPrefix starts the keys of a cluster's addresses.
func AddressesPrefix(cluster string) string { return kvstore.Prefix + "addresses/" + cluster + "/" }

// AddressKey is where the owner of an address says who is behind it.
func AddressKey(cluster string, ip netip.Addr) string { return AddressesPrefix(cluster) + ip.String() }

// IdentitiesPrefix starts all keys of a cluster's identities: numbers, labels and references.
func IdentitiesPrefix(cluster string) string { return kvstore.Prefix + "identities/" + cluster + "/" }

// IDsPrefix starts the keys of a cluster's identities by number; who follows the cluster reads these.
func IDsPrefix(cluster string) string { return IdentitiesPrefix(cluster) + "ids/" }

// IdentityKey is where the labels of an identity are stored.
func IdentityKey(cluster string, n Number) string { return IDsPrefix(cluster) + decimal(n) }

// LabelsPrefix starts the keys of a cluster's identities by labels.
func LabelsPrefix(cluster string) string { return IdentitiesPrefix(cluster) + "labels/" }

// LabelsKey is where the identity of labels is stored: under the SHA-256 of their canonical form.
func LabelsKey(cluster string, labels Labels) string {
	sum := sha256.Sum256([]byte(labels.String()))
	return LabelsPrefix(cluster) + hex.EncodeToString(sum[:])
}

// RefsPrefix starts the keys of the nodes that use identity n.
func RefsPrefix(cluster string, n Number) string { return refsPrefix(cluster) + decimal(n) + "/" }

func refsPrefix(cluster string) string { return IdentitiesPrefix(cluster) + "refs/" }

// RefKey is where a node says that it uses identity n.
func RefKey(cluster string, n Number, node string) string { return RefsPrefix(cluster, n) + node }

// SyncedPrefix starts the keys of a cluster's synced marks.
func SyncedPrefix(cluster string) string { return kvstore.Prefix + "synced/" + cluster + "/" }

// SyncedKey is where a node says that all it has to publish is in the store, and with ServicesMark for a node, whoever publishes the cluster's services.
func SyncedKey(cluster, node string) string { return SyncedPrefix(cluster) + node }

// ServicesMark is in the place of a node in the mark that is the cluster's own: that the services and slices are there which it has for others. It is
// no DNS label, and so never a node's name.
const ServicesMark = "_services"

// splitKey returns the n parts after prefix.
func splitKey(key, prefix string, n int) ([]string, error) {
	rest, found := strings.CutPrefix(key, prefix)
	parts := strings.Split(rest, "/")
	if !found || len(parts) != n {
		return nil, fmt.Errorf("key %s is not that of an entry under %s", quote(key), prefix)
	}
	return parts, nil
}

// decimal is the number in digits, where String has names for reserved ones.
func decimal(n Number) string { return strconv.FormatUint(uint64(n), 10) }
