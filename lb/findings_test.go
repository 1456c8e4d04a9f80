package lb

import (
	"slices"
	"strings"
	"testing"
)

func TestNoHealthyBackend(t *testing.T) {
	target := func(cluster string, change ...func(*Target)) Target {
		tt := Target{Cluster: cluster}
		for _, f := range change {
			f(&tt)
		}
		return tt
	}
	terminating, down := func(t *Target) { t.Terminating = true }, func(t *Target) { t.Quarantined = true }
	for _, test := range []struct {
		name    string
		view    ServiceView
		targets []Target
		want    string
	}{
		{"one is well", inEast(declared(1), declared(2)), []Target{target("east", down), target("west")}, ""},
		{"there is none", inEast(declared(1), declared(2)), nil, "none of the clusters east, west has a healthy backend"},
		{"terminating, and down", inEast(declared(2), declared(1)), []Target{target("east", terminating), target("west", down)}, "none of the clusters east, west has"},
		{"the other does not share", inEast(declared(1), declared(2, unshared)), nil, "cluster east has no healthy backend, and no other cluster shares any"},
		{"not global", inEast(declared(1, private), declared(2)), nil, ""},
		{"not declared here", inEast(declared(2)), nil, ""},
		{"nothing to connect to", inEast(declared(1, ports())), nil, ""},
	} {
		if got := NoHealthyBackend(test.view, slices.Values(test.targets)); (got == "") != (test.want == "") || !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

func TestConflicts(t *testing.T) {
	port := func(name string, number uint16, protocol Protocol) ServicePort {
		return ServicePort{Name: name, Protocol: protocol, Port: number}
	}
	sticky := func(s *Service) { s.SessionAffinity, s.Affinity = 60, AffinityRemote }
	nodePort := func(s *Service) { s.Ports = []ServicePort{port("http", 80, TCP)}; s.Ports[0].NodePort = 30080 }
	for _, test := range []struct {
		name string
		view ServiceView
		want []string // parts of each
	}{
		{"all say the same", inEast(declared(1), declared(2), declared(3)), nil},
		{"what each may say for itself", inEast(declared(1, sticky), declared(2, nodePort, unshared)), nil},
		{"one has a port more", inEast(declared(1), declared(2, ports(port("http", 80, TCP), port("admin", 81, TCP)))), nil},
		{"another number", inEast(declared(1), declared(2, ports(port("http", 8000, TCP)))), []string{"port http is 80/TCP in cluster east and 8000/TCP in cluster west"}},
		{"another protocol", inEast(declared(2, ports(port("http", 80, UDP))), declared(1)), []string{"80/TCP in cluster east and 80/UDP in cluster west, so neither has the other's backends"}},
		{"without a name", inEast(declared(1, ports(port("", 80, TCP))), declared(2, ports(port("", 8080, TCP)))), []string{"the port without a name is 80/TCP in cluster east and 8080/TCP in cluster west, so neither"}},
		{"one number for two ports", inEast(declared(1), declared(2, ports(port("web", 80, TCP)))), []string{
			"port web has no frontend: 100.64.1.10:80/TCP leads to port http of the same service already, as cluster east declares it",
			"port http has no frontend: 100.64.2.10:80/TCP leads to port web",
		}},
		{"the other is not global", inEast(declared(1), declared(2, private, ports(port("http", 8000, TCP)))), nil},
		{"nor the own", inEast(declared(1, private), declared(2, ports(port("http", 8000, TCP)))), nil},
		{"not declared here", inEast(declared(3), declared(2, ports(port("http", 8000, TCP)))), nil},
	} {
		got := Conflicts(test.view)
		if len(got) != len(test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
			continue
		}
		for i, want := range test.want {
			if !strings.Contains(got[i], want) {
				t.Errorf("%s: %q, want %q", test.name, got[i], want)
			}
		}
	}
}
