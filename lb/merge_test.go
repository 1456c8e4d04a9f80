package lb

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// declared returns cluster id's declaration of web/shop, with cluster IP 100.64.ID.10, port http 80 → 8080.
func declared(id uint8, change ...func(*Service)) Service {
	s := Service{
		Cluster: []string{"", "east", "west", "north"}[id], ClusterID: id, Name: Name{"web", "shop"},
		Global: true, Shared: true, Affinity: AffinityNone,
		ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{100, 64, id, 10})},
		Ports:      []ServicePort{{Name: "http", Protocol: TCP, Port: 80, TargetPort: 8080}},
	}
	for _, f := range change {
		f(&s)
	}
	return s
}

func private(s *Service)   { s.Global, s.Shared = false, false }
func unshared(s *Service)  { s.Shared = false }
func preferOwn(s *Service) { s.Affinity = AffinityLocal }

func ports(p ...ServicePort) func(*Service) { return func(s *Service) { s.Ports = p } }

func ip(addresses ...string) func(*Service) {
	return func(s *Service) {
		s.ClusterIPs = nil
		for _, a := range addresses {
			s.ClusterIPs = append(s.ClusterIPs, netip.MustParseAddr(a))
		}
	}
}

// behind returns a backend of s with address 10.ID.1.5.
func behind(s Service) Backend {
	return Backend{
		Cluster: s.Cluster, ClusterID: s.ClusterID, Service: s.Name, Node: "node1", Slice: "node1",
		Address: netip.AddrFrom4([4]byte{10, s.ClusterID, 1, 5}), Ports: backendPorts(s.Ports),
	}
}

func inEast(declared ...Service) ServiceView {
	return ServiceView{
		Self: "east", SelfID: 1, Declared: declared,
		Node: "node1", NodeAddresses: []netip.Addr{netip.MustParseAddr("172.29.1.11"), netip.MustParseAddr("fd00:29::b")},
	}
}

func TestTargets(t *testing.T) {
	unnamed := ports(ServicePort{Name: "", Protocol: TCP, Port: 80, TargetPort: 8080})
	for _, test := range []struct {
		name string
		view ServiceView
		// the clusters of the backends, one in each that declares the service, that clients in east use
		want string
	}{
		{"global in both", inEast(declared(1), declared(2)), "10.1.1.5:8080 http, 10.2.1.5:8080 http"},
		{"only here, not global", inEast(declared(1, private)), "10.1.1.5:8080 http"},
		{"global here, not there", inEast(declared(1), declared(2, private)), "10.1.1.5:8080 http"},
		{"global there, not here", inEast(declared(1, private), declared(2)), "10.1.1.5:8080 http"},
		{"not shared there", inEast(declared(1), declared(2, unshared)), "10.1.1.5:8080 http"},
		{"not shared here", inEast(declared(1, unshared), declared(2)), "10.1.1.5:8080 http, 10.2.1.5:8080 http"},
		{"only there", inEast(declared(2)), "10.2.1.5:8080 http"},
		{"only there, not shared", inEast(declared(2, unshared)), ""},
		{"only there, not global", inEast(declared(2, private)), ""},
		{"in two others", inEast(declared(2), declared(3)), "10.2.1.5:8080 http, 10.3.1.5:8080 http"},
		{"affinity is not the targets' matter", inEast(declared(1, preferOwn), declared(2)), "10.1.1.5:8080 http, 10.2.1.5:8080 http"},
		{"each cluster's target port", inEast(declared(1), declared(2, ports(ServicePort{Name: "http", Protocol: TCP, Port: 8000, TargetPort: 9090}))), "10.1.1.5:8080 http, 10.2.1.5:9090 http"},
		{"a port that only one has", inEast(declared(1), declared(2, ports(ServicePort{Name: "http", Protocol: TCP, Port: 80, TargetPort: 8080}, ServicePort{Name: "metrics", Protocol: TCP, Port: 9090, TargetPort: 9091}))),
			"10.1.1.5:8080 http, 10.2.1.5:8080 http, 10.2.1.5:9091 metrics"},
		{"ports without names go by number", inEast(declared(1, unnamed), declared(2, unnamed)), "10.1.1.5:8080 80, 10.2.1.5:8080 80"},
		{"nobody declares it", inEast(), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			for _, s := range test.view.Declared {
				for _, target := range Targets(test.view, behind(s)) {
					if target.Cluster != s.Cluster || target.ClusterID != s.ClusterID || target.Node != "node1" || target.Local != (s.Cluster == "east") {
						t.Errorf("target of %s: %+v", s.Cluster, target)
					}
					got = append(got, fmt.Sprintf("%s:%d %s", target.Address, target.Number, target.Port.Port))
				}
			}
			if strings.Join(got, ", ") != test.want {
				t.Errorf("got  %s\nwant %s", strings.Join(got, ", "), test.want)
			}
		})
	}
}

func TestTargetsWantTheOwnersDeclaration(t *testing.T) {
	view := inEast(declared(1), declared(2))
	for name, change := range map[string]func(*Backend){
		"of a cluster without a declaration": func(b *Backend) { b.Cluster = "north" },
		"of another service":                 func(b *Backend) { b.Service.Name = "cart" },
		"on a port that isn't declared":      func(b *Backend) { b.Ports = []BackendPort{{"grpc", TCP, 8080}} },
		"with another protocol":              func(b *Backend) { b.Ports = []BackendPort{{"http", UDP, 8080}} },
	} {
		b := behind(declared(2))
		change(&b)
		if targets := Targets(view, b); len(targets) != 0 {
			t.Errorf("a backend %s adds %+v", name, targets)
		}
	}
}

func TestTargetsAreOfTheirAddressesFamily(t *testing.T) {
	service := declared(1, ip("100.64.1.10", "fd00:1::a"))
	for address, want := range map[string]string{"10.1.1.5": "web/shop:http/TCP", "fd00:10:1::5": "web/shop:http/TCP/IPv6"} {
		b := behind(service)
		b.Address = netip.MustParseAddr(address)
		targets := Targets(inEast(service), b)
		if len(targets) != 1 || targets[0].Port.String() != want || targets[0].Address != b.Address {
			t.Errorf("%s adds %+v, want a target of %s", address, targets, want)
		}
	}
}

func TestFrontends(t *testing.T) {
	metrics := ServicePort{Name: "metrics", Protocol: TCP, Port: 9090, TargetPort: 9091}
	guard := func(cluster string, a netip.Addr) string {
		if cluster == "east" {
			t.Error("the own cluster's address was asked about")
		}
		if netip.MustParsePrefix("10.0.0.0/8").Contains(a) {
			return "it is a pod's"
		}
		return ""
	}
	for _, test := range []struct {
		name    string
		view    ServiceView
		want    string // address:port/protocol > port's name @owner affinity
		refused string // the reasons
	}{
		{"not global", inEast(declared(1, private), declared(2)), "100.64.1.10:80/TCP > http @east none", ""},
		{"global in both", inEast(declared(2), declared(1)), "100.64.1.10:80/TCP > http @east none, 100.64.2.10:80/TCP > http @west none", ""},
		{"the caller's affinity", inEast(declared(1, preferOwn), declared(2)), "100.64.1.10:80/TCP > http @east local, 100.64.2.10:80/TCP > http @west local", ""},
		{"only there: no affinity", inEast(declared(2, preferOwn)), "100.64.2.10:80/TCP > http @west none", ""},
		{"only there, not global", inEast(declared(2, private)), "", ""},
		{"one cluster IP in both", inEast(declared(1), declared(2, ip("100.64.1.10"))), "100.64.1.10:80/TCP > http @east none", ""},
		{"one cluster IP in two others", inEast(declared(3, ip("100.64.2.10")), declared(2)), "100.64.2.10:80/TCP > http @west none", ""},
		{"each cluster's number", inEast(declared(1), declared(2, ports(ServicePort{Name: "http", Protocol: TCP, Port: 8000, TargetPort: 8080}))),
			"100.64.1.10:80/TCP > http @east none, 100.64.2.10:8000/TCP > http @west none", ""},
		{"a port that only one has", inEast(declared(1), declared(2, ports(ServicePort{Name: "http", Protocol: TCP, Port: 80, TargetPort: 8080}, metrics))),
			"100.64.1.10:80/TCP > http @east none, 100.64.1.10:9090/TCP > metrics @east none, " +
				"100.64.2.10:80/TCP > http @west none, 100.64.2.10:9090/TCP > metrics @west none", ""},
		{"a port that two others number differently", inEast(declared(1), declared(3, ports(ServicePort{Name: "metrics", Protocol: TCP, Port: 1, TargetPort: 9091})), declared(2, ports(metrics))),
			"100.64.1.10:80/TCP > http @east none, 100.64.1.10:9090/TCP > metrics @east none, " +
				"100.64.2.10:80/TCP > http @west none, 100.64.2.10:9090/TCP > metrics @west none, " +
				"100.64.3.10:1/TCP > metrics @north none, 100.64.3.10:80/TCP > http @north none", ""},
		{"one number, two meanings", inEast(declared(1), declared(2, ports(ServicePort{Name: "web", Protocol: TCP, Port: 80, TargetPort: 8080}))),
			"100.64.1.10:80/TCP > http @east none, 100.64.2.10:80/TCP > web @west none",
			"100.64.1.10:80/TCP leads to port http of the same service already, as cluster east declares it; " +
				"100.64.2.10:80/TCP leads to port web of the same service already, as cluster west declares it"},
		{"guarded there", inEast(declared(1), declared(2, ip("10.2.1.9"))), "100.64.1.10:80/TCP > http @east none", "cluster IP 10.2.1.9: it is a pod's"},
		{"guarded there, but declared here", inEast(declared(1, ip("10.2.1.9")), declared(2, ip("10.2.1.9"))), "10.2.1.9:80/TCP > http @east none", ""},
		{"the own cluster's is not guarded", inEast(declared(1, ip("10.2.1.9"))), "10.2.1.9:80/TCP > http @east none", ""},
		{"both families", inEast(declared(1, ip("100.64.1.10", "fd00:1::a"))),
			"100.64.1.10:80/TCP > http @east none, [fd00:1::a]:80/TCP > http/IPv6 @east none", ""},
		{"one family here, the other there", inEast(declared(1, ip("fd00:1::a")), declared(2)),
			"100.64.2.10:80/TCP > http @west none, [fd00:1::a]:80/TCP > http/IPv6 @east none", ""},
		{"TCP and UDP", inEast(declared(1, ports(ServicePort{Name: "dns", Protocol: UDP, Port: 53, TargetPort: 53}, ServicePort{Name: "dns-tcp", Protocol: TCP, Port: 53, TargetPort: 53}))),
			"100.64.1.10:53/TCP > dns-tcp @east none, 100.64.1.10:53/UDP > dns @east none", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			frontends, refusals := Frontends(test.view, guard)
			var got, refused []string
			for _, f := range frontends {
				port := f.Target.Port
				if f.Target.Family == IPv6 {
					port += "/IPv6"
				}
				if f.Target.Family != FamilyOf(f.Address) {
					t.Errorf("%s leads to %s", f.FrontendKey, f.Target)
				}
				got = append(got, fmt.Sprintf("%s > %s @%s %s", f.FrontendKey, port, f.Cluster, f.Affinity))
			}
			for _, r := range refusals {
				refused = append(refused, r.Reason)
			}
			slices.Sort(got)
			slices.Sort(refused)
			if strings.Join(got, ", ") != test.want {
				t.Errorf("got  %s\nwant %s", strings.Join(got, ", "), test.want)
			}
			if strings.Join(refused, "; ") != test.refused {
				t.Errorf("refused %s\nwant    %s", strings.Join(refused, "; "), test.refused)
			}
		})
	}
}

// TestFrontendsOfKubernetes: what a Service of Kubernetes may say beyond a cluster IP.
func TestFrontendsOfKubernetes(t *testing.T) {
	internalLocal := func(s *Service) { s.InternalLocal = true }
	externalLocal := func(s *Service) { s.ExternalLocal = true }
	nodePort := func(s *Service) { s.Ports[0].NodePort = 30080 }
	headless := func(s *Service) { s.Headless, s.ClusterIPs = true, nil }
	sticky := func(seconds uint32) func(*Service) { return func(s *Service) { s.SessionAffinity = seconds } }
	external := func(addresses ...string) func(*Service) {
		return func(s *Service) {
			for _, a := range addresses {
				s.ExternalIPs = append(s.ExternalIPs, netip.MustParseAddr(a))
			}
		}
	}
	guard := func(_ string, a netip.Addr) string {
		if a == netip.MustParseAddr("172.29.1.11") {
			return "it is the address of node east/node1"
		}
		return ""
	}
	for _, test := range []struct {
		name    string
		view    ServiceView
		want    string // address:port/protocol > what PortKey has after the service's name
		refused string // the reasons
	}{
		{"clients stay on their node", inEast(declared(1, internalLocal)), "100.64.1.10:80/TCP > http/TCP/node-local", ""},
		{"they do at every cluster's address", inEast(declared(1, internalLocal), declared(2)), "100.64.1.10:80/TCP > http/TCP/node-local, 100.64.2.10:80/TCP > http/TCP/node-local", ""},
		{"those of another cluster do", inEast(declared(1), declared(2, internalLocal)), "100.64.1.10:80/TCP > http/TCP, 100.64.2.10:80/TCP > http/TCP", ""},
		{"only there, where clients stay on their node", inEast(declared(2, internalLocal)), "100.64.2.10:80/TCP > http/TCP", ""},
		{"a node port", inEast(declared(1, nodePort)),
			"100.64.1.10:80/TCP > http/TCP, 172.29.1.11:30080/TCP > http/TCP, 172.29.1.11:30080/TCP/outside > http/TCP", ""},
		{"another cluster's node port", inEast(declared(1), declared(2, nodePort)), "100.64.1.10:80/TCP > http/TCP, 100.64.2.10:80/TCP > http/TCP", ""},
		{"a node port of a service that is only there", inEast(declared(2, nodePort)), "100.64.2.10:80/TCP > http/TCP", ""},
		{"a node port of IPv6", inEast(declared(1, ip("fd00:1::a"), nodePort)),
			"[fd00:1::a]:80/TCP > http/TCP/IPv6, [fd00:29::b]:30080/TCP > http/TCP/IPv6, [fd00:29::b]:30080/TCP/outside > http/TCP/IPv6", ""},
		{"a node port of both families", inEast(declared(1, ip("100.64.1.10", "fd00:1::a"), nodePort)),
			"100.64.1.10:80/TCP > http/TCP, 172.29.1.11:30080/TCP > http/TCP, 172.29.1.11:30080/TCP/outside > http/TCP, " +
				"[fd00:1::a]:80/TCP > http/TCP/IPv6, [fd00:29::b]:30080/TCP > http/TCP/IPv6, [fd00:29::b]:30080/TCP/outside > http/TCP/IPv6", ""},
		{"clients from outside stay on the node", inEast(declared(1, nodePort, external("192.0.2.7"), externalLocal)),
			"100.64.1.10:80/TCP > http/TCP, 172.29.1.11:30080/TCP > http/TCP, 172.29.1.11:30080/TCP/outside > http/TCP/node-local, " +
				"192.0.2.7:80/TCP > http/TCP, 192.0.2.7:80/TCP/outside > http/TCP/node-local", ""},
		{"clients inside stay on the node, at cluster IPs", inEast(declared(1, nodePort, internalLocal)),
			"100.64.1.10:80/TCP > http/TCP/node-local, 172.29.1.11:30080/TCP > http/TCP, 172.29.1.11:30080/TCP/outside > http/TCP", ""},
		{"external IPs of others", inEast(declared(1), declared(2, external("192.0.2.7"))), "100.64.1.10:80/TCP > http/TCP, 100.64.2.10:80/TCP > http/TCP", ""},
		{"an external IP of the wrong family", inEast(declared(1, external("2001:db8::7"))), "100.64.1.10:80/TCP > http/TCP",
			"external IP 2001:db8::7: the service has no IPv6 cluster IP, so it has no backends of that family; add the family to its ipFamilies; " +
				"external IP 2001:db8::7: the service has no IPv6 cluster IP, so it has no backends of that family; add the family to its ipFamilies"},
		{"an external IP that is the cluster IP", inEast(declared(1, external("100.64.1.10"))), "100.64.1.10:80/TCP > http/TCP, 100.64.1.10:80/TCP/outside > http/TCP", ""},
		{"headless", inEast(declared(1, headless)), "", ""},
		{"headless here, not there", inEast(declared(1, headless, external("192.0.2.7")), declared(2)), "100.64.2.10:80/TCP > http/TCP", ""},
		{"headless there, not here", inEast(declared(1), declared(2, headless)), "100.64.1.10:80/TCP > http/TCP", ""},
		{"headless without ports", inEast(declared(1, headless, ports())), "", ""},
		{"another cluster's address is the node's", inEast(declared(1, nodePort), declared(2, ip("172.29.1.11"), ports(ServicePort{Name: "http", Protocol: TCP, Port: 30080, TargetPort: 80}))),
			"100.64.1.10:80/TCP > http/TCP, 172.29.1.11:30080/TCP > http/TCP, 172.29.1.11:30080/TCP/outside > http/TCP", "cluster IP 172.29.1.11: it is the address of node east/node1"},
		{"balanced at L7, but at cluster IPs alone", inEast(declared(1, nodePort, external("192.0.2.7"), annotated())),
			"100.64.1.10:80/TCP > http/TCP L7, 172.29.1.11:30080/TCP > http/TCP, 172.29.1.11:30080/TCP/outside > http/TCP, 192.0.2.7:80/TCP > http/TCP, 192.0.2.7:80/TCP/outside > http/TCP", ""},
		{"balanced at L7 among the node's backends", inEast(declared(1, internalLocal, annotated())), "100.64.1.10:80/TCP > http/TCP/node-local L7", ""},
		{"clients stay with their backend", inEast(declared(1, sticky(60), nodePort), declared(2, sticky(90))),
			"100.64.1.10:80/TCP > http/TCP 60s, 100.64.2.10:80/TCP > http/TCP 60s, 172.29.1.11:30080/TCP > http/TCP 60s, 172.29.1.11:30080/TCP/outside > http/TCP 60s", ""},
		{"the own cluster says that they don't", inEast(declared(1), declared(2, sticky(90))), "100.64.1.10:80/TCP > http/TCP, 100.64.2.10:80/TCP > http/TCP", ""},
		{"only there: the lowest ID says it", inEast(declared(3, sticky(60)), declared(2, sticky(90))), "100.64.2.10:80/TCP > http/TCP 90s, 100.64.3.10:80/TCP > http/TCP 90s", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			frontends, refusals := Frontends(test.view, guard)
			var got, refused []string
			for _, f := range frontends {
				says := fmt.Sprintf("%s > %s", f.FrontendKey, strings.TrimPrefix(f.Target.String(), "web/shop:"))
				if f.SessionAffinity > 0 {
					says += fmt.Sprintf(" %ds", f.SessionAffinity)
				}
				if f.L7 {
					says += " L7"
				}
				got = append(got, says)
			}
			for _, r := range refusals {
				refused = append(refused, r.Reason)
			}
			slices.Sort(got)
			if strings.Join(got, ", ") != test.want {
				t.Errorf("got  %s\nwant %s", strings.Join(got, ", "), test.want)
			}
			if strings.Join(refused, "; ") != test.refused {
				t.Errorf("refused %s\nwant    %s", strings.Join(refused, "; "), test.refused)
			}
		})
	}
}

func TestTargetsOnTheNode(t *testing.T) {
	internal, external := func(s *Service) { s.InternalLocal = true }, func(s *Service) { s.ExternalLocal = true }
	for _, test := range []struct {
		name   string
		view   ServiceView
		change func(*Backend)
		want   int // targets: of the port, and of its node-local one
	}{
		{"no policy", inEast(declared(1)), func(*Backend) {}, 1},
		{"internal traffic stays", inEast(declared(1, internal)), func(*Backend) {}, 2},
		{"external traffic stays", inEast(declared(1, external)), func(*Backend) {}, 2},
		{"terminating", inEast(declared(1, external)), func(b *Backend) { b.Terminating = true }, 2},
		{"on another node", inEast(declared(1, internal)), func(b *Backend) { b.Node = "node2" }, 1},
		{"on no node", inEast(declared(1, internal)), func(b *Backend) { b.Node = "" }, 1},
		{"on another cluster's node of the same name", inEast(declared(1, internal), declared(2, internal)), func(b *Backend) { b.Cluster, b.ClusterID = "west", 2 }, 1},
		{"another cluster wants it", inEast(declared(1), declared(2, internal)), func(*Backend) {}, 1},
	} {
		b := behind(declared(1))
		test.change(&b)
		targets := Targets(test.view, b)
		if len(targets) != test.want || targets[0].Port.NodeLocal {
			t.Errorf("%s: targets are %+v", test.name, targets)
		}
		for i, target := range targets {
			want := Target{TargetKey: TargetKey{Port: targets[0].Port, Address: b.Address, Number: 8080}, Cluster: b.Cluster, ClusterID: b.ClusterID,
				Node: b.Node, Local: b.Cluster == "east", Terminating: b.Terminating}
			if want.Port.NodeLocal = i == 1; target != want {
				t.Errorf("%s: target %+v, want %+v", test.name, target, want)
			}
		}
	}
	nobodys := ServiceView{Self: "east", SelfID: 1, Declared: []Service{declared(1, internal)}}
	b := behind(declared(1))
	if b.Node = ""; len(Targets(nobodys, b)) != 1 {
		t.Error("a backend on no node is on the node of a view without one")
	}
}

func TestElect(t *testing.T) {
	claim := func(cluster string, id uint8, service string) Frontend {
		return Frontend{
			FrontendKey: FrontendKey{Address: netip.MustParseAddr("100.64.2.10"), Port: 80, Protocol: TCP},
			Target:      PortKey{Service: Name{"web", service}, Port: "http", Protocol: TCP, Family: IPv4}, Cluster: cluster, ClusterID: id,
		}
	}
	for _, test := range []struct {
		name   string
		claims []Frontend
		want   string
	}{
		{"alone", []Frontend{claim("west", 2, "shop")}, "west/shop"},
		{"the own cluster's first", []Frontend{claim("west", 2, "cart"), claim("east", 4, "shop")}, "east/shop"},
		{"then the lowest ID's", []Frontend{claim("north", 3, "cart"), claim("west", 2, "shop")}, "west/shop"},
		{"then by name", []Frontend{claim("west", 2, "shop"), claim("west", 2, "cart")}, "west/cart"},
	} {
		for range 2 { // in either order
			winner, refused := Elect("east", test.claims)
			if got := winner.Cluster + "/" + winner.Target.Service.Name; got != test.want {
				t.Errorf("%s: %s", test.name, got)
			}
			if len(refused) != len(test.claims)-1 {
				t.Errorf("%s: refused %+v", test.name, refused)
			}
			for _, r := range refused {
				if want := "100.64.2.10:80/TCP is taken by service " + winner.Target.Service.String() + " of cluster " + winner.Cluster; r.Reason != want {
					t.Errorf("reason %q, want %q", r.Reason, want)
				}
			}
			slices.Reverse(test.claims)
		}
	}
}
