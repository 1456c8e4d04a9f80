package identity

import (
	"reflect"
	"testing"
)

// Each target holds that its decoder takes whatever a store may hold, and that what decodes says the
// same once stored again.

func FuzzDecodeNode(f *testing.F) {
	f.Add(nodeKey, []byte(nodeValue))
	f.Add("causeway/v1/nodes/east/n", []byte(`{"cluster":"east","clusterID":1,"name":"n","address":"2001:db8::11","podCIDRs":["10.1.1.0/24","fd00:10:0:1::/64"],"instance":"i","incarnation":1}`))
	f.Add(node3Key, []byte(node3Value))
	f.Add(node3Key, []byte(`{"cluster":"east","clusterID":1,"name":"node3","address":"10.0.0.1","podCIDRs":["10.1.3.0/29"],"instance":"i","gossipKey":"","tunnelKeys":[],"mtu":576,"incarnation":1}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if n, err := DecodeNode(key, value); err == nil {
			again(t, n, NodeKey(n.Cluster, n.Name), EncodeNode(n), DecodeNode)
		}
	})
}

func FuzzDecodeAddress(f *testing.F) {
	f.Add(addressKey, []byte(addressValue))
	f.Add("causeway/v1/addresses/east/2001:db8::1", []byte(`{"ip":"2001:db8::1","identity":65792,"node":"n","incarnation":1}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if a, err := DecodeAddress(key, value); err == nil {
			again(t, a, AddressKey(a.Cluster, a.Prefix.Addr()), EncodeAddress(a), DecodeAddress)
		}
	})
}

func FuzzDecodeIdentity(f *testing.F) {
	f.Add(idKey, []byte(idValue))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if i, err := DecodeIdentity(key, value); err == nil {
			again(t, i, IdentityKey(i.Cluster, i.Number), EncodeIdentity(i), DecodeIdentity)
			again(t, i, LabelsKey(i.Cluster, i.Labels), EncodeIdentity(i), decodeLabels)
		}
	})
}

func FuzzDecodeCluster(f *testing.F) {
	f.Add([]byte(clusterValue))
	f.Add([]byte(`{"name":"east","id":1,"podCIDRs":["10.1.0.0/16","fd00:10::/48"],"serviceCIDRs":["fd00:1::/112","100.64.64.0/18"],"version":"v0.2.0"}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		if c, err := DecodeCluster(ClusterKey, value); err == nil {
			if len(c.Capabilities) == 0 {
				c.Capabilities = nil // an empty list is not stored
			}
			again(t, c, ClusterKey, EncodeCluster(c), DecodeCluster)
		}
	})
}

func FuzzDecodeHeartbeat(f *testing.F) {
	f.Add([]byte(beatValue))
	f.Fuzz(func(t *testing.T, value []byte) {
		if h, err := DecodeHeartbeat(HeartbeatKey, value); err == nil {
			again(t, h, HeartbeatKey, EncodeHeartbeat(h), DecodeHeartbeat)
			again(t, h, SyncedKey("east", h.Node), EncodeHeartbeat(h), DecodeSynced)
		}
	})
}

func again[T any](t *testing.T, row T, key string, value []byte, decode func(string, []byte) (T, error)) {
	t.Helper()
	got, err := decode(key, value)
	if err != nil || !reflect.DeepEqual(got, row) {
		t.Errorf("%+v, stored again under %s as %s, is %+v, %v", row, key, value, got, err)
	}
}
