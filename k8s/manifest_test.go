package k8s

import (
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"causeway/lb"
)

// shop is an ordinary manifest, as people write them.
const shop = `# The shop.
apiVersion: v1
kind: Service
metadata:
  name: shop
  namespace: web
  labels:
    team: sales
  annotations:
    service.cilium.io/global: "true"
    service.cilium.io/affinity: local
    prometheus.io/scrape: "true"
spec:
  selector:
    app: shop
  ports:
  - name: http
    port: 80
    targetPort: 8080
  - name: dns
    protocol: UDP
    port: 53
`

var parsedShop = lb.Service{
	Name: lb.Name{Namespace: "web", Name: "shop"}, Global: true, Shared: true, Affinity: lb.AffinityLocal,
	Ports:    []lb.ServicePort{{Name: "http", Protocol: lb.TCP, Port: 80, TargetPort: 8080}, {Name: "dns", Protocol: lb.UDP, Port: 53, TargetPort: 53}},
	Selector: map[string]string{"app": "shop"},
	Annotations: map[string]string{
		"service.cilium.io/global": "true", "service.cilium.io/affinity": "local", "prometheus.io/scrape": "true",
	},
}

func TestParseServices(t *testing.T) {
	got, err := ParseServices([]byte(shop))
	if err != nil || !reflect.DeepEqual(got, []Declaration{{parsedShop, lb.FamilyRequest{Policy: lb.SingleStack}}}) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, parsedShop)
	}
}

func TestAL7Service(t *testing.T) {
	file := strings.NewReplacer("affinity: local", "affinity: nearest\n    service.cilium.io/lb-l7: enabled\n    causeway.io/l7-retries: \"3\"",
		"  - name: http", "  - appProtocol: kubernetes.io/h2c\n    name: http").Replace(shop)
	services, err := ParseServices([]byte(file))
	if err != nil {
		t.Fatal(err)
	}
	if s := services[0]; s.Affinity != lb.AffinityNearest || s.Ports[0].AppProtocol != "kubernetes.io/h2c" || s.Annotations["causeway.io/l7-retries"] != "3" {
		t.Errorf("got %+v", s)
	}
}

// TestDocumentedManifest holds the manifest of docs/formats.md to what is read.
func TestDocumentedManifest(t *testing.T) {
	page, err := os.ReadFile("../docs/formats.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "```yaml\n")
	manifest, _, _ := strings.Cut(rest, "```")
	services, err := ParseServices([]byte(manifest))
	if err != nil || len(services) != 1 || !services[0].Shared || services[0].ClusterIPs[0].String() != "100.64.64.10" {
		t.Errorf("got %+v, %v", services, err)
	}
}

// exported is what "kubectl get service -o json" prints: with everything that the API server adds.
const exported = `{"apiVersion":"v1","kind":"List","metadata":{"resourceVersion":""},"items":[
{"apiVersion":"v1","kind":"Service","metadata":{"name":"cart","namespace":"default","uid":"1-2","resourceVersion":"77","creationTimestamp":"2026-01-02T03:04:05Z",
 "managedFields":[{"manager":"kubectl","operation":"Update","apiVersion":"v1","time":"2026-01-02T03:04:05Z","fieldsType":"FieldsV1","fieldsV1":{"f:spec":{}}}]},
 "spec":{"clusterIP":"100.64.64.9","clusterIPs":["100.64.64.9"],"internalTrafficPolicy":"Cluster","ipFamilies":["IPv4"],"ipFamilyPolicy":"SingleStack",
 "ports":[{"port":80,"protocol":"TCP","targetPort":80}],"selector":{"app":"cart"},"sessionAffinity":"None","type":"ClusterIP"},"status":{"loadBalancer":{}}}]}`

func TestParseServicesForms(t *testing.T) {
	second := strings.NewReplacer("name: shop\n", "name: second\n", "  namespace: web\n", "").Replace(shop)
	for _, test := range []struct {
		name, file, want string
	}{
		{"documents", shop + "---\n" + second, "web/shop default/second"},
		{"empty documents", "---\n# nothing\n---\n" + shop + "---\n\n---\n", "web/shop"},
		{"windows line ends", strings.ReplaceAll(shop+"---\n"+second, "\n", "\r\n"), "web/shop default/second"},
		{"as exported", exported, "default/cart"},
		{"JSON objects in a row", exported + "\n" + strings.Replace(exported, `"cart"`, `"card"`, 1), "default/cart default/card"},
		{"a ServiceList, whose items have no kind", strings.Replace(strings.Replace(exported, `"List"`, `"ServiceList"`, 1), `{"apiVersion":"v1","kind":"Service",`, `{`, 1), "default/cart"},
		{"a List in YAML", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {selector: {a: b}, ports: [{port: 80}]}}\n", "default/a"},
	} {
		t.Run(test.name, func(t *testing.T) {
			services, err := ParseServices([]byte(test.file))
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, s := range services {
				names = append(names, s.Name.String())
			}
			if strings.Join(names, " ") != test.want {
				t.Errorf("got %v, want %s", names, test.want)
			}
		})
	}
}

func TestRequestedClusterIPs(t *testing.T) {
	const four, six = "100.64.64.7", "fd00:1::7"
	for _, test := range []struct {
		fields   string
		ips      string
		policy   lb.FamilyPolicy
		families []lb.Family
	}{
		{"type: ClusterIP", "", lb.SingleStack, nil},
		{`clusterIP: ""`, "", lb.SingleStack, nil},
		{"clusterIP: " + four, four, lb.SingleStack, []lb.Family{lb.IPv4}},
		{"clusterIPs: [" + four + "]", four, lb.SingleStack, []lb.Family{lb.IPv4}},
		{"clusterIP: " + four + "\n  clusterIPs: [" + four + "]", four, lb.SingleStack, []lb.Family{lb.IPv4}},
		{"clusterIP: '" + six + "'", six, lb.SingleStack, []lb.Family{lb.IPv6}},
		{"clusterIP: 'FD00:1:0::7'", six, lb.SingleStack, []lb.Family{lb.IPv6}},
		{"clusterIPs: [" + four + ", '" + six + "']", four + " " + six, lb.RequireDualStack, []lb.Family{lb.IPv4, lb.IPv6}},
		{"clusterIP: '" + six + "'\n  clusterIPs: ['" + six + "', " + four + "]", six + " " + four, lb.RequireDualStack, []lb.Family{lb.IPv6, lb.IPv4}},
		{"clusterIP: " + four + "\n  ipFamilyPolicy: PreferDualStack", four, lb.PreferDualStack, []lb.Family{lb.IPv4}},
		{"clusterIP: " + four + "\n  ipFamilies: [IPv4, IPv6]", four, lb.RequireDualStack, []lb.Family{lb.IPv4, lb.IPv6}},
		{"ipFamilyPolicy: PreferDualStack", "", lb.PreferDualStack, nil},
		{"ipFamilyPolicy: RequireDualStack", "", lb.RequireDualStack, nil},
		{"ipFamilies: [IPv6]", "", lb.SingleStack, []lb.Family{lb.IPv6}},
		{"ipFamilies: [IPv6, IPv4]", "", lb.RequireDualStack, []lb.Family{lb.IPv6, lb.IPv4}},
		{"ipFamilies: [IPv6, IPv4]\n  ipFamilyPolicy: PreferDualStack", "", lb.PreferDualStack, []lb.Family{lb.IPv6, lb.IPv4}},
	} {
		services, err := ParseServices([]byte(strings.Replace(shop, "spec:\n", "spec:\n  "+test.fields+"\n", 1)))
		if err != nil {
			t.Errorf("%s: %v", test.fields, err)
			continue
		}
		var ips []string
		for _, ip := range services[0].ClusterIPs {
			ips = append(ips, ip.String())
		}
		if want := (lb.FamilyRequest{Policy: test.policy, Families: test.families}); strings.Join(ips, " ") != test.ips || !reflect.DeepEqual(services[0].Families, want) {
			t.Errorf("%s: %s, %+v; want %s, %+v", test.fields, ips, services[0].Families, test.ips, want)
		}
	}
}

func TestParseServicesRefuses(t *testing.T) {
	for _, test := range []struct{ old, new, want string }{
		{"kind: Service", "kind: Deployment", `document 1: kind "Deployment" of apiVersion "v1" is not known here, only Service and List of apiVersion v1 are`},
		{"apiVersion: v1", "apiVersion: v2", `kind "Service" of apiVersion "v2" is not known`},
		{"kind: Service\n", "", "document 1: it has no kind"},
		{shop, "- a\n- b\n", "document 1: it is not a Kubernetes object"},
		{shop, "just text", "document 1: it is not a Kubernetes object"},
		{shop, "a: b: c", "document 1: "},
		{shop, "", "the file has no Service"},
		{shop, "# nothing", "the file has no Service"},
		{shop, `{"kind":`, "document 1: unexpected EOF"},
		{shop, "--- !x\na: b", "after document 0: "},
		{shop, strings.Repeat("#", MaxManifest+1), "at most 1048576 are allowed"},
		{shop, shop + "---\n" + shop, "the file has service web/shop twice"},
		{shop, shop + "---\nkind: Pod\napiVersion: v1\n", `document 2: kind "Pod"`},
		{"spec:", "specs:", `unknown field "specs"`},
		{"spec:", "Spec:", `unknown field "Spec"`},
		{"    port: 80\n", "    port: 80\n    port: 81\n", `already set in map`},
		{"selector:", "selecter:", `unknown field "spec.selecter"`},
		{"port: 80\n", "port: eighty\n", "document 1: "},
		{"name: shop\n", "name: Shop\n", `document 1: service web/Shop: metadata.name "Shop"`},
		{"name: shop\n", "name: 1shop\n", `metadata.name "1shop"`},
		{"name: shop\n", "name: " + strings.Repeat("s", 64) + "\n", "must be no more than 63"},
		{"name: shop\n", "generateName: shop-\n", "metadata.generateName is not supported"},
		{"namespace: web", "namespace: w_b", `metadata.namespace "w_b"`},
		{"prometheus.io/scrape: \"true\"", "a: " + strings.Repeat("x", lb.MaxValue), "service web/shop: it takes 66"},
		{"    prometheus.io/scrape: \"true\"\n", annotations(lb.MaxAnnotations), "service web/shop: 130 annotations, at most 128 are allowed"},
		{"affinity: local", "affinity: nearest", `document 1: service web/shop: annotation service.cilium.io/affinity has the value "nearest", which is allowed with service.cilium.io/lb-l7: enabled only`},
		{"service.cilium.io/global", "service.cilium.io/globle", `annotation "service.cilium.io/globle" is not known`},
		{`global: "true"`, `global: true`, "document 1: "}, // not a string: Kubernetes refuses it too
		{"selector:\n    app: shop", "type: ClusterIP", "spec.selector is missing"},
		{"app: shop", "app: sh op", "spec.selector \"app\": \"sh op\""},
		{"app: shop", "a p p: shop", "spec.selector \"a p p\""},
		{"  ports:\n  - name: http\n    port: 80\n    targetPort: 8080\n  - name: dns\n    protocol: UDP\n    port: 53\n", "", "spec.ports is missing"},
		{"targetPort: 8080", "targetPort: web", `spec.ports[0]: targetPort "web" is a name: write the number`},
		{"targetPort: 8080", `targetPort: "8080"`, `targetPort "8080" is a name: write the number`},
		{"targetPort: 8080", "targetPort: 70000", "spec.ports[0]: targetPort 70000: must be between 1 and 65535"},
		{"port: 53", "port: 0", "spec.ports[1]: port 0: must be between 1 and 65535"},
		{"port: 53", "port: -1", "port -1"},
		{"port: 53", "port: 65589", "port 65589"}, // 53 in 16 bits
		{"protocol: UDP", "protocol: SCTP", "spec.ports[1]: protocol SCTP is not available in this version"},
		{"protocol: UDP", "protocol: udp", `protocol "udp" is not one of TCP, UDP`},
		{"name: dns", "name: http", `spec.ports: port "http" 53/UDP is declared twice`},
		{"  - name: dns\n", "  -\n", "needs a name"},
		{"name: dns", "name: DNS", `port name "DNS"`},
		{"protocol: UDP\n    port: 53", "port: 80", "declared twice"},
		{"port: 53", "port: 53\n    nodePort: 30053", "spec.ports[1]: nodePort has no effect"},
		{"spec:", "spec:\n  type: NodePort", "spec.type NodePort is not available in this version"},
		{"spec:", "spec:\n  type: LoadBalancer", "spec.type LoadBalancer is not available in this version"},
		{"spec:", "spec:\n  type: ExternalName\n  externalName: a.b", "spec.type ExternalName is a DNS alias"},
		{"spec:", "spec:\n  type: Cluster", `spec.type "Cluster" is not known`},
		{"spec:", "spec:\n  clusterIP: None", "spec.clusterIP None (a headless Service)"},
		{"spec:", "spec:\n  clusterIP: ::ffff:1.2.3.4", "is IPv4 written as IPv6, write 1.2.3.4"},
		{"spec:", "spec:\n  clusterIP: 'fe80::1'", `spec.clusterIP "fe80::1": address fe80::1 is link-local`},
		{"spec:", "spec:\n  clusterIP: 'fd00::1%eth0'", "has a zone"},
		{"spec:", "spec:\n  clusterIP: 127.0.0.1", "is a loopback address"},
		{"spec:", "spec:\n  clusterIP: 100.64.64", `spec.clusterIP "100.64.64"`},
		{"spec:", "spec:\n  clusterIP: 100.64.64.1\n  clusterIPs: [100.64.64.2]", "differ"},
		{"spec:", "spec:\n  clusterIPs: [None]", "headless"},
		{"spec:", "spec:\n  clusterIPs: [100.64.64.1, '']", "has an empty address"},
		{"spec:", "spec:\n  clusterIPs: [100.64.64.1, 'fd00::1', 'fd00::2']", "spec.clusterIPs has 3 addresses"},
		{"spec:", "spec:\n  clusterIPs: ['fd00::1', 'fd00::2']", "two addresses of IPv6"},
		{"spec:", "spec:\n  clusterIP: 'fd00::1'\n  clusterIPs: [100.64.64.1, 'fd00::1']", "differ"},
		{"spec:", "spec:\n  clusterIPs: [100.64.64.1, 'fd00::1']\n  ipFamilyPolicy: SingleStack", "name two families"},
		{"spec:", "spec:\n  clusterIPs: [100.64.64.1, 'fd00::1']\n  ipFamilies: [IPv6, IPv4]", "spec.clusterIPs[0] 100.64.64.1 is IPv4, but spec.ipFamilies[0] IPv6"},
		{"spec:", "spec:\n  clusterIP: 100.64.64.1\n  ipFamilies: [IPv6]", "is IPv4, but spec.ipFamilies[0] IPv6"},
		{"spec:", "spec:\n  ipFamilies: [IPv5]", `spec.ipFamilies has "IPv5"`},
		{"spec:", "spec:\n  ipFamilies: [IPv4, IPv6, IPv4]", "spec.ipFamilies has 3 entries"},
		{"spec:", "spec:\n  ipFamilies: [IPv4, IPv4]", "spec.ipFamilies has IPv4 twice"},
		{"spec:", "spec:\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: SingleStack", "name two families"},
		{"spec:", "spec:\n  ipFamilyPolicy: DualStack", `spec.ipFamilyPolicy "DualStack" is not one of`},
		{"spec:", "spec:\n  sessionAffinity: ClientIP", `spec.sessionAffinity "ClientIP" is not available in this version`},
		{"spec:", "spec:\n  internalTrafficPolicy: Local", `spec.internalTrafficPolicy "Local" is not available`},
		{"spec:", "spec:\n  publishNotReadyAddresses: true", "spec.publishNotReadyAddresses is not available"},
		{"spec:", "spec:\n  trafficDistribution: PreferClose", "spec.trafficDistribution"},
		{"spec:", "spec:\n  externalIPs: [1.2.3.4]", "spec.externalIPs has no effect"},
		{"spec:", "spec:\n  externalTrafficPolicy: Local", "spec.externalTrafficPolicy has no effect"},
		{"spec:", "spec:\n  loadBalancerIP: 1.2.3.4", "spec.loadBalancerIP has no effect"},
		{"  - name: http", "  - appProtocol: h2 c\n    name: http", `spec.ports[0]: appProtocol "h2 c"`},
		{"spec:", "spec:\n  externalName: a.b", "spec.externalName has no effect"},
	} {
		file := strings.Replace(shop, test.old, test.new, 1)
		if file == shop {
			t.Fatalf("%q is not in the manifest", test.old)
		}
		services, err := ParseServices([]byte(file))
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%.60q → %.60q:\n got %v\nwant … %s …", test.old, test.new, err, test.want)
		}
		if services != nil {
			t.Errorf("%.60q → %.60q: refused, and yet returns %+v", test.old, test.new, services)
		}
		if err != nil && len(err.Error()) > 600 {
			t.Errorf("%.60q → %.60q: an error of %d bytes", test.old, test.new, len(err.Error()))
		}
	}
}

func annotations(n int) string {
	var lines strings.Builder
	for i := range n {
		fmt.Fprintf(&lines, "    a%d: \"1\"\n", i)
	}
	return lines.String()
}

func TestListsRefuse(t *testing.T) {
	for _, test := range []struct{ old, new, want string }{
		{`"kind":"Service"`, `"kind":"Pod"`, `document 1: item 1: kind "Pod"`},
		{`"kind":"Service",`, ``, `item 1: kind "" of apiVersion "v1"`},
		{`"items"`, `"item"`, `unknown field "item"`},
		{`"selector"`, `"select"`, `item 1: unknown field "spec.select"`},
		{`"port":80`, `"port":0`, "item 1: service default/cart: spec.ports[0]"},
		{`"items":[`, `"items":[7,`, "item 1 is not a Kubernetes object"},
	} {
		file := strings.Replace(exported, test.old, test.new, 1)
		if _, err := ParseServices([]byte(file)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s → %s:\n got %v\nwant … %s …", test.old, test.new, err, test.want)
		}
	}
}

// FuzzParseServices holds that whatever is accepted can be stored, and says the same once read again.
func FuzzParseServices(f *testing.F) {
	f.Add([]byte(shop))
	f.Add([]byte(exported))
	f.Add([]byte(shop + "---\n" + shop))
	f.Add([]byte(strings.Replace(shop, "spec:\n", "spec:\n  clusterIPs: [100.64.64.7, 'fd00:1::7']\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: PreferDualStack\n", 1)))
	f.Fuzz(func(t *testing.T, file []byte) {
		services, err := ParseServices(file)
		if err != nil {
			return
		}
		if len(services) == 0 {
			t.Error("neither services nor an error")
		}
		for _, s := range services {
			s.Cluster, s.ClusterID = "east", 1
			if len(s.ClusterIPs) == 0 {
				s.ClusterIPs = []netip.Addr{netip.MustParseAddr("100.64.64.1")}
			}
			value := lb.EncodeService(s.Service)
			again, err := lb.DecodeService(lb.ServiceKey(s.Cluster, s.Name), value)
			if err != nil {
				t.Fatalf("%+v cannot be stored: %v", s, err)
			}
			if string(lb.EncodeService(again)) != string(value) {
				t.Errorf("%+v became %+v", s, again)
			}
		}
	})
}
