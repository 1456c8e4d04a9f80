package identity

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"causeway/lb"
)

var (
	node1 = Node{
		Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("172.29.1.11"),
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}, Instance: "0b1e-42", Version: Version{1790000000000000001, 3},
	}
	key1, key2 = WireGuardKey{0: 1, 31: 1}, WireGuardKey{0: 2, 31: 2}
	// node3 changes its key, so it has two.
	node3 = Node{
		Cluster: "east", ClusterID: 1, Name: "node3", Address: netip.MustParseAddr("2001:db8::3"),
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.3.0/24"), netip.MustParsePrefix("fd01:0:0:3::/64")}, Instance: "0b1e-43",
		TunnelKeys: []TunnelKey{{Slot: 1, Key: key2, Port: 51872}, {Slot: 0, Key: key1, Port: 51871}}, MTU: 1390, Version: Version{1790000000000000001, 3},
	}
	shopAddress = Address{
		Cluster: "east", ClusterID: 1, Prefix: netip.MustParsePrefix("10.1.1.5/32"), Identity: 65792,
		Node: "node1", Endpoint: "web/shop-1", Version: Version{1790000000000000001, 4},
	}
	shopLabels   = Labels{"app": "shop", NamespaceLabel: "web"}
	shopIdentity = Identity{Cluster: "east", Number: 65792, Labels: shopLabels}
	east         = ClusterInfo{
		Name: "east", ID: 1, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")},
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("100.64.64.0/18")}, Version: "v0.1.0", Capabilities: []string{"ipv4"},
	}
	beat = Heartbeat{At: time.Date(2026, 10, 1, 12, 0, 0, 123456789, time.UTC), Node: "node1"}
)

const (
	nodeKey    = "causeway/v1/nodes/east/node1"
	nodeValue  = `{"cluster":"east","clusterID":1,"name":"node1","address":"172.29.1.11","podCIDRs":["10.1.1.0/24"],"instance":"0b1e-42","incarnation":1790000000000000001,"sequence":3}`
	node3Key   = "causeway/v1/nodes/east/node3"
	node3Value = `{"cluster":"east","clusterID":1,"name":"node3","address":"2001:db8::3","podCIDRs":["10.1.3.0/24","fd01:0:0:3::/64"],"instance":"0b1e-43",` +
		`"tunnelKeys":[{"slot":1,"key":"AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAI=","port":51872},{"slot":0,"key":"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=","port":51871}],` +
		`"mtu":1390,"incarnation":1790000000000000001,"sequence":3}`
	addressKey   = "causeway/v1/addresses/east/10.1.1.5"
	addressValue = `{"ip":"10.1.1.5","identity":65792,"node":"node1","endpoint":"web/shop-1","incarnation":1790000000000000001,"sequence":4}`
	idKey        = "causeway/v1/identities/east/ids/65792"
	idValue      = `{"id":65792,"labels":{"app":"shop","io.kubernetes.pod.namespace":"web"}}`
	clusterValue = `{"name":"east","id":1,"podCIDRs":["10.1.0.0/16"],"serviceCIDRs":["100.64.64.0/18"],"version":"v0.1.0","capabilities":["ipv4"]}`
	beatValue    = `{"at":"2026-10-01T12:00:00.123456789Z","node":"node1"}`
)

// TestStoredForms holds the stored forms to what other versions of Causeway read and write.
func TestStoredForms(t *testing.T) {
	for _, form := range []struct {
		name, value string
		encoded     []byte
		decode      func() (any, error)
		row         any
	}{
		{"node", nodeValue, EncodeNode(node1), func() (any, error) { return DecodeNode(nodeKey, []byte(nodeValue)) }, node1},
		{"node with tunnel keys", node3Value, EncodeNode(node3), func() (any, error) { return DecodeNode(node3Key, []byte(node3Value)) }, node3},
		{"address", addressValue, EncodeAddress(shopAddress), func() (any, error) { return DecodeAddress(addressKey, []byte(addressValue)) }, shopAddress},
		{"identity", idValue, EncodeIdentity(shopIdentity), func() (any, error) { return DecodeIdentity(idKey, []byte(idValue)) }, shopIdentity},
		{"cluster", clusterValue, EncodeCluster(east), func() (any, error) { return DecodeCluster(ClusterKey, []byte(clusterValue)) }, east},
		{"heartbeat", beatValue, EncodeHeartbeat(beat), func() (any, error) { return DecodeHeartbeat(HeartbeatKey, []byte(beatValue)) }, beat},
		{"synced", beatValue, EncodeHeartbeat(beat), func() (any, error) { return DecodeSynced("causeway/v1/synced/east/node1", []byte(beatValue)) }, beat},
	} {
		if string(form.encoded) != form.value {
			t.Errorf("%s encodes to\n%s, not\n%s", form.name, form.encoded, form.value)
		}
		row, err := form.decode()
		if err != nil || !reflect.DeepEqual(row, form.row) {
			t.Errorf("%s decodes to\n%+v (%v), not\n%+v", form.name, row, err, form.row)
		}
	}
}

func TestLocalFactsAreNotStored(t *testing.T) {
	n, a := node1, shopAddress
	n.Local, a.Local, a.NodeAddress = true, true, n.Address
	if string(EncodeNode(n)) != nodeValue || string(EncodeAddress(a)) != addressValue {
		t.Errorf("stored are %s and %s", EncodeNode(n), EncodeAddress(a))
	}
}

func TestKeys(t *testing.T) {
	for got, want := range map[string]string{
		NodeKey("east", "node1"):                                 nodeKey,
		AddressKey("east", netip.MustParseAddr("10.1.1.5")):      addressKey,
		AddressKey("east", netip.MustParseAddr("2001:DB8:0::1")): "causeway/v1/addresses/east/2001:db8::1",
		IdentityKey("east", 65792):                               idKey,
		RefKey("east", 65792, "node1"):                           "causeway/v1/identities/east/refs/65792/node1",
		RefKey("east", Host, "node1"):                            "causeway/v1/identities/east/refs/1/node1",
		SyncedKey("east", "node1"):                               "causeway/v1/synced/east/node1",
		LabelsKey("east", Labels{"b": "2", "a": "1"}):            "causeway/v1/identities/east/labels/06beefe2b477ff1d0fe92dfa45128217630672abff564dc7746f106833d3fc7a",
		ClusterKey:   "causeway/v1/cluster",
		HeartbeatKey: "causeway/v1/heartbeat",
		lb.ServiceKey("east", lb.Name{Namespace: "web", Name: "a"}):   "causeway/v1/services/east/web/a",
		lb.SliceKey("east", lb.Name{Namespace: "w", Name: "a"}, "n1"): "causeway/v1/slices/east/w/a/n1",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// edit is a change to a good value, and what the error must say.
type edit struct{ old, new, want string }

func TestDecodeNodeRefuses(t *testing.T) {
	refusesAll(t, nodeValue, func(v string) error { _, err := DecodeNode(nodeKey, []byte(v)); return err },
		edit{`"cluster":"east"`, `"cluster":"west"`, "node entry east/node1: value is of node west/node1, but the key of node east/node1"},
		edit{`"name":"node1"`, `"name":"node2"`, "of node east/node2, but the key of node east/node1"},
		edit{`"name":"node1"`, `"name":"node_1"`, `node "node_1" is not a DNS label`},
		edit{`"name":"node1"`, `"name":"` + strings.Repeat("n", 64) + `"`, `is not a DNS label`},
		edit{`"cluster":"east"`, `"cluster":""`, `cluster "" is not a DNS label`},
		edit{`"clusterID":1`, `"clusterID":0`, "cluster ID is missing"},
		edit{`"clusterID":1`, `"clusterID":300`, "JSON"},
		edit{`"clusterID":1`, `"clusterID":1,"clusterID":1`, `duplicate field "clusterID"`},
		edit{`"clusterID":1`, `"CLUSTERID":1`, "cluster ID is missing"},
		edit{`"172.29.1.11"`, `""`, "address is missing"},
		edit{`"172.29.1.11"`, `"127.0.0.1"`, "address 127.0.0.1 is a loopback address"},
		edit{`"172.29.1.11"`, `"0.0.0.0"`, "is unspecified"},
		edit{`"172.29.1.11"`, `"169.254.0.1"`, "is link-local"},
		edit{`"172.29.1.11"`, `"239.0.0.1"`, "is a multicast address"},
		edit{`"172.29.1.11"`, `"255.255.255.255"`, "is reserved"},
		edit{`"172.29.1.11"`, `"::ffff:172.29.1.11"`, "is IPv4 written as IPv6"},
		edit{`"172.29.1.11"`, `"fe80::11"`, "is link-local"},
		edit{`"172.29.1.11"`, `"2001:db8::11%eth0"`, "has a zone"},
		edit{`"172.29.1.11"`, `"172.29.1.11/32"`, "JSON"},
		edit{`"172.29.1.11"`, `"10.1.1.1"`, "address 10.1.1.1 lies in the node's own pod CIDRs"},
		edit{`["10.1.1.0/24"]`, `[]`, "0 pod CIDRs, 1 to 16 are allowed"},
		edit{`["10.1.1.0/24"]`, `["10.1.1.5/24"]`, "pod CIDR: prefix 10.1.1.5/24 has host bits, write 10.1.1.0/24"},
		edit{`["10.1.1.0/24"]`, `["10.1.1.0/24","10.1.0.0/16"]`, "pod CIDRs 10.1.1.0/24 and 10.1.0.0/16 overlap"},
		edit{`["10.1.1.0/24"]`, `["0.0.0.0/0"]`, "wider than /8"},
		edit{`["10.1.1.0/24"]`, `["127.0.0.0/8"]`, "is a loopback address"},
		edit{`["10.1.1.0/24"]`, `["::ffff:10.1.1.0/120"]`, "pod CIDR"},
		edit{`["10.1.1.0/24"]`, `["fc00::/7"]`, "prefix fc00::/7 is wider than /32"},
		edit{`["10.1.1.0/24"]`, `["10.1.1.0/24","fd00:10::/126"]`, "prefix fd00:10::/126 is narrower than /125"},
		edit{`["10.1.1.0/24"]`, `["fd00:10:0:1::5/64"]`, "has host bits, write fd00:10:0:1::/64"},
		edit{`["10.1.1.0/24"]`, `["fe80::/64"]`, "is link-local"},
		edit{`["10.1.1.0/24"]`, `["ff00::/32"]`, "is a multicast address"},
		edit{`["10.1.1.0/24"]`, `["::/32"]`, "is unspecified"},
		edit{`["10.1.1.0/24"]`, `["fd00:10::/64","10.1.1.0/24","fd00:10::/48"]`, "pod CIDRs fd00:10::/64 and fd00:10::/48 overlap"},
		edit{`["10.1.1.0/24"]`, list(17, `"10.1.%d.0/24"`), "17 pod CIDRs"},
		edit{`["10.1.1.0/24"]`, `["10.1.1.0/30"]`, "pod CIDR 10.1.1.0/30 is too small"},
		edit{`["10.1.1.0/24"]`, `["fd01::/126"]`, "fd01::/126 is narrower than /125"},
		edit{`"0b1e-42"`, `""`, `instance "" is not`},
		edit{`"0b1e-42"`, `"a b"`, `instance "a b" is not`},
		edit{`1790000000000000001`, `0`, "incarnation is missing"},
		edit{`"sequence":3`, `"sequence":"3"`, "JSON"},
		edit{`"sequence":3}`, `"sequence":3}x`, "JSON"},
		edit{`"sequence":3}`, `"sequence":3,"x":"` + strings.Repeat("x", lb.MaxValue) + `"}`, "at most 65536 are allowed"},
		edit{nodeValue, `[]`, "JSON"},
	)
	for _, key := range []string{"", "causeway/v1/nodes/east", "causeway/v1/nodes/east/node1/x", "causeway/v1/nodes/east/node1 ", addressKey, "/" + nodeKey, strings.Repeat("k", 10000)} {
		if _, err := DecodeNode(key, []byte(nodeValue)); err == nil || len(err.Error()) > 400 {
			t.Errorf("under key %.40q: %v", key, err)
		}
	}
}

func TestDecodeTunnelKeysRefuses(t *testing.T) {
	const k1, k2 = `"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE="`, `"AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAI="`
	refusesAll(t, node3Value, func(v string) error { _, err := DecodeNode(node3Key, []byte(v)); return err },
		edit{k1, k2, "tunnel keys of both slots are AgAA"},
		edit{k1, `"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=="`, "WireGuard key of 31 bytes; a public key has 32"},
		edit{k1, `"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEB"`, "WireGuard key of 33 bytes"},
		edit{k1, `"` + strings.Repeat("A", 2000) + `"`, "WireGuard key of 2000 characters"},
		edit{k1, `"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="`, "WireGuard key is all zeros"},
		edit{k1, `"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="`, "a point of low order"},
		edit{k1, `"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAIE="`, "not in canonical form"},
		edit{k1, `""`, "WireGuard key of 0 bytes"},
		edit{k1, `7`, "JSON"},
		edit{`"key":` + k1 + `,`, ``, "tunnel key of slot 0: WireGuard key is all zeros"},
		edit{`"slot":0`, `"slot":1`, "two tunnel keys of slot 1"},
		edit{`"slot":0`, `"slot":2`, "tunnel key of slot 2; there are slots 0 and 1"},
		edit{`"slot":0`, `"slot":-1`, "JSON"},
		edit{`51871`, `0`, "tunnel key of slot 0: port is missing"},
		edit{`51871`, `51872`, "tunnel keys of both slots have port 51872"},
		edit{`51871`, `65536`, "JSON"},
		edit{`"mtu":1390`, `"mtu":575`, "MTU 575 is not 576 to 65535"},
		edit{`"mtu":1390`, `"mtu":65536`, "MTU 65536 is not"},
		edit{`"mtu":1390`, `"mtu":-1`, "MTU -1 is not"},
		edit{`"tunnelKeys":[`, `"tunnelKeys":[{"slot":0,"key":"AwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAM=","port":51873},`, "3 tunnel keys, at most 2 are allowed"},
	)
}

func TestDecodeAddressRefuses(t *testing.T) {
	refusesAll(t, addressValue, func(v string) error { _, err := DecodeAddress(addressKey, []byte(v)); return err },
		edit{`"10.1.1.5"`, `"10.1.1.6"`, `address entry 10.1.1.5: value is of address 10.1.1.6, but the key of "10.1.1.5"`},
		edit{`"10.1.1.5"`, `"::1"`, "is a loopback address"},
		edit{`"10.1.1.5"`, `"10.1.1.05"`, "JSON"},
		edit{`65792`, `0`, "identity 0 is not one that a cluster allocates"},
		edit{`65792`, `255`, "identity 255 is not one"},
		edit{`65792`, `65536`, "identity 65536 is not one"},
		edit{`65792`, `256`, "identity 256 is not one"},
		edit{`65792`, `16777216`, "identity 16777216 is not one"},
		edit{`65792`, `4294967296`, "JSON"},
		edit{`65792`, `"65792"`, "JSON"},
		edit{`"node1"`, `""`, `node "" is not a DNS label`},
		edit{`"web/shop-1"`, `"shop-1"`, "is not NAMESPACE/NAME"},
		edit{`"web/shop-1"`, `"web/shop 1"`, "is not a DNS subdomain"},
		edit{`"web/shop-1"`, `"Web/shop-1"`, `endpoint's namespace "Web"`},
		edit{`1790000000000000001`, `0`, "incarnation is missing"},
		edit{`"ip"`, `"IP"`, "address is missing"},
	)
	for _, key := range []string{"causeway/v1/addresses/east/10.1.1.5/32", "causeway/v1/addresses/10.1.1.5", "causeway/v1/addresses/EAST/10.1.1.5", nodeKey} {
		if _, err := DecodeAddress(key, []byte(addressValue)); err == nil {
			t.Errorf("accepted under key %q", key)
		}
	}
	// One address has one key, however its value writes it.
	if _, err := DecodeAddress("causeway/v1/addresses/east/2001:DB8::1", []byte(strings.Replace(addressValue, "10.1.1.5", "2001:DB8::1", 1))); err == nil {
		t.Error("accepted under a key that AddressKey doesn't give")
	}
}

func TestDecodeIdentityRefuses(t *testing.T) {
	refusesAll(t, idValue, func(v string) error { _, err := DecodeIdentity(idKey, []byte(v)); return err },
		edit{`65792`, `65793`, "identity entry east/ids/65792: value is of identity 65793, but the key of another"},
		edit{`65792`, `5`, "identity 5 is not one"},
		edit{`65792`, `-1`, "JSON"},
		edit{`"app":"shop"`, `"app":"shop","app":"cart"`, "duplicate field"},
		edit{`"app":"shop"`, `"app":"a,b=c"`, `label app has the value "a,b=c"`},
		edit{`"app":"shop"`, `"a=b":"shop"`, `label key "a=b" is not of Kubernetes' form`},
		edit{`"app":"shop"`, `"app":7`, "JSON"},
		edit{`"app":"shop"`, `"app":"` + strings.Repeat("v", 64) + `"`, "label app has the value"},
		edit{`{"app":"shop","io.kubernetes.pod.namespace":"web"}`, `{}`, "0 labels, 1 to 64 are allowed"},
		edit{`{"app":"shop","io.kubernetes.pod.namespace":"web"}`, `null`, "0 labels"},
		edit{`{"app":"shop",`, "{" + strings.Trim(list(64, `"l%d":"v"`), "[]") + ",", "65 labels"},
	)
	for _, key := range []string{"causeway/v1/identities/east/ids/065792", "causeway/v1/identities/east/labels/65792", "causeway/v1/identities/east/65792", "causeway/v1/identities/Ea/ids/65792"} {
		if _, err := DecodeIdentity(key, []byte(idValue)); err == nil {
			t.Errorf("accepted under key %q", key)
		}
	}
}

func TestDecodeClusterRefuses(t *testing.T) {
	refusesAll(t, clusterValue, func(v string) error { _, err := DecodeCluster(ClusterKey, []byte(v)); return err },
		edit{`"east"`, `"east/1"`, `cluster entry: cluster "east/1" is not a DNS label`},
		edit{`"id":1`, `"id":0`, "cluster ID is missing"},
		edit{`"10.1.0.0/16"`, ``, "0 pod CIDRs"},
		edit{`"100.64.64.0/18"`, `""`, "service CIDR: prefix is missing"},
		edit{`"100.64.64.0/18"`, `"100.64.64.1/18"`, "service CIDR: prefix 100.64.64.1/18 has host bits"},
		edit{`"100.64.64.0/18"`, `"10.0.0.0/8"`, "pod CIDR 10.1.0.0/16 and service CIDR 10.0.0.0/8 overlap"},
		edit{`"100.64.64.0/18"`, `"fd00:1::/112","fd00:2::/112"`, "service CIDRs fd00:1::/112 and fd00:2::/112 are of the same address family"},
		edit{`"100.64.64.0/18"`, `"100.64.64.0/18","fd00:1::/112","100.65.0.0/18"`, "3 service CIDRs"},
		edit{`"100.64.64.0/18"`, `"fd00:1::/128"`, "service CIDR: prefix fd00:1::/128 is narrower than /125"},
		edit{`"v0.1.0"`, `"v0.1.0\n"`, "version"},
		edit{`"v0.1.0"`, `"v0.1.0","encryption":"some"`, `encryption mode "some" is not one of all, inter-cluster and off`},
		edit{`["ipv4"]`, `[""]`, `capability ""`},
		edit{`["ipv4"]`, list(65, `"c%d"`), "65 capabilities"},
	)
	if _, err := DecodeCluster(HeartbeatKey, []byte(clusterValue)); err == nil {
		t.Error("accepted under another key")
	}
}

func TestDecodeHeartbeatRefuses(t *testing.T) {
	const syncedKey = "causeway/v1/synced/east/node1"
	edits := []edit{
		{`"2026-10-01T12:00:00.123456789Z"`, `"yesterday"`, "JSON"},
		{`"2026-10-01T12:00:00.123456789Z"`, `"0001-01-01T00:00:00Z"`, "is not plausible"},
		{`"at":"2026-10-01T12:00:00.123456789Z",`, ``, "is not plausible"},
		{`"node1"`, `"n/1"`, `node "n/1" is not a DNS label`},
	}
	refusesAll(t, beatValue, func(v string) error { _, err := DecodeHeartbeat(HeartbeatKey, []byte(v)); return err }, edits...)
	refusesAll(t, beatValue, func(v string) error { _, err := DecodeSynced(syncedKey, []byte(v)); return err },
		append(edits, edit{`"node1"`, `"node2"`, `synced entry east/node1: value is of node node2, but the key of "node1"`})...)
	if _, err := DecodeHeartbeat(syncedKey, []byte(beatValue)); err == nil {
		t.Error("a heartbeat is accepted under a synced key")
	}
	if h, err := DecodeSynced(SyncedKey("east", ServicesMark), []byte(beatValue)); err != nil || h != beat {
		t.Errorf("the cluster's own mark, which any node may write: %+v, %v", h, err)
	}
	if _, err := DecodeSynced(HeartbeatKey, []byte(beatValue)); err == nil {
		t.Error("a synced mark is accepted under the heartbeat's key")
	}
}

func TestHeartbeatIsUTC(t *testing.T) {
	h := beat
	h.At = h.At.In(time.FixedZone("", 5*3600))
	if got := string(EncodeHeartbeat(h)); got != beatValue {
		t.Error(got)
	}
	elsewhere := strings.Replace(beatValue, "T12:00:00.123456789Z", "T14:00:00.123456789+02:00", 1)
	if got, err := DecodeHeartbeat(HeartbeatKey, []byte(elsewhere)); err != nil || got != beat {
		t.Errorf("%+v, %v", got, err)
	}
}

// refusesAll checks that good decodes, and that each edit of it gives an error that says why.
func refusesAll(t *testing.T, good string, decode func(string) error, edits ...edit) {
	t.Helper()
	if err := decode(good); err != nil {
		t.Fatalf("the good value: %v", err)
	}
	for _, e := range edits {
		bad := strings.Replace(good, e.old, e.new, 1)
		if bad == good {
			t.Fatalf("%s is not in the good value", e.old)
		}
		err := decode(bad)
		if err == nil || !strings.Contains(err.Error(), e.want) {
			t.Errorf("%.60s → %.60s:\n got %v\nwant … %s …", e.old, e.new, err, e.want)
		}
		if err != nil && len(err.Error()) > 500 {
			t.Errorf("%.60s → %.60s: an error of %d bytes", e.old, e.new, len(err.Error()))
		}
	}
}

// list returns an array of n elements made from format, which has one %d.
func list(n int, format string) string {
	elements := make([]string, n)
	for i := range elements {
		elements[i] = fmt.Sprintf(format, i)
	}
	return "[" + strings.Join(elements, ",") + "]"
}
