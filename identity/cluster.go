package identity

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"causeway/kvstore"
	"causeway/lb"
)

// ClusterInfo is what a cluster says of itself, in its own store under ClusterKey.
type ClusterInfo struct {
	Name string    `json:"name"`
	ID   ClusterID `json:"id"`
	// PodCIDRs that all of its nodes' lie in.
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	// ServiceCIDRs that it allocates cluster IPs from, at most one of IPv4 and one of IPv6.
	ServiceCIDRs []netip.Prefix `json:"serviceCIDRs"`
	// Version of Causeway, for people.
	Version string `json:"version"`
	// Encryption is the cluster's mode; empty, as old versions have it, is EncryptOff.
	Encryption Encryption `json:"encryption,omitempty"`
	// Capabilities that all of its nodes have, for other clusters' agents to decide by.
	Capabilities []string `json:"capabilities,omitempty"`
}

// EncryptionMode returns what the cluster encrypts; an old version, which does not say, encrypts nothing.
func (c ClusterInfo) EncryptionMode() Encryption { return cmp.Or(c.Encryption, EncryptOff) }

// EncodeCluster returns the stored form of c, for ClusterKey.
func EncodeCluster(c ClusterInfo) []byte { return encode(c) }

// DecodeCluster reads what a cluster says of itself. The error is a sentence for people.
func DecodeCluster(key string, value []byte) (ClusterInfo, error) {
	var c ClusterInfo
	if key != ClusterKey {
		return ClusterInfo{}, fmt.Errorf("cluster entry: key %s is not %s", quote(key), ClusterKey)
	}
	err := lb.Unmarshal(value, &c)
	if err == nil {
		err = CheckCluster(c)
	}
	if err != nil {
		return ClusterInfo{}, fmt.Errorf("cluster entry: %w", err)
	}
	return c, nil
}

// CheckCluster tells what is wrong with a cluster's description, before it is stored and after it was read.
func CheckCluster(c ClusterInfo) error {
	if err := lb.CheckName("cluster", c.Name); err != nil {
		return err
	}
	if c.ID == 0 {
		return errors.New("cluster ID is missing")
	}
	if err := checkPodCIDRs(c.PodCIDRs); err != nil {
		return err
	}
	if err := checkServiceCIDRs(c); err != nil {
		return err
	}
	if err := checkPlain("version", c.Version); err != nil {
		return err
	}
	if c.Encryption != "" {
		if _, err := ParseEncryption(string(c.Encryption)); err != nil {
			return err
		}
	}
	if len(c.Capabilities) > MaxCapabilities {
		return fmt.Errorf("%d capabilities, at most %d are allowed", len(c.Capabilities), MaxCapabilities)
	}
	for _, capability := range c.Capabilities {
		if err := checkPlain("capability", capability); err != nil {
			return err
		}
	}
	return nil
}

// checkServiceCIDRs wants one or two ranges, of different families, that overlap no pod CIDR.
func checkServiceCIDRs(c ClusterInfo) error {
	if len(c.ServiceCIDRs) == 0 || len(c.ServiceCIDRs) > 2 {
		return fmt.Errorf("%d service CIDRs, one or two (of IPv4 and IPv6) are allowed", len(c.ServiceCIDRs))
	}
	for i, s := range c.ServiceCIDRs {
		if err := checkPrefix(s); err != nil {
			return fmt.Errorf("service CIDR: %w", err)
		}
		if i == 1 && s.Addr().Is4() == c.ServiceCIDRs[0].Addr().Is4() {
			return fmt.Errorf("service CIDRs %s and %s are of the same address family", c.ServiceCIDRs[0], s)
		}
		for _, p := range c.PodCIDRs {
			if p.Overlaps(s) {
				return fmt.Errorf("pod CIDR %s and service CIDR %s overlap", p, s)
			}
		}
	}
	return nil
}

// Heartbeat says that a node could write to the store at a time of its own clock. It is the
// value at HeartbeatKey, and at a SyncedKey, where it says since when all of the node's entries are there.
type Heartbeat struct {
	At   time.Time `json:"at"` // RFC 3339 with nanoseconds, UTC
	Node string    `json:"node"`
}

// EncodeHeartbeat returns the stored form of h, for HeartbeatKey or SyncedKey.
func EncodeHeartbeat(h Heartbeat) []byte {
	h.At = h.At.UTC()
	return encode(h)
}

// DecodeHeartbeat reads the heartbeat stored under HeartbeatKey. The error is a sentence for people.
func DecodeHeartbeat(key string, value []byte) (Heartbeat, error) {
	if key != HeartbeatKey {
		return Heartbeat{}, fmt.Errorf("heartbeat entry: key %s is not %s", quote(key), HeartbeatKey)
	}
	h, err := decodeHeartbeat(value)
	if err != nil {
		return Heartbeat{}, fmt.Errorf("heartbeat entry: %w", err)
	}
	return h, nil
}

// DecodeSynced reads the mark stored under a SyncedKey. The error is a sentence for people.
func DecodeSynced(key string, value []byte) (Heartbeat, error) {
	h, err := decodeSynced(key, value)
	if err != nil {
		return Heartbeat{}, fmt.Errorf("synced entry %s: %w", entryName(key, "synced/"), err)
	}
	return h, nil
}

func decodeSynced(key string, value []byte) (Heartbeat, error) {
	parts, err := splitKey(key, kvstore.Prefix+"synced/", 2)
	if err != nil {
		return Heartbeat{}, err
	}
	if err := lb.CheckName("cluster", parts[0]); err != nil {
		return Heartbeat{}, err
	}
	h, err := decodeHeartbeat(value)
	if err != nil {
		return Heartbeat{}, err
	}
	if h.Node != parts[1] && parts[1] != ServicesMark {
		return Heartbeat{}, fmt.Errorf("value is of node %s, but the key of %s", h.Node, quote(parts[1]))
	}
	return h, nil
}

func decodeHeartbeat(value []byte) (Heartbeat, error) {
	var h Heartbeat
	if err := lb.Unmarshal(value, &h); err != nil {
		return Heartbeat{}, err
	}
	h.At = h.At.UTC()
	if year := h.At.Year(); year < 2000 || year >= 3000 {
		return Heartbeat{}, fmt.Errorf("time %s is not plausible", h.At.Format(time.RFC3339Nano))
	}
	return h, lb.CheckName("node", h.Node)
}
