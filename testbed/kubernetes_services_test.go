package testbed

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// servicesNamespace is that of TestKubernetesServices in both clusters.
const servicesNamespace = "services-test"

// servicesPods are the servers of all cases, one on each node, that say their own names; one that is never ready, as nobody listens where it is probed; and
// clients. CLUSTER stands for the cluster's name. The named port odd has another number on each node.
const servicesPods = `
apiVersion: v1
kind: Namespace
metadata: {name: services-test}
---
{apiVersion: v1, kind: Pod, metadata: {name: CLUSTER-node1, namespace: services-test, labels: {app: web, on: node1}}, spec: {
  nodeName: node1, terminationGracePeriodSeconds: 0, containers: [
    {name: web, image: agnhost, args: [netexec], ports: [{name: web, containerPort: 8080}, {name: udp, containerPort: 8081, protocol: UDP}],
      readinessProbe: {httpGet: {path: /healthz, port: web}, periodSeconds: 1}},
    {name: odd, image: agnhost, args: [netexec, --http-port=9001, --udp-port=-1], ports: [{name: odd, containerPort: 9001}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: CLUSTER-node2, namespace: services-test, labels: {app: web, on: node2}}, spec: {
  nodeName: node2, terminationGracePeriodSeconds: 0, containers: [
    {name: web, image: agnhost, args: [netexec], ports: [{name: web, containerPort: 8080}, {name: udp, containerPort: 8081, protocol: UDP}],
      readinessProbe: {httpGet: {path: /healthz, port: web}, periodSeconds: 1}},
    {name: odd, image: agnhost, args: [netexec, --http-port=9002, --udp-port=-1], ports: [{name: odd, containerPort: 9002}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: CLUSTER-unready, namespace: services-test, labels: {app: unready}}, spec: {
  nodeName: node2, terminationGracePeriodSeconds: 0, containers: [
    {name: web, image: agnhost, args: [netexec], readinessProbe: {tcpSocket: {port: 1}, periodSeconds: 1}}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client1, namespace: services-test, labels: {app: client}}, spec: {
  nodeName: node1, terminationGracePeriodSeconds: 0, containers: [{name: client, image: agnhost}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client2, namespace: services-test, labels: {app: client}}, spec: {
  nodeName: node2, terminationGracePeriodSeconds: 0, containers: [{name: client, image: agnhost}]}}
`

// serviceAsk is what a client does to a service of east, and who must answer.
type serviceAsk struct {
	// from is pod1 or pod2, which are pods on east's nodes, west, which is a pod there, node1 or node2 of east, or outside, a machine that is no node.
	from string
	// url may have {ip} and {ip6}, the service's cluster IPs in east; {port}, its first port's node port; {health}, its health check node port; {node1} and {node2},
	// addresses of nodes. What begins with "udp:" is asked by datagrams.
	url string
	// want is who answers, all of them and nobody else: "both" of east's servers, "west", which are those there, "all" four, one by name; "refused" if nobody does and
	// the client is told at once, "none" if it is not told.
	want string
	// one of them answers always.
	one bool
	// kept: all requests are on one connection.
	kept bool
}

const (
	web    = "selector: {app: web}, ports: [{port: 80, targetPort: 8080}]"
	onOne  = "selector: {app: web, on: node1}, ports: [{port: 80, targetPort: 8080}]"
	global = `service.cilium.io/global: "true"`
	named  = "http://{ip}/hostname"
)

// servicesCases have each a Service of the case's name in east; spec and annotations are YAML in braces.
var servicesCases = []struct {
	name        string
	spec        string
	annotations string
	// west has the same Service with these annotations, if they are not empty.
	west string
	// ingress is the address of a load balancer that leads to node1.
	ingress string
	// more is another object of east.
	more string
	asks []serviceAsk
	// event is how an Event of the Service begins.
	event string
}{
	{name: "cluster-ip", spec: web, asks: []serviceAsk{{from: "pod1", url: named, want: "both"}, {from: "pod2", url: "http://cluster-ip/hostname", want: "both"}, {from: "node1", url: named, want: "both"},
		{from: "pod1", url: "http://{ip}:81/hostname", want: "none"}}},
	{name: "without-backends", spec: "selector: {app: nobody}, ports: [{port: 80}]", asks: []serviceAsk{{from: "pod1", url: named, want: "refused"}, {from: "node1", url: named, want: "refused"}}},
	{name: "headless", spec: "clusterIP: None, " + web, asks: []serviceAsk{{from: "pod1", url: "http://headless:8080/hostname", want: "both", one: true}}},
	{name: "node-port", spec: "type: NodePort, " + web, asks: []serviceAsk{
		{from: "outside", url: "http://{node1}:{port}/hostname", want: "both"}, {from: "outside", url: "http://{node2}:{port}/hostname", want: "both"},
		{from: "node1", url: "http://{node2}:{port}/hostname", want: "both"}, {from: "node1", url: "http://{node1}:{port}/hostname", want: "both"},
		{from: "pod2", url: "http://{node1}:{port}/hostname", want: "both"}, {from: "pod1", url: named, want: "both"}}},
	{name: "load-balancer", spec: "type: LoadBalancer, " + web, ingress: "203.0.113.10", asks: []serviceAsk{
		{from: "outside", url: "http://203.0.113.10/hostname", want: "both"}, {from: "pod1", url: "http://203.0.113.10/hostname", want: "both"}}},
	{name: "source-ranges", spec: "type: LoadBalancer, loadBalancerSourceRanges: [192.0.2.0/24], " + web, ingress: "203.0.113.11",
		asks:  []serviceAsk{{from: "outside", url: "http://{node1}:{port}/hostname", want: "both"}, {from: "outside", url: "http://203.0.113.11/hostname", want: "none"}},
		event: "Unsupported: the load balancer's addresses 203.0.113.11 are not served"},
	{name: "external-ips", spec: "externalIPs: [203.0.113.12], " + web, asks: []serviceAsk{
		{from: "outside", url: "http://203.0.113.12/hostname", want: "both"}, {from: "pod2", url: "http://203.0.113.12/hostname", want: "both"}}},
	{name: "external-name", spec: "type: ExternalName, externalName: cluster-ip.services-test.svc.cluster.local", asks: []serviceAsk{{from: "pod1", url: "http://external-name/hostname", want: "both"}}},
	{name: "external-policy", spec: "type: LoadBalancer, externalTrafficPolicy: Local, " + onOne, ingress: "203.0.113.13", asks: []serviceAsk{
		{from: "outside", url: "http://{node1}:{port}/hostname", want: "east-node1"}, {from: "outside", url: "http://{node2}:{port}/hostname", want: "refused"},
		{from: "outside", url: "http://203.0.113.13/hostname", want: "east-node1"}, {from: "node2", url: "http://{node2}:{port}/hostname", want: "east-node1"},
		{from: "pod2", url: "http://{node2}:{port}/hostname", want: "east-node1"}, {from: "node1", url: "http://{node2}:{port}/hostname", want: "refused"}, {from: "pod2", url: named, want: "east-node1"},
		{from: "outside", url: "http://{node1}:{health}/", want: "localEndpoints 1"}, {from: "outside", url: "http://{node2}:{health}/", want: "localEndpoints 0"}}},
	{name: "internal-policy", spec: "type: NodePort, internalTrafficPolicy: Local, " + onOne, asks: []serviceAsk{
		{from: "pod1", url: named, want: "east-node1"}, {from: "pod2", url: named, want: "refused"}, {from: "node2", url: named, want: "refused"},
		{from: "outside", url: "http://{node2}:{port}/hostname", want: "east-node1"}}},
	{name: "session-affinity", spec: "type: NodePort, sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}, " + web, asks: []serviceAsk{
		{from: "pod1", url: named, want: "both", one: true}, {from: "node2", url: named, want: "both", one: true},
		{from: "outside", url: "http://{node1}:{port}/hostname", want: "both", one: true}}},
	{name: "ports", spec: "selector: {app: web}, ports: [{name: a, port: 80, targetPort: web}, {name: b, port: 81, targetPort: odd}, {name: c, port: 81, protocol: UDP, targetPort: udp}]", asks: []serviceAsk{
		{from: "pod1", url: named, want: "both"}, {from: "pod1", url: "http://{ip}:81/hostname", want: "both"}, {from: "pod1", url: "udp:{ip}/81", want: "both"}}},
	{name: "udp", spec: "type: NodePort, selector: {app: web}, ports: [{port: 53, protocol: UDP, targetPort: 8081}]", annotations: global, west: global, asks: []serviceAsk{
		{from: "pod2", url: "udp:{ip}/53", want: "all"}, {from: "node1", url: "udp:{ip}/53", want: "all"}, {from: "outside", url: "udp:{node1}/{port}", want: "all"}}},
	{name: "sctp", spec: "selector: {app: web}, ports: [{name: a, port: 80, targetPort: 8080}, {name: b, port: 3868, protocol: SCTP}]",
		asks: []serviceAsk{{from: "pod1", url: named, want: "both"}}, event: "Unsupported: port 3868/SCTP has no effect"},
	{name: "dual-stack", spec: "ipFamilyPolicy: RequireDualStack, " + web, annotations: global, west: global, asks: []serviceAsk{
		{from: "pod1", url: named, want: "all"}, {from: "pod2", url: "http://[{ip6}]/hostname", want: "all"}}},
	{name: "ipv6", spec: "ipFamilies: [IPv6], " + web, asks: []serviceAsk{{from: "pod1", url: "http://ipv6/hostname", want: "both"}}},
	{name: "not-ready", spec: "selector: {app: unready}, ports: [{port: 80, targetPort: 8080}]", asks: []serviceAsk{{from: "pod1", url: named, want: "refused"}}},
	{name: "publish-not-ready", spec: "publishNotReadyAddresses: true, selector: {app: unready}, ports: [{port: 80, targetPort: 8080}]", asks: []serviceAsk{
		{from: "pod1", url: named, want: "east-unready"}, {from: "node1", url: named, want: "east-unready"}}},
	{name: "own-slice", spec: "ports: [{port: 80}]", more: ownSlice("own-slice", "{ready: false}", "{ready: true}"), asks: []serviceAsk{{from: "pod1", url: named, want: "east-node2"}}},
	{name: "terminating-beside-ready", spec: "ports: [{port: 80}]", more: ownSlice("terminating-beside-ready", "{ready: false, serving: true, terminating: true}", "{ready: true}"),
		asks: []serviceAsk{{from: "pod1", url: named, want: "east-node2"}}},
	{name: "terminating-alone", spec: "ports: [{port: 80}]", more: ownSlice("terminating-alone", "{ready: false, serving: true, terminating: true}", "{ready: false, serving: false, terminating: true}"),
		asks: []serviceAsk{{from: "pod1", url: named, want: "east-node1"}}},
	{name: "traffic-distribution", spec: "trafficDistribution: PreferClose, " + web, asks: []serviceAsk{{from: "pod1", url: named, want: "both"}}},
	{name: "global", spec: "type: NodePort, " + web, annotations: global, west: global, asks: []serviceAsk{
		{from: "pod1", url: named, want: "all"}, {from: "node2", url: named, want: "all"}, {from: "outside", url: "http://{node1}:{port}/hostname", want: "all"},
		{from: "west", url: "http://global/hostname", want: "all"}, {from: "west", url: named, want: "all"}}},
	{name: "not-global-there", spec: web, annotations: global, west: `service.cilium.io/global: "false"`, asks: []serviceAsk{
		{from: "pod1", url: named, want: "both"}, {from: "west", url: "http://not-global-there/hostname", want: "west"}}},
	{name: "not-shared-there", spec: web, annotations: global, west: global + `, service.cilium.io/shared: "false"`, asks: []serviceAsk{
		{from: "pod1", url: named, want: "both"}, {from: "west", url: "http://not-shared-there/hostname", want: "all"}}},
	{name: "affinity-local", spec: web, annotations: global + ", service.cilium.io/affinity: local", west: global, asks: []serviceAsk{
		{from: "pod1", url: named, want: "both"}, {from: "west", url: "http://affinity-local/hostname", want: "all"}}},
	{name: "affinity-remote", spec: web, annotations: global + ", service.cilium.io/affinity: remote", west: global, asks: []serviceAsk{
		{from: "pod1", url: named, want: "west"}}},
	{name: "l4", spec: web, annotations: global, west: global, asks: []serviceAsk{{from: "pod1", url: named, want: "all", one: true, kept: true}}},
	{name: "l7", spec: web, annotations: global + ", service.cilium.io/lb-l7: enabled", west: global + ", service.cilium.io/lb-l7: enabled",
		asks: []serviceAsk{{from: "pod1", url: named, want: "all", kept: true}, {from: "node2", url: named, want: "all", kept: true}}},
	{name: "l7-clusters", spec: web, annotations: global + `, service.cilium.io/lb-l7: enabled, service.cilium.io/lb-l7-algorithm: random, causeway.io/clusters: "east=0,west=1"`, west: global,
		asks: []serviceAsk{{from: "pod1", url: named, want: "west", kept: true}}},
	{name: "l7-hash", spec: web, annotations: `service.cilium.io/lb-l7: enabled, causeway.io/l7-hash: "header:User-Agent"`,
		asks: []serviceAsk{{from: "pod1", url: named, want: "both", one: true}}},
	{name: "refused", spec: web, annotations: `service.cilium.io/global: "yes"`, west: global, asks: []serviceAsk{{from: "pod1", url: named, want: "both"}},
		event: `InvalidAnnotation: annotation service.cilium.io/global has the value "yes"`},
	{name: "misspelt", spec: web, annotations: `service.cilium.io/globl: "true"`, event: `InvalidAnnotation: annotation "service.cilium.io/globl" is not known`},
}

// ownSlice is an EndpointSlice that somebody wrote, of east's two servers with the conditions given.
func ownSlice(service, first, second string) string {
	return fmt.Sprintf(`{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: %s, namespace: services-test, labels: {kubernetes.io/service-name: %[1]s}}, addressType: IPv4,
  ports: [{port: 8080}], endpoints: [{addresses: [POD1], conditions: %s}, {addresses: [POD2], conditions: %s}]}`, service, first, second)
}

// serviceOfCase is what the API server gave to a case's Service.
type serviceOfCase struct {
	Metadata struct{ Name string }
	Spec     struct {
		ClusterIPs          []string
		HealthCheckNodePort int
		Ports               []struct{ NodePort int }
	}
}

// TestKubernetesServices applies a Service for each field that clients see something of, and asks it from wherever there can be clients. docs/services.md names the cases.
func TestKubernetesServices(t *testing.T) {
	k := kubernetesBed(t)
	for _, cluster := range []string{"east", "west"} {
		k.apply(cluster, strings.ReplaceAll(servicesPods, "CLUSTER", cluster))
	}
	for _, cluster := range []string{"east", "west"} {
		k.services(cluster, "wait", "--for=condition=Ready", "pods", "-l", "app in (web, client)", "--timeout=60s")
	}
	k.services("east", "wait", "--for=jsonpath={.status.podIP}", "pod/east-unready", "--timeout=60s")
	pods := strings.Fields(k.services("east", "get", "pods", "east-node1", "east-node2", "-o", "jsonpath={.items[*].status.podIP}"))
	var east, west strings.Builder
	for _, tc := range servicesCases {
		service := func(annotations string) string {
			return fmt.Sprintf("---\n{apiVersion: v1, kind: Service, metadata: {name: %s, namespace: services-test, annotations: {%s}}, spec: {%s}}\n", tc.name, annotations, tc.spec)
		}
		east.WriteString(service(tc.annotations))
		if tc.more != "" {
			east.WriteString("---\n" + strings.NewReplacer("POD1", pods[0], "POD2", pods[1]).Replace(tc.more) + "\n")
		}
		if tc.west != "" {
			west.WriteString(service(tc.west))
		}
	}
	// They go with their namespace.
	for cluster, manifest := range map[string]string{"east": east.String(), "west": west.String()} {
		if _, err := k.try(manifest, "--context", cluster, "apply", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range servicesCases {
		if tc.ingress != "" {
			k.services("east", "patch", "service", tc.name, "--subresource=status", "--type=merge", "-p", fmt.Sprintf(`{"status":{"loadBalancer":{"ingress":[{"ip":%q}]}}}`, tc.ingress))
		}
	}
	var list struct{ Items []serviceOfCase }
	if err := json.Unmarshal([]byte(k.services("east", "get", "services", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	// The machine outside reaches what is behind east by its first node.
	if out, code := run(t, k.bed, "west/kvstore", "ip", "route", "add", "203.0.113.0/24", "via", "172.29.1.11"); code != 0 {
		t.Fatal(out)
	}
	t.Cleanup(func() {
		var out strings.Builder
		if code, err := k.bed.Exec(context.Background(), Target{Cluster: "west"}, []string{"ip", "route", "del", "203.0.113.0/24"}, Stdio{Out: &out, Err: &out}); err != nil || code != 0 {
			t.Errorf("the route of the machine outside stays: %v, %s", err, &out)
		}
	})
	for _, tc := range servicesCases {
		t.Run(tc.name, func(t *testing.T) {
			k := &kube{T: t, bed: k.bed}
			i := slices.IndexFunc(list.Items, func(s serviceOfCase) bool { return s.Metadata.Name == tc.name })
			if tc.event != "" { // first, as it says that Causeway has seen all of the Service
				k.hasEvent(tc.name, tc.event)
			}
			replacer := list.Items[i].replacer()
			for _, a := range tc.asks {
				a.url = replacer.Replace(a.url)
				k.answered(a)
			}
		})
	}
	t.Run("source-address", func(t *testing.T) {
		i := slices.IndexFunc(list.Items, func(s serviceOfCase) bool { return s.Metadata.Name == "external-policy" })
		got, _ := run(t, k.bed, "west/kvstore", "curl", "-s", "-m", "5", list.Items[i].replacer().Replace("http://{node1}:{port}/clientip"))
		if at, err := netip.ParseAddrPort(got); err != nil || at.Addr().Unmap() != netip.MustParseAddr("172.29.2.2") {
			t.Errorf("with externalTrafficPolicy Local the server sees %q, not the client 172.29.2.2", got)
		}
	})
	t.Run("headless-addresses", func(t *testing.T) {
		got := strings.Fields(k.services("east", "exec", "client1", "--", "sh", "-c", "getent ahostsv4 headless | cut -d' ' -f1 | sort -u"))
		want := slices.Sorted(slices.Values(pods))
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("DNS has %q, want the servers' %q", got, want)
		}
	})
}

// replacer puts in what a Service was given.
func (s serviceOfCase) replacer() *strings.Replacer {
	with := []string{"{node1}", "172.29.1.11", "{node2}", "172.29.1.12", "{health}", strconv.Itoa(s.Spec.HealthCheckNodePort)}
	if len(s.Spec.Ports) > 0 {
		with = append(with, "{port}", strconv.Itoa(s.Spec.Ports[0].NodePort))
	}
	for _, ip := range s.Spec.ClusterIPs {
		if strings.Contains(ip, ":") {
			with = append(with, "{ip6}", ip)
		} else {
			with = append(with, "{ip}", ip)
		}
	}
	return strings.NewReplacer(with...)
}

// services is kubectl in the namespace of these tests.
func (k *kube) services(cluster string, args ...string) string {
	k.Helper()
	return k.kubectl(append([]string{"--context", cluster, "-n", servicesNamespace}, args...)...)
}

const (
	// askedAtOnce is how many requests a client sends at a time.
	askedAtOnce = 16
	// askByUDP asks a server of agnhost for its name, as often.
	askByUDP = `for i in $(seq 16); do exec 3<>/dev/udp/$0; printf hostname >&3; timeout 1 dd bs=512 count=1 <&3 2>/dev/null; printf ";"; done`
)

// those are the names of who answers, as serviceAsk.want has them.
func those(want string) []string {
	switch want {
	case "both":
		return []string{"east-node1", "east-node2"}
	case "all":
		return []string{"east-node1", "east-node2", "west-node1", "west-node2"}
	case "west":
		return []string{"west-node1", "west-node2"}
	}
	return []string{want}
}

// answered asks until all who should have answered, and nobody else in between: what was applied takes a moment to be everywhere.
func (k *kube) answered(a serviceAsk) {
	k.Helper()
	ctx, cancel := context.WithTimeout(k.Context(), 20*time.Second)
	defer cancel()
	want := those(a.want)
	var seen []string
	for {
		answers := k.answers(ctx, a)
		now := slices.Compact(slices.Sorted(slices.Values(answers)))
		right := len(now) > 0 && !slices.ContainsFunc(now, func(answer string) bool { return !slices.Contains(want, answer) })
		switch {
		case right && a.one && len(now) == 1:
			return
		case right && !a.one:
			seen = slices.Compact(slices.Sorted(slices.Values(append(seen, now...))))
			if len(seen) == len(want) {
				return
			}
		default:
			seen = nil
		}
		if pause(ctx, 50*time.Millisecond) != nil {
			k.Errorf("asked %s from %s it answers as %q, want %q (one alone: %v)", a.url, a.from, answers, want, a.one)
			return
		}
	}
}

// answers are the names of those that answered; "none" where nobody did.
func (k *kube) answers(ctx context.Context, a serviceAsk) []string {
	k.Helper()
	argv := []string{"bash", "-c", askByUDP, strings.TrimPrefix(a.url, "udp:")}
	if !strings.HasPrefix(a.url, "udp:") {
		argv = []string{"curl", "-s", "--connect-timeout", "1", "-m", "2", "-w", " %{exitcode};"}
		if !a.kept {
			argv = append(argv, "-H", "Connection: close")
		}
		if a.want != "none" && a.want != "refused" {
			a.url += fmt.Sprintf("?[1-%d]", askedAtOnce)
		}
		argv = append(argv, a.url)
	}
	var out string
	switch a.from {
	case "pod1", "pod2", "west": // curl's failure is an answer too
		cluster, pod := "east", "client"+strings.TrimPrefix(a.from, "pod")
		if a.from == "west" {
			cluster, pod = "west", "client1"
		}
		out, _ = k.try("", append([]string{"--context", cluster, "-n", servicesNamespace, "exec", pod, "--"}, argv...)...)
	default:
		at := Target{Cluster: "west"}
		if a.from != "outside" {
			at = Target{Cluster: "east", Node: a.from}
		}
		var b strings.Builder
		if _, err := k.bed.Exec(ctx, at, argv, Stdio{Out: &b}); err != nil && ctx.Err() == nil {
			k.Fatal(err)
		}
		out = b.String()
	}
	answers := strings.Split(strings.TrimSuffix(strings.TrimSpace(out), ";"), ";")
	for i, answer := range answers {
		switch answers[i] = strings.TrimSuffix(strings.TrimSpace(answer), " 0"); answers[i] {
		case "7": // curl's exit codes
			answers[i] = "refused"
		case "28", "":
			answers[i] = "none"
		}
		if _, endpoints, ok := strings.Cut(answer, `"localEndpoints":`); ok {
			answers[i] = "localEndpoints " + endpoints[:1]
		}
	}
	return answers
}

// hasEvent waits for an Event of a Service of east that begins so.
func (k *kube) hasEvent(service, begins string) {
	k.Helper()
	ctx, cancel := context.WithTimeout(k.Context(), 20*time.Second)
	defer cancel()
	for {
		got := k.services("east", "get", "events", "--field-selector", "involvedObject.kind=Service,involvedObject.name="+service, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`)
		for line := range strings.Lines(got) {
			if strings.HasPrefix(line, begins) {
				return
			}
		}
		if pause(ctx, 50*time.Millisecond) != nil {
			k.Errorf("the Service's Events are %q, want one that begins %q", got, begins)
			return
		}
	}
}
