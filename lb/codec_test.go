package lb

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

const (
	serviceKey   = "causeway/v1/services/east/web/shop"
	serviceValue = `{"cluster":"east","clusterID":1,"service":{"namespace":"web","name":"shop"},"global":true,"shared":true,` +
		`"affinity":"local","clusterIPs":["100.64.64.10"],"ports":[{"name":"http","protocol":"TCP","port":80,"targetPort":8080,"appProtocol":"kubernetes.io/h2c"},` +
		`{"name":"dns","protocol":"UDP","port":53,"targetPort":5353}],"selector":{"app":"shop"},` +
		`"annotations":{"service.cilium.io/global":"true"}}`

	sliceKey   = "causeway/v1/slices/east/web/shop/node1.2"
	sliceValue = `{"cluster":"east","clusterID":1,"service":{"namespace":"web","name":"shop"},"slice":"node1.2","node":"node1",` +
		`"incarnation":1790000000000000001,"sequence":7,"ports":[{"name":"http","protocol":"TCP","port":8080}],` +
		`"backends":[{"ip":"10.1.1.5","endpoint":"web/shop-1"},{"ip":"10.1.1.6"}]}`
)

func TestDecodeService(t *testing.T) {
	got, err := DecodeService(serviceKey, []byte(serviceValue))
	if err != nil {
		t.Fatal(err)
	}
	want := Service{
		Cluster: "east", ClusterID: 1, Name: Name{"web", "shop"}, Global: true, Shared: true, Affinity: AffinityLocal,
		ClusterIPs:  []netip.Addr{netip.MustParseAddr("100.64.64.10")},
		Ports:       []ServicePort{{Name: "http", Protocol: TCP, Port: 80, TargetPort: 8080, AppProtocol: "kubernetes.io/h2c"}, {Name: "dns", Protocol: UDP, Port: 53, TargetPort: 5353}},
		Selector:    map[string]string{"app": "shop"},
		Annotations: map[string]string{"service.cilium.io/global": "true"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if key := ServiceKey(got.Cluster, got.Name); key != serviceKey {
		t.Errorf("stored under %s", key)
	}
	if again := string(EncodeService(got)); again != serviceValue {
		t.Errorf("encoded again: %s", again)
	}
}

// TestServicesOfKubernetesAreStored: what a manifest's service never has is read as it was written.
func TestServicesOfKubernetesAreStored(t *testing.T) {
	public, four := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("100.64.64.10")
	for name, change := range map[string]func(*Service){
		"headless":               func(s *Service) { s.Headless, s.ClusterIPs = true, nil },
		"headless without ports": func(s *Service) { s.Headless, s.ClusterIPs, s.Ports = true, nil, nil },
		"named target port":      func(s *Service) { s.Ports[0].TargetPort = 0 },
		"node ports": func(s *Service) {
			s.Ports[0].NodePort, s.HealthCheckNodePort = 30080, 30081
			s.Ports = append(s.Ports, ServicePort{Name: "quic", Protocol: UDP, Port: 80, NodePort: 30080}) // as TCP has, of which UDP is apart
		},
		"without node ports":   func(s *Service) { s.Ports = append(s.Ports, ServicePort{Name: "admin", Protocol: TCP, Port: 81}) },
		"external IPs":         func(s *Service) { s.ExternalIPs = []netip.Addr{public, four} }, // one may be a cluster IP too
		"traffic policies":     func(s *Service) { s.InternalLocal, s.ExternalLocal = true, true },
		"a day with a backend": func(s *Service) { s.SessionAffinity = MaxSessionAffinity },
	} {
		s := declared(1)
		change(&s)
		got, err := DecodeService(ServiceKey(s.Cluster, s.Name), EncodeService(s))
		if err != nil || !reflect.DeepEqual(got, s) {
			t.Errorf("%s: got %+v, %v\nwant %+v", name, got, err, s)
		}
	}
	s := declared(1)
	if s.ClusterIPs = nil; CheckService(s) == nil {
		t.Error("no cluster IPs, though it is not headless, are accepted")
	}
	if s.Headless = true; CheckService(s) != nil {
		t.Error("a headless service is refused")
	}
	if err := CheckPorts(nil); err == nil {
		t.Error("no ports are accepted, of any service")
	}
}

func TestDecodeSlice(t *testing.T) {
	got, err := DecodeSlice(sliceKey, []byte(sliceValue))
	if err != nil {
		t.Fatal(err)
	}
	if got.Key() != sliceKey || string(EncodeSlice(got)) != sliceValue {
		t.Errorf("encoded again: %s under %s", EncodeSlice(got), got.Key())
	}
	want := []Backend{
		{Cluster: "east", ClusterID: 1, Service: Name{"web", "shop"}, Address: netip.MustParseAddr("10.1.1.5"), Node: "node1",
			Endpoint: "web/shop-1", Ports: []BackendPort{{"http", TCP, 8080}}, Slice: "node1.2"},
		{Cluster: "east", ClusterID: 1, Service: Name{"web", "shop"}, Address: netip.MustParseAddr("10.1.1.6"), Node: "node1",
			Ports: []BackendPort{{"http", TCP, 8080}}, Slice: "node1.2"},
	}
	if rows := got.Rows(); !reflect.DeepEqual(rows, want) {
		t.Errorf("rows %+v", rows)
	}
}

// edit is a change to a good value, and what the error must say.
type edit struct{ old, new, want string }

func TestDecodeServiceRefuses(t *testing.T) {
	for _, e := range []edit{
		{`"cluster":"east"`, `"cluster":"west"`, "of web/shop in cluster west, but the key of web/shop in cluster east"},
		{`"name":"shop"}`, `"name":"cart"}`, "of web/cart in cluster east, but the key"},
		{`"name":"shop"}`, `"name":"Shop"}`, `service's name "Shop" is not a DNS label`},
		{`"namespace":"web"`, `"namespace":""`, `service's namespace "" is not a DNS label`},
		{`"clusterID":1`, `"clusterID":0`, "cluster ID is missing"},
		{`"clusterID":1`, `"clusterID":256`, "JSON"},
		{`"clusterID":1`, `"clusterID":"1"`, "JSON"},
		{`"clusterID":1`, `"clusterID":1,"clusterID":2`, `duplicate field "clusterID"`},
		{`"app":"shop"`, `"app":"shop","app":"cart"`, `duplicate field`},
		{`"clusterID":1`, `"ClusterID":1`, "cluster ID is missing"},
		{`"affinity":"local"`, `"affinity":"near"`, `affinity "near" is not one of none, local, remote, nearest`},
		{`"global":true`, `"global":false`, "shared but not global"},
		{`"global":true`, `"global":"true"`, "JSON"},
		{`["100.64.64.10"]`, `[]`, "0 cluster IPs"},
		{`["100.64.64.10"]`, `["100.64.64.10","100.64.64.10"]`, "given twice"},
		{`["100.64.64.10"]`, `["127.0.0.1"]`, "cluster IP: address 127.0.0.1 is a loopback address"},
		{`["100.64.64.10"]`, `["100.64.64.300"]`, "JSON"},
		{`"port":80`, `"port":0`, `port "http" has no number`},
		{`"port":80`, `"port":65536`, "JSON"},
		{`"kubernetes.io/h2c"`, `"` + strings.Repeat("x", MaxAppProtocol+1) + `"`, "at most 317 are allowed"},
		{`"clusterIPs":`, `"headless":true,"clusterIPs":`, "it is headless, but has 1 cluster IPs"},
		{`"clusterIPs":`, `"externalIPs":["192.0.2.7","192.0.2.7"],"clusterIPs":`, "external IP 192.0.2.7 is given twice"},
		{`"clusterIPs":`, `"externalIPs":["169.254.1.1"],"clusterIPs":`, "external IP: address 169.254.1.1 is link-local"},
		{`"clusterIPs":`, `"externalIPs":[` + strings.Trim(many(MaxExternalIPs+1, `"192.0.2.%d"`), "{}") + `],"clusterIPs":`, "65 external IPs, at most 64 are allowed"},
		{`"clusterIPs":`, `"sessionAffinity":86401,"clusterIPs":`, "session affinity of 86401 s, at most 86400 are allowed"},
		{`"clusterIPs":`, `"sessionAffinity":-1,"clusterIPs":`, "JSON"},
		{`"port":80`, `"nodePort":65536,"port":80`, "JSON"},
		{`"clusterIPs":["100.64.64.10"],"ports":[{`, `"healthCheckNodePort":30080,"clusterIPs":["100.64.64.10"],"ports":[{"nodePort":30080,`, "node port 30080 of port 80/TCP is that of the health check too"},
		{`"ports":[{`, `"ports":[{"name":"admin","protocol":"TCP","port":81,"nodePort":30080},{"nodePort":30080,`, "node port 30080/TCP is declared twice"},
		{`"protocol":"TCP"`, `"protocol":"SCTP"`, `protocol "SCTP" is not one of TCP, UDP`},
		{`"name":"dns"`, `"name":"http"`, `port "http" 53/UDP is declared twice`},
		{`"protocol":"UDP","port":53`, `"protocol":"TCP","port":80`, "declared twice"},
		{`"name":"dns"`, `"name":""`, "port 53/UDP needs a name"},
		{`"name":"dns"`, `"name":"d_ns"`, `port name "d_ns" is not a DNS label`},
		{`{"cluster"`, `[{"cluster"`, "JSON"},
		{`"true"}}`, `"true"}} {}`, "JSON"},
		{`"true"}}`, `"true"}`, "JSON"},
		{serviceValue, ``, "JSON"},
		{serviceValue, `null`, `cluster "" is not a DNS label`},
		{`io/global":"true"}`, `io/global":"` + strings.Repeat("x", MaxValue) + `"}`, "at most 65536 are allowed"},
		{`{"app":"shop"}`, many(MaxSelector+1, `"l%d":"v"`), "selector has 33 labels"},
		{`{"service.cilium.io/global":"true"}`, many(MaxAnnotations+1, `"a%d":"v"`), "129 annotations"},
		// Small as it is stored, but escaped it would not fit: nobody could write it back.
		{`"annotations":{`, `"annotations":{"a":"` + strings.Repeat("<", MaxValue/2) + `",`, "shorten its annotations"},
	} {
		refuses(t, e, serviceValue, func(v string) error { _, err := DecodeService(serviceKey, []byte(v)); return err })
	}
	for _, key := range []string{"", "causeway/v1/services/east/web", "causeway/v1/services/east/web/shop/x", "causeway/v2/services/east/web/shop", sliceKey} {
		if _, err := DecodeService(key, []byte(serviceValue)); err == nil {
			t.Errorf("accepted under key %q", key)
		}
	}
}

func TestDecodeSliceRefuses(t *testing.T) {
	for _, e := range []edit{
		{`"cluster":"east"`, `"cluster":"west"`, "of slice node1.2 of web/shop in cluster west, but the key of node1.2 of web/shop in cluster east"},
		{`"slice":"node1.2"`, `"slice":"node1.3"`, "of slice node1.3"},
		{`"slice":"node1.2"`, `"slice":"node2.2"`, `slice name "node2.2" is neither node1 nor node1.NUMBER`},
		{`"slice":"node1.2"`, `"slice":"node1.02"`, "neither"},
		{`"slice":"node1.2"`, `"slice":"node1.0"`, "neither"},
		{`"node":"node1"`, `"node":"node/1"`, `node "node/1" is not a DNS label`},
		{`"incarnation":1790000000000000001`, `"incarnation":0`, "incarnation is missing"},
		{`"incarnation":1790000000000000001`, `"incarnation":-1`, "JSON"},
		{`"sequence":7`, `"sequence":7.5`, "JSON"},
		{`"ip":"10.1.1.6"`, `"ip":"10.1.1.5"`, "backend 10.1.1.5 is given twice"},
		{`"ip":"10.1.1.6"`, `"ip":"224.0.0.1"`, "is a multicast address"},
		{`"ip":"10.1.1.6"`, `"ip":"::ffff:10.1.1.6"`, "is IPv4 written as IPv6, write 10.1.1.6"},
		{`"ip":"10.1.1.6"`, `"ip":""`, "address is missing"},
		{`"sequence":7,`, `"sequence":7,` + strings.Repeat(" ", MaxValue), "at most 65536 are allowed"},
		{`"web/shop-1"`, `"shop-1"`, `backend 10.1.1.5: endpoint "shop-1" is not NAMESPACE/NAME`},
		{`"web/shop-1"`, `"web/shop/1"`, `endpoint's name "shop/1"`},
		{`"port":8080`, `"port":0`, "has no number"},
		{`[{"name":"http","protocol":"TCP","port":8080}]`, "[{" + strings.Trim(many(MaxPorts+1, `{"name":"p%d","protocol":"TCP","port":1}`), "{}") + "}]", "65 ports, at most 64 are allowed"},
		{`[{"name":"http",`, `[{"name":"http","protocol":"TCP","port":1},{"name":"http",`, "declared twice"},
		{`[{"ip":"10.1.1.5","endpoint":"web/shop-1"},{"ip":"10.1.1.6"}]`, `[]`, "0 backends"},
		{`[{"ip":"10.1.1.5","endpoint":"web/shop-1"},{"ip":"10.1.1.6"}]`, "[{" + strings.Trim(many(101, `{"ip":"10.1.2.%d"}`), "{}") + "}]", "101 backends"},
	} {
		refuses(t, e, sliceValue, func(v string) error { _, err := DecodeSlice(sliceKey, []byte(v)); return err })
	}
	for _, key := range []string{"", serviceKey, "causeway/v1/slices/east/web/shop", "causeway/v1/slices/east/web/shop/node1.2/x"} {
		if _, err := DecodeSlice(key, []byte(sliceValue)); err == nil {
			t.Errorf("accepted under key %q", key)
		}
	}
}

// refuses checks that good decodes, and with the edit gives an error that says why.
func refuses(t *testing.T, e edit, good string, decode func(string) error) {
	t.Helper()
	if err := decode(good); err != nil {
		t.Fatalf("the good value: %v", err)
	}
	bad := strings.Replace(good, e.old, e.new, 1)
	if bad == good {
		t.Fatalf("%s is not in the good value", e.old)
	}
	err := decode(bad)
	if err == nil || !strings.Contains(err.Error(), e.want) {
		t.Errorf("%.60s → %.60s:\n got %v\nwant … %s …", e.old, e.new, err, e.want)
	}
	if err != nil && len(err.Error()) > 500 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
}

// many returns an object of n members made from format, which has one %d.
func many(n int, format string) string {
	members := make([]string, n)
	for i := range members {
		members[i] = fmt.Sprintf(format, i)
	}
	return "{" + strings.Join(members, ",") + "}"
}

func TestUnknownFieldsAreSkipped(t *testing.T) {
	newer := strings.Replace(serviceValue, `{"cluster"`, `{"weight":{"of":[1,2]},"cluster"`, 1)
	s, err := DecodeService(serviceKey, []byte(newer))
	if err != nil || string(EncodeService(s)) != serviceValue {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestCheckAddress(t *testing.T) {
	for _, good := range []string{"10.1.1.5", "172.29.1.11", "100.64.64.1", "2001:db8::1", "fd00::1", "223.255.255.255"} {
		if err := CheckAddress(netip.MustParseAddr(good)); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"0.0.0.0", "0.1.2.3", "::", "127.0.0.1", "127.9.9.9", "::1", "224.0.0.1", "ff02::1", "169.254.1.1", "fe80::1",
		"2001:db8::1%eth0", "255.255.255.255", "240.0.0.1", "::ffff:10.1.1.1"} {
		if CheckAddress(netip.MustParseAddr(bad)) == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
	if CheckAddress(netip.Addr{}) == nil {
		t.Error("no address is accepted")
	}
}

// FuzzDecodeService holds that what decodes says the same once stored again.
func FuzzDecodeService(f *testing.F) {
	f.Add(serviceKey, []byte(serviceValue))
	f.Add(serviceKey, []byte(strings.Replace(serviceValue, `"100.64.64.10"`, `"100.64.64.10","fd00:1::a"`, 1)))
	f.Add("causeway/v1/services///", []byte(`{}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		s, err := DecodeService(key, value)
		if err != nil {
			return
		}
		again, err := DecodeService(ServiceKey(s.Cluster, s.Name), EncodeService(s))
		if err != nil {
			t.Fatal(err)
		}
		if string(EncodeService(again)) != string(EncodeService(s)) {
			t.Errorf("%+v became %+v", s, again)
		}
	})
}

// FuzzDecodeSlice holds that what decodes says the same once stored again.
func FuzzDecodeSlice(f *testing.F) {
	f.Add(sliceKey, []byte(sliceValue))
	f.Add(sliceKey, []byte(strings.Replace(sliceValue, `{"ip":"10.1.1.6"}`, `{"ip":"fd00:10:1::5","endpoint":"web/shop-1"}`, 1)))
	f.Add(clusterSliceKey, []byte(clusterSliceValue))
	f.Add(clusterSliceKey, compress([]byte(clusterSliceValue)))
	f.Add("causeway/v1/slices////", []byte(`{}`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		s, err := DecodeSlice(key, value)
		if err != nil {
			return
		}
		if again, err := DecodeSlice(key, EncodeSlice(s)); err != nil || !reflect.DeepEqual(again, s) {
			t.Errorf("%+v became %+v, %v", s, again, err)
		}
		if len(s.Rows()) != len(s.Backends) {
			t.Error("rows are missing")
		}
	})
}
