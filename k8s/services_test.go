package k8s

import (
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"causeway/lb"
)

func addresses(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

// serviceCases has every field of a Service that Causeway looks at, or does not although one might think so.
var serviceCases = []struct {
	name    string
	labels  map[string]string
	spec    corev1.ServiceSpec
	ingress []corev1.LoadBalancerIngress
	// want changes the row of a Service of TCP port 80 with the cluster IPs that the API server gave it.
	want func(row *lb.Service, made *corev1.Service)
	none bool // no row
	// event is what the Service's Event says, if it has one.
	event string
}{
	{name: "cluster-ip", spec: corev1.ServiceSpec{}},
	{name: "given-cluster-ip", spec: corev1.ServiceSpec{ClusterIP: "10.96.9.9"},
		want: func(row *lb.Service, _ *corev1.Service) { row.ClusterIPs = addresses("10.96.9.9") }},
	{name: "dual-stack", spec: corev1.ServiceSpec{IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicyRequireDualStack)},
		want: func(row *lb.Service, made *corev1.Service) {
			row.ClusterIPs = addresses(made.Spec.ClusterIPs[0], made.Spec.ClusterIPs[1])
		}},
	{name: "ipv6-first", spec: corev1.ServiceSpec{IPFamilies: []corev1.IPFamily{corev1.IPv6Protocol}},
		want: func(row *lb.Service, made *corev1.Service) {
			if row.ClusterIPs = addresses(made.Spec.ClusterIPs...); !row.ClusterIPs[0].Is6() {
				panic("not IPv6")
			}
		}},
	{name: "headless", spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone},
		want: func(row *lb.Service, _ *corev1.Service) { row.Headless, row.ClusterIPs = true, nil }},
	{name: "headless-without-ports", spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Ports: []corev1.ServicePort{}},
		want: func(row *lb.Service, _ *corev1.Service) { row.Headless, row.ClusterIPs, row.Ports = true, nil, nil }},
	{name: "without-selector", spec: corev1.ServiceSpec{Selector: map[string]string{}}},
	{name: "external-name", spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.org"}, none: true},
	{name: "other-proxy", labels: map[string]string{labelServiceProxyName: "mine"}, none: true},
	{name: "node-port", spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort},
		want: func(row *lb.Service, made *corev1.Service) {
			row.Ports[0].NodePort = uint16(made.Spec.Ports[0].NodePort)
		}},
	{name: "given-node-port", spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80, NodePort: 31234}}},
		want: func(row *lb.Service, _ *corev1.Service) { row.Ports[0].NodePort = 31234 }},
	{name: "load-balancer", spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, ExternalIPs: []string{"198.51.100.7", "2001:db8::7"}},
		ingress: []corev1.LoadBalancerIngress{
			{IP: "203.0.113.1"}, {IP: "203.0.113.2", IPMode: ptr.To(corev1.LoadBalancerIPModeVIP)}, {IP: "203.0.113.3", IPMode: ptr.To(corev1.LoadBalancerIPModeProxy)},
			{Hostname: "lb.example.org"}, {IP: "198.51.100.7"},
		},
		want: func(row *lb.Service, made *corev1.Service) {
			row.Ports[0].NodePort = uint16(made.Spec.Ports[0].NodePort)
			row.ExternalIPs = addresses("198.51.100.7", "2001:db8::7", "203.0.113.1", "203.0.113.2")
		}},
	{name: "load-balancer-without-node-ports", spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, AllocateLoadBalancerNodePorts: ptr.To(false)}},
	{name: "load-balancer-source-ranges", spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, AllocateLoadBalancerNodePorts: ptr.To(false), LoadBalancerSourceRanges: []string{"192.0.2.0/24"}, ExternalIPs: []string{"198.51.100.8"},
	}, ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.9"}},
		want:  func(row *lb.Service, _ *corev1.Service) { row.ExternalIPs = addresses("198.51.100.8") },
		event: "Unsupported: the load balancer's addresses 203.0.113.9 are not served"},
	{name: "external-ips", spec: corev1.ServiceSpec{ExternalIPs: []string{"198.51.100.9"}},
		want: func(row *lb.Service, _ *corev1.Service) { row.ExternalIPs = addresses("198.51.100.9") }},
	{name: "reserved-external-ip", spec: corev1.ServiceSpec{ExternalIPs: []string{"240.0.0.1"}},
		event: `Unsupported: externalIPs "240.0.0.1" is not served`},
	{name: "external-traffic-policy", spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal},
		want: func(row *lb.Service, made *corev1.Service) {
			row.Ports[0].NodePort, row.ExternalLocal = uint16(made.Spec.Ports[0].NodePort), true
		}},
	{name: "health-check-node-port", spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal, HealthCheckNodePort: 32100,
	}, want: func(row *lb.Service, made *corev1.Service) {
		row.Ports[0].NodePort, row.ExternalLocal, row.HealthCheckNodePort = uint16(made.Spec.Ports[0].NodePort), true, 32100
	}},
	{name: "internal-traffic-policy", spec: corev1.ServiceSpec{InternalTrafficPolicy: ptr.To(corev1.ServiceInternalTrafficPolicyLocal)},
		want: func(row *lb.Service, _ *corev1.Service) { row.InternalLocal = true }},
	{name: "session-affinity", spec: corev1.ServiceSpec{SessionAffinity: corev1.ServiceAffinityClientIP},
		want: func(row *lb.Service, _ *corev1.Service) { row.SessionAffinity = 10800 }},
	{name: "session-affinity-timeout", spec: corev1.ServiceSpec{
		SessionAffinity:       corev1.ServiceAffinityClientIP,
		SessionAffinityConfig: &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr.To[int32](30)}},
	}, want: func(row *lb.Service, _ *corev1.Service) { row.SessionAffinity = 30 }},
	{name: "publish-not-ready", spec: corev1.ServiceSpec{PublishNotReadyAddresses: true}},
	{name: "several-ports", spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{
		{Name: "http", Port: 80, TargetPort: intstr.FromString("web"), AppProtocol: ptr.To("kubernetes.io/h2c")},
		{Name: "admin", Port: 81, TargetPort: intstr.FromInt32(8081)},
		{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP},
	}}, want: func(row *lb.Service, _ *corev1.Service) {
		row.Ports = []lb.ServicePort{
			{Name: "http", Protocol: lb.TCP, Port: 80, AppProtocol: "kubernetes.io/h2c"},
			{Name: "admin", Protocol: lb.TCP, Port: 81, TargetPort: 8081},
			{Name: "dns", Protocol: lb.UDP, Port: 53, TargetPort: 53},
		}
	}},
	{name: "sctp", spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}, {Name: "sig", Port: 3868, Protocol: corev1.ProtocolSCTP}}},
		want:  func(row *lb.Service, _ *corev1.Service) { row.Ports[0].Name = "http" },
		event: "Unsupported: port 3868/SCTP has no effect"},
	{name: "traffic-distribution", spec: corev1.ServiceSpec{TrafficDistribution: ptr.To(corev1.ServiceTrafficDistributionPreferClose)}},
	{name: "more-ports-than-others-take", spec: corev1.ServiceSpec{Ports: manyPorts(70)}, // which is no matter while it is not global
		want: func(row *lb.Service, made *corev1.Service) {
			row.Ports = nil
			for _, p := range made.Spec.Ports {
				row.Ports = append(row.Ports, lb.ServicePort{Name: p.Name, Protocol: lb.TCP, Port: uint16(p.Port), TargetPort: uint16(p.Port)})
			}
		}},
}

func manyPorts(n int) (ports []corev1.ServicePort) {
	for i := range n {
		ports = append(ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", i), Port: int32(1000 + i)})
	}
	return ports
}

// TestEveryFieldIsDocumented: docs/services.md says of each field of a Service what comes of it.
func TestEveryFieldIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/services.md")
	if err != nil {
		t.Fatal(err)
	}
	for prefix, of := range map[string]reflect.Type{"": reflect.TypeFor[corev1.ServiceSpec](), "ports.": reflect.TypeFor[corev1.ServicePort](), "conditions.": reflect.TypeFor[discoveryv1.EndpointConditions]()} {
		for i := range of.NumField() {
			field, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
			if says := regexp.MustCompile("`" + regexp.QuoteMeta(prefix+field) + "[`:]"); !says.Match(doc) {
				t.Errorf("docs/services.md has no line on %s%s", prefix, field)
			}
		}
	}
}

func testServices(t *testing.T, h *harness) {
	namespace := h.namespace("services")
	services := h.api.client.CoreV1().Services(namespace)
	for _, tc := range serviceCases {
		t.Run(tc.name, func(t *testing.T) {
			name := lb.Name{Namespace: namespace, Name: tc.name}
			if tc.spec.Ports == nil {
				tc.spec.Ports = []corev1.ServicePort{{Port: 80}}
			}
			if tc.spec.Selector == nil {
				tc.spec.Selector = map[string]string{"app": tc.name}
			}
			made, err := services.Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{
				Name: tc.name, Labels: tc.labels, Annotations: map[string]string{"example.org/other": "is not ours"},
			}, Spec: tc.spec}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if len(tc.ingress) > 0 {
				made.Status.LoadBalancer.Ingress = tc.ingress
				if made, err = services.UpdateStatus(t.Context(), made, metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			want := lb.Service{
				Cluster: "east", ClusterID: 1, Name: name, Affinity: lb.AffinityNone,
				Ports: []lb.ServicePort{{Protocol: lb.TCP, Port: 80, TargetPort: 80}},
			}
			if made.Spec.ClusterIP != corev1.ClusterIPNone && made.Spec.ClusterIP != "" {
				want.ClusterIPs = addresses(made.Spec.ClusterIP)
			}
			if tc.want != nil {
				tc.want(&want, made)
			}
			if tc.none {
				waitSeen(h, namespace)
				if got := h.service(h.tables.DB.ReadTxn(), name); got != nil {
					t.Fatalf("it has the row %+v", got)
				}
				return
			}
			h.wait(func(read statedb.ReadTxn) string {
				if got := h.service(read, name); got == nil || !reflect.DeepEqual(*got, want) {
					return fmt.Sprintf("got  %+v\nwant %+v", got, want)
				}
				return ""
			})
			if tc.event != "" {
				h.waitEvent(t, made, tc.event)
			}
			if got := h.refusal(name); got != "" {
				t.Errorf("refused: %s", got)
			}
			if err := services.Delete(t.Context(), tc.name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			h.waitGone(name)
		})
	}
}

// waitSeen returns when all that was done to Services before has been seen.
func waitSeen(h *harness, namespace string) {
	h.t.Helper()
	services := h.api.client.CoreV1().Services(namespace)
	if _, err := services.Create(h.t.Context(), plainService("seen"), metav1.CreateOptions{}); err != nil {
		h.t.Fatal(err)
	}
	name := lb.Name{Namespace: namespace, Name: "seen"}
	h.wait(func(read statedb.ReadTxn) string {
		if h.service(read, name) == nil {
			return "the service " + name.String() + " does not come"
		}
		return ""
	})
	if err := services.Delete(h.t.Context(), "seen", metav1.DeleteOptions{}); err != nil {
		h.t.Fatal(err)
	}
	h.waitGone(name)
}

func (h *harness) waitGone(name lb.Name) {
	h.t.Helper()
	h.wait(func(read statedb.ReadTxn) string {
		if h.service(read, name) != nil {
			return "service " + name.String() + " is still there"
		}
		return ""
	})
}

func plainService(name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
}

// waitEvent returns when the Service has an Event, which must be "REASON: message…".
func (h *harness) waitEvent(t *testing.T, of *corev1.Service, want string) {
	t.Helper()
	events := h.api.client.CoreV1().Events(of.Namespace)
	options := metav1.ListOptions{FieldSelector: "involvedObject.kind=Service,involvedObject.uid=" + string(of.UID)}
	watch, err := events.Watch(t.Context(), options) // which begins with those that are there
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	select {
	case ev := <-watch.ResultChan():
		e, ok := ev.Object.(*corev1.Event)
		if !ok || !strings.HasPrefix(e.Reason+": "+e.Message, want) {
			t.Fatalf("got %+v, want %s", ev.Object, want)
		}
		if e.Type != corev1.EventTypeWarning || e.InvolvedObject.Name != of.Name || e.ReportingController == "" {
			t.Errorf("the Event is %+v", e)
		}
	case <-time.After(patience):
		t.Fatalf("no Event %q", want)
	}
}

// testAnnotations follows one Service through changes of its annotations.
func testAnnotations(t *testing.T, h *harness) {
	namespace := h.namespace("annotations")
	services := h.api.client.CoreV1().Services(namespace)
	name := lb.Name{Namespace: namespace, Name: "shop"}
	object := plainService("shop")
	const global, shared, affinity = lb.AnnotationGlobal, lb.AnnotationShared, lb.AnnotationAffinity
	for i, tc := range []struct {
		what           string
		annotations    map[string]string
		ports          []corev1.ServicePort
		again          bool // delete it first
		global, shared bool
		affinity       lb.Affinity
		refused        string
		event          string
	}{
		{what: "a new one that is refused is not global", annotations: map[string]string{global: "yes"},
			refused: `annotation service.cilium.io/global has the value "yes"`, event: "InvalidAnnotation: annotation service.cilium.io/global has the value"},
		{what: "corrected", annotations: map[string]string{global: "true"}, global: true, shared: true},
		{what: "all that can be said", annotations: map[string]string{global: "true", shared: "false", affinity: "local"}, global: true, affinity: lb.AffinityLocal},
		{what: "a later one that is refused leaves it as it was", annotations: map[string]string{global: "true", shared: "false", affinity: "locl"}, global: true, affinity: lb.AffinityLocal,
			refused: `affinity has the value "locl"`},
		{what: "but its spec counts", annotations: map[string]string{global: "true", affinity: "locl"}, ports: []corev1.ServicePort{{Port: 81}}, global: true, affinity: lb.AffinityLocal,
			refused: `affinity has the value "locl"`},
		{what: "another Service of the name starts anew", annotations: map[string]string{global: "true", affinity: "locl"}, again: true,
			refused: `affinity has the value "locl"`},
		{what: "what other clusters could not take stays at home", annotations: map[string]string{global: "true"}, ports: manyPorts(70), refused: "70 ports"},
		{what: "no annotations", ports: []corev1.ServicePort{{Port: 80}}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			if tc.again {
				if err := services.Delete(t.Context(), "shop", metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}
				h.waitGone(name)
				object = plainService("shop")
			}
			object.Annotations = tc.annotations
			if tc.ports != nil {
				object.Spec.Ports = tc.ports
			}
			var err error
			if i == 0 || tc.again {
				object, err = services.Create(t.Context(), object, metav1.CreateOptions{})
			} else {
				object, err = services.Update(t.Context(), object, metav1.UpdateOptions{})
			}
			if err != nil {
				t.Fatal(err)
			}
			if tc.affinity == "" {
				tc.affinity = lb.AffinityNone
			}
			h.wait(func(read statedb.ReadTxn) string {
				got := h.service(read, name)
				switch refused := h.refusal(name); {
				case got == nil:
					return "it has no row"
				case got.Global != tc.global || got.Shared != tc.shared || got.Affinity != tc.affinity:
					return fmt.Sprintf("got %+v", got)
				case int(got.Ports[0].Port) != int(object.Spec.Ports[0].Port):
					return fmt.Sprintf("its ports are %v", got.Ports)
				case (refused == "") != (tc.refused == "") || !strings.Contains(refused, tc.refused):
					return "refused: " + refused
				}
				return ""
			})
			if tc.event != "" {
				h.waitEvent(t, object, tc.event)
			}
		})
	}
	if err := services.Delete(t.Context(), "shop", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	h.waitGone(name)
}
