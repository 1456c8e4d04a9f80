package lb

import (
	"fmt"
	"strings"
	"testing"
)

func annotated(more ...string) func(*Service) {
	return func(s *Service) {
		s.Annotations = l7(more...)
		if affinity, ok := s.Annotations[AnnotationAffinity]; ok {
			s.Affinity = Affinity(affinity)
		}
	}
}

func TestRoutes(t *testing.T) {
	three := ports(ServicePort{Name: "web", Protocol: TCP, Port: 80, TargetPort: 8080}, ServicePort{Name: "rpc", Protocol: TCP, Port: 90, TargetPort: 9090, AppProtocol: "grpc"},
		ServicePort{Name: "dns", Protocol: UDP, Port: 53, TargetPort: 53})
	both := ip("100.64.1.10", "fd00:1::a")
	for _, test := range []struct {
		name string
		view ServiceView
		want string // port, number, protocol, retries
	}{
		{"not asked for", inEast(declared(1)), ""},
		{"asked for", inEast(declared(1, annotated())), "web/shop:http/TCP 80 '' 2"},
		{"not global", inEast(declared(1, annotated(), private)), "web/shop:http/TCP 80 '' 2"},
		{"switched off", inEast(declared(1, annotated(AnnotationL7, "disabled", AnnotationL7Retries, "3"))), ""},
		{"the own cluster governs", inEast(declared(1), declared(2, annotated())), ""},
		{"the own cluster governs its options", inEast(declared(2, annotated(AnnotationL7Retries, "5")), declared(1, annotated(AnnotationL7Retries, "3"))), "web/shop:http/TCP 80 '' 3"},
		{"without an own one, the lowest ID", inEast(declared(3, annotated(AnnotationL7Retries, "3")), declared(2, annotated(AnnotationL7Retries, "5"))), "web/shop:http/TCP 80 '' 5"},
		{"without an own one, the lowest ID, which doesn't ask", inEast(declared(3, annotated()), declared(2)), ""},
		{"a remote one that is not global has no say", inEast(declared(3, annotated()), declared(2, private)), "web/shop:http/TCP 80 '' 2"},
		{"several ports, both families", inEast(declared(1, annotated(), three, both)),
			"web/shop:rpc/TCP 90 'h2c' 2, web/shop:rpc/TCP/IPv6 90 'h2c' 2, web/shop:web/TCP 80 '' 2, web/shop:web/TCP/IPv6 80 '' 2"},
		{"a port that another cluster has", inEast(declared(1, annotated()), declared(2, three)),
			"web/shop:http/TCP 80 '' 2, web/shop:rpc/TCP 90 'h2c' 2, web/shop:web/TCP 80 '' 2"},
		{"clients stay on their node", inEast(declared(1, annotated(), func(s *Service) { s.InternalLocal = true })), "web/shop:http/TCP/node-local 80 '' 2"},
		{"headless", inEast(declared(1, annotated(), func(s *Service) { s.Headless, s.ClusterIPs = true, nil })), ""},
		{"does not parse", inEast(declared(2, annotated(AnnotationL7Retries, "lots"))), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			routed := map[PortKey]bool{}
			for _, r := range Routes(test.view) {
				got = append(got, fmt.Sprintf("%s %d '%s' %d", r.Port, r.Number, r.App, r.Options.Retries))
				routed[r.Port] = true
			}
			if strings.Join(got, ", ") != test.want {
				t.Errorf("got  %s\nwant %s", strings.Join(got, ", "), test.want)
			}
			frontends, _ := Frontends(test.view, nil)
			for _, f := range frontends {
				if f.L7 != routed[f.Target] {
					t.Errorf("frontend %+v, but routes are of %v", f, routed)
				}
			}
		})
	}
}

func TestNearestIsNoneAtL4(t *testing.T) {
	view := inEast(declared(1, annotated(AnnotationAffinity, "nearest")))
	frontends, _ := Frontends(view, nil)
	if routes := Routes(view); len(frontends) != 1 || frontends[0].Affinity != AffinityNone || routes[0].Options.Affinity != AffinityNearest {
		t.Errorf("frontends %+v, routes %+v", frontends, routes)
	}
}

func TestAnnotationsThatDoNotParseAreAProblem(t *testing.T) {
	view := inEast(declared(2, annotated(AnnotationL7Retries, "lots")))
	if _, on, problem := view.L7(); on || problem == nil || problem.Cluster != "west" || !strings.Contains(problem.Reason, `has the value "lots"`) {
		t.Errorf("problem is %+v", problem)
	}
	if frontends, _ := Frontends(view, nil); len(frontends) != 1 || frontends[0].L7 {
		t.Errorf("frontends %+v, want it at L4", frontends)
	}
}

func TestTwoPortsOfOneNumber(t *testing.T) {
	view := inEast(declared(1, annotated()), declared(2, ports(ServicePort{Name: "web", Protocol: TCP, Port: 80, TargetPort: 8080}), ip("100.64.1.10")))
	if routes := Routes(view); len(routes) != 1 || routes[0].Port.Port != "http" {
		t.Errorf("routes %+v, want those that a frontend leads to", routes)
	}
}

func TestProblems(t *testing.T) {
	sticky := func(s *Service) { s.SessionAffinity = 60 }
	udp := ports(ServicePort{Name: "dns", Protocol: UDP, Port: 53, TargetPort: 53})
	for _, test := range []struct {
		name string
		view ServiceView
		want string // cluster, and what it asks for in vain
	}{
		{"nothing", inEast(declared(1)), ""},
		{"L7", inEast(declared(1, annotated())), ""},
		{"clients stay with their backend", inEast(declared(1, sticky)), ""},
		{"both", inEast(declared(1, sticky, annotated()), declared(2)), "east session affinity"},
		{"both, of UDP alone", inEast(declared(1, sticky, annotated(), udp)), ""},
		{"both, L7 switched off", inEast(declared(1, sticky, annotated(AnnotationL7, "disabled"))), ""},
		{"both, only there", inEast(declared(2, sticky, annotated())), "west session affinity"},
		{"one here, one there", inEast(declared(1, annotated()), declared(2, sticky)), ""},
		{"does not parse", inEast(declared(1, sticky, annotated(AnnotationL7Retries, "lots"))), "east L7"},
	} {
		var got []string
		for _, p := range test.view.Problems() {
			if got = append(got, p.Cluster+" "+p.What); p.Reason == "" {
				t.Errorf("%s: no reason", test.name)
			}
		}
		if strings.Join(got, ", ") != test.want {
			t.Errorf("%s: %v, want %s", test.name, got, test.want)
		}
	}
}
