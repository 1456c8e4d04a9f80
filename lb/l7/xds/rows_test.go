package xds

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"causeway/lb"
)

// rowsOf returns the rows of a port with so many backends in each cluster, given as "east east west!"; ! is a quarantined one.
func rowsOf(o lb.L7Options, backends string) Rows {
	rows := Rows{
		Self: "east", Routes: []lb.Route{{Port: shopPort, Number: 80, Options: o}},
		RTT: map[string]time.Duration{"west": 20 * time.Millisecond, "north": 5 * time.Millisecond},
	}
	for i, b := range strings.Fields(backends) {
		cluster, quarantined := strings.CutSuffix(b, "!")
		rows.Targets = append(rows.Targets, lb.Target{
			TargetKey: lb.TargetKey{Port: shopPort, Address: netip.AddrFrom4([4]byte{10, 1, 1, byte(i)}), Number: 8080},
			Cluster:   cluster, Quarantined: quarantined,
		})
	}
	return rows
}

func TestLocalities(t *testing.T) {
	weights := func(w ...lb.ClusterWeight) func(*lb.L7Options) { return func(o *lb.L7Options) { o.Weights = w } }
	affinity := func(a lb.Affinity) func(*lb.L7Options) { return func(o *lb.L7Options) { o.Affinity = a } }
	for _, test := range []struct {
		name     string
		options  func(*lb.L7Options)
		backends string
		want     string // priority, cluster, weight, its backends that are well of all
	}{
		{"each backend the same", affinity(lb.AffinityNone), "east east west", "0 east 2 2/2, 0 west 1 1/1"},
		{"quarantined ones count nothing", affinity(lb.AffinityNone), "east east! west", "0 east 1 1/2, 0 west 1 1/1"},
		{"better those than none", affinity(lb.AffinityNone), "east! west!", "0 east 1 1/1, 0 west 1 1/1"},
		{"local", affinity(lb.AffinityLocal), "west east north", "0 east 1 1/1, 1 north 1 1/1, 1 west 1 1/1"},
		{"local, without any", affinity(lb.AffinityLocal), "west north", "0 north 1 1/1, 0 west 1 1/1"},
		{"remote", affinity(lb.AffinityRemote), "west east", "0 west 1 1/1, 1 east 1 1/1"},
		{"nearest", affinity(lb.AffinityNearest), "south west east north", "0 east 1 1/1, 1 north 1 1/1, 2 west 1 1/1, 3 south 1 1/1"},
		{"failover", func(o *lb.L7Options) { o.Failover = []string{"west", "gone", "east"} }, "north east west", "0 west 1 1/1, 1 east 1 1/1, 2 north 1 1/1"},
		{"weights", weights(lb.ClusterWeight{Cluster: "east", Weight: 90}, lb.ClusterWeight{Cluster: "north"}, lb.ClusterWeight{Cluster: "west", Weight: 10}),
			"east west west north south", "0 east 90 1/1, 0 west 10 2/2, 1 north 1 1/1, 1 south 1 1/1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := lb.DefaultL7Options()
			test.options(&o)
			assignment := Resources(rowsOf(o, test.backends))[resource.EndpointType][shopPort.String()].(*endpoint.ClusterLoadAssignment)
			var got []string
			for _, l := range assignment.GetEndpoints() {
				well := 0
				for _, e := range l.GetLbEndpoints() {
					if e.GetHealthStatus() == core.HealthStatus_HEALTHY {
						well++
					}
				}
				got = append(got, fmt.Sprintf("%d %s %d %d/%d", l.GetPriority(), l.GetLocality().GetZone(), l.GetLoadBalancingWeight().GetValue(), well, len(l.GetLbEndpoints())))
			}
			if strings.Join(got, ", ") != test.want {
				t.Errorf("got  %s\nwant %s", strings.Join(got, ", "), test.want)
			}
		})
	}
}

// TestResourcesAreValid holds all that is made to Envoy's own rules.
func TestResourcesAreValid(t *testing.T) {
	for _, change := range []func(*lb.L7Options){
		func(*lb.L7Options) {},
		func(o *lb.L7Options) {
			o.Algorithm, o.Health = lb.LeastRequest, lb.HealthCheck{Kind: lb.HealthHTTP, Path: "/", Interval: 1e9, Timeout: 1e9}
		},
		func(o *lb.L7Options) {
			o.Algorithm, o.Health = lb.Random, lb.HealthCheck{Kind: lb.HealthGRPC, Interval: 1e9, Timeout: 1e9}
		},
		func(o *lb.L7Options) {
			o.Algorithm, o.HashHeader, o.Health = lb.Hashed, "x-user", lb.HealthCheck{Kind: lb.HealthTCP, Interval: 1e9, Timeout: 1e9}
		},
		func(o *lb.L7Options) { o.Algorithm, o.HashCookie, o.Timeout, o.TryTimeout = lb.Hashed, "sid", 2e9, 1e9 },
		func(o *lb.L7Options) { o.Retries, o.RetryBudget, o.OutlierFailures, o.MaxPending = 0, 0, 0, 0 },
	} {
		o := lb.DefaultL7Options()
		change(&o)
		for kind, byName := range Resources(rowsOf(o, "east west!")) {
			if len(byName) == 0 {
				t.Errorf("nothing of %s", kind)
			}
			for name, r := range byName {
				if err := r.(interface{ ValidateAll() error }).ValidateAll(); err != nil {
					t.Errorf("%s %s: %v", kind, name, err)
				}
			}
		}
	}
}

func TestWhatIsNoHTTPHasNoResources(t *testing.T) {
	rows := rowsOf(lb.DefaultL7Options(), "east")
	rows.Routes[0].App = lb.AppTCP
	for kind, byName := range Resources(rows) {
		if len(byName) != 0 {
			t.Errorf("%s: %v", kind, byName)
		}
	}
}
