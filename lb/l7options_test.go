package lb

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// l7 returns the annotations of a service that is balanced at L7, and more, given by key and value in turn.
func l7(more ...string) map[string]string {
	annotations := map[string]string{AnnotationGlobal: "true", AnnotationL7: "enabled"}
	for i := 0; i < len(more); i += 2 {
		annotations[more[i]] = more[i+1]
	}
	return annotations
}

func TestL7AnnotationsSay(t *testing.T) {
	for _, test := range []struct {
		annotations map[string]string
		want        func(*L7Options) // what differs from the default
	}{
		{l7(), func(*L7Options) {}},
		{l7(AnnotationL7Algorithm, "least_request"), func(o *L7Options) { o.Algorithm = LeastRequest }},
		{l7(AnnotationL7Algorithm, "random"), func(o *L7Options) { o.Algorithm = Random }},
		{l7(AnnotationAffinity, "nearest"), func(o *L7Options) { o.Affinity = AffinityNearest }},
		{l7(AnnotationAffinity, "local"), func(o *L7Options) { o.Affinity = AffinityLocal }},
		{l7(AnnotationL7Hash, "header:X-User"), func(o *L7Options) { o.Algorithm, o.HashHeader = Hashed, "x-user" }},
		{l7(AnnotationL7Hash, "cookie:SID"), func(o *L7Options) { o.Algorithm, o.HashCookie = Hashed, "SID" }},
		{l7(AnnotationClusters, "west=10, east=90"), func(o *L7Options) { o.Weights = []ClusterWeight{{"east", 90}, {"west", 10}} }},
		{l7(AnnotationClusters, "east=0,west=1000000"), func(o *L7Options) { o.Weights = []ClusterWeight{{"east", 0}, {"west", 1000000}} }},
		{l7(AnnotationFailover, "west,east, north", AnnotationAffinity, "none"), func(o *L7Options) { o.Failover = []string{"west", "east", "north"} }},
		{l7(AnnotationL7Health, "http:/healthz?full=1"), func(o *L7Options) {
			o.Health = HealthCheck{Kind: HealthHTTP, Path: "/healthz?full=1", Interval: 2 * time.Second, Timeout: time.Second}
		}},
		{l7(AnnotationL7Health, "grpc", AnnotationL7HealthInterval, "500ms"), func(o *L7Options) {
			o.Health = HealthCheck{Kind: HealthGRPC, Interval: 500 * time.Millisecond, Timeout: 500 * time.Millisecond}
		}},
		{l7(AnnotationL7Health, "grpc:shop.v1.Shop", AnnotationL7HealthTimeout, "3s"), func(o *L7Options) {
			o.Health = HealthCheck{Kind: HealthGRPC, Service: "shop.v1.Shop", Interval: 3 * time.Second, Timeout: 3 * time.Second}
		}},
		{l7(AnnotationL7Health, "tcp", AnnotationL7HealthInterval, "1m", AnnotationL7HealthTimeout, "2s"), func(o *L7Options) {
			o.Health = HealthCheck{Kind: HealthTCP, Interval: time.Minute, Timeout: 2 * time.Second}
		}},
		{l7(AnnotationL7Retries, "0", AnnotationL7RetryBudget, "100%"), func(o *L7Options) { o.Retries, o.RetryBudget = 0, 100 }},
		{l7(AnnotationL7TryTimeout, "1s", AnnotationL7Timeout, "1m30s"), func(o *L7Options) { o.TryTimeout, o.Timeout = time.Second, 90*time.Second }},
		{l7(AnnotationL7TryTimeout, "1s", AnnotationL7Timeout, "0s"), func(o *L7Options) { o.TryTimeout = time.Second }},
		{l7(AnnotationL7MaxConnections, "1", AnnotationL7MaxPending, "0"), func(o *L7Options) { o.MaxConnections, o.MaxPending = 1, 0 }},
		{l7(AnnotationL7OutlierFailures, "0"), func(o *L7Options) { o.OutlierFailures = 0 }},
		{l7(AnnotationL7EjectFor, "1m", AnnotationL7MaxEjected, "0%"), func(o *L7Options) { o.EjectFor, o.MaxEjected = time.Minute, 0 }},
		{l7(AnnotationL7SlowStart, "30s"), func(o *L7Options) { o.SlowStart = 30 * time.Second }},
	} {
		want := DefaultL7Options()
		test.want(&want)
		got, err := ParseAnnotations(test.annotations)
		if err != nil || !got.L7 || !reflect.DeepEqual(got.Route, want) {
			t.Errorf("%v:\ngot  %+v, %v\nwant %+v", test.annotations, got, err, want)
		}
	}
}

func TestL7AnnotationsAreRefused(t *testing.T) {
	for _, test := range []struct {
		key, value, want string
		more             []string
	}{
		{AnnotationL7Algorithm, "leastrequest", "allowed are round_robin, least_request, random", nil},
		{AnnotationL7Hash, "x-user", "header:NAME or cookie:NAME", nil},
		{AnnotationL7Hash, "header:", "header:NAME", nil},
		{AnnotationL7Hash, "header::path", "header:NAME", nil},
		{AnnotationL7Hash, "cookie:a b", "header:NAME", nil},
		{AnnotationL7Hash, "header:x-user", "contradict each other", []string{AnnotationL7Algorithm, "random"}},
		{AnnotationClusters, "", "CLUSTER=WEIGHT", nil},
		{AnnotationClusters, "east", "CLUSTER=WEIGHT", nil},
		{AnnotationClusters, "east=90,", "CLUSTER=WEIGHT", nil},
		{AnnotationClusters, "east=-1,west=1", "CLUSTER=WEIGHT", nil},
		{AnnotationClusters, "east=0,west=0", "not all 0", nil},
		{AnnotationClusters, "east=1000001", "0 to 1000000", nil},
		{AnnotationClusters, "east=1,east=2", "different clusters", nil},
		{AnnotationClusters, "East=1", "CLUSTER=WEIGHT", nil},
		{AnnotationClusters, "east=1", "contradict each other", []string{AnnotationFailover, "east"}},
		{AnnotationClusters, "east=1", "contradict each other", []string{AnnotationAffinity, "nearest"}},
		{AnnotationFailover, "east", "contradict each other", []string{AnnotationAffinity, "local"}},
		{AnnotationFailover, "east,west,east", "different clusters", nil},
		{AnnotationFailover, "east west", "in order", nil},
		{AnnotationFailover, strings.Repeat("a,", 300), "1 to 255", nil},
		{AnnotationL7Health, "http", "http:/PATH", nil},
		{AnnotationL7Health, "http:healthz", "http:/PATH", nil},
		{AnnotationL7Health, "http:/a b", "http:/PATH", nil},
		{AnnotationL7Health, "http:/a\r\nx: y", "http:/PATH", nil},
		{AnnotationL7Health, "grpc:", "grpc:SERVICE", nil},
		{AnnotationL7Health, "tcp:80", "or tcp", nil},
		{AnnotationL7HealthInterval, "2s", "no effect without causeway.io/l7-health;", nil},
		{AnnotationL7HealthInterval, "1ms", "from 100ms to 5m0s", []string{AnnotationL7Health, "tcp"}},
		{AnnotationL7HealthTimeout, "2", "such as 500ms", []string{AnnotationL7Health, "tcp"}},
		{AnnotationL7HealthTimeout, "5s", "must end before the next", []string{AnnotationL7Health, "tcp", AnnotationL7HealthInterval, "1s"}},
		{AnnotationL7Retries, "11", "from 0 to 10", nil},
		{AnnotationL7Retries, "+1", "from 0 to 10", nil},
		{AnnotationL7RetryBudget, "20", "from 0% to 100%", nil},
		{AnnotationL7RetryBudget, "101%", "from 0% to 100%", nil},
		{AnnotationL7TryTimeout, "-1s", "0s for none", nil},
		{AnnotationL7TryTimeout, "3s", "is longer than causeway.io/l7-timeout", []string{AnnotationL7Timeout, "2s"}},
		{AnnotationL7Timeout, "25h", "to 24h0m0s", nil},
		{AnnotationL7MaxConnections, "0", "from 1 to 1000000", nil},
		{AnnotationL7MaxPending, "many", "from 0 to 1000000", nil},
		{AnnotationL7OutlierFailures, "1001", "from 0 to 1000", nil},
		{AnnotationL7EjectFor, "0s", "from 100ms", nil},
		{AnnotationL7MaxEjected, "50", "from 0% to 100%", nil},
		{AnnotationL7SlowStart, "2h", "to 1h0m0s", nil},
		{"causeway.io/l7-retry", "2", "not known; known of causeway.io/ are clusters, failover, l7-eject-for, ", nil},
	} {
		annotations := l7(append(test.more, test.key, test.value)...)
		_, err := ParseAnnotations(annotations)
		if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), test.key) {
			t.Errorf("%s: %q: got %v, want … %s …", test.key, test.value, err, test.want)
		}
	}
}

func TestL7AnnotationsWithoutEffectAreRefused(t *testing.T) {
	for _, key := range slices.Sorted(maps.Keys(l7Annotations)) {
		values := map[string]string{AnnotationClusters: "east=1", AnnotationFailover: "east", AnnotationL7Hash: "cookie:sid", AnnotationL7Health: "tcp",
			AnnotationL7RetryBudget: "1%", AnnotationL7MaxEjected: "1%", AnnotationL7Retries: "1", AnnotationL7MaxConnections: "1", AnnotationL7MaxPending: "1", AnnotationL7OutlierFailures: "1"}
		value := values[key]
		if value == "" {
			value = "1s"
		}
		annotations := map[string]string{key: value}
		if _, err := ParseAnnotations(annotations); err == nil || !strings.Contains(err.Error(), "has no effect without service.cilium.io/lb-l7: enabled") {
			t.Errorf("%s without lb-l7: %v", key, err)
		}
		annotations[AnnotationL7] = "disabled"
		if strings.HasPrefix(key, AnnotationL7Health) {
			annotations[AnnotationL7Health] = "tcp"
		}
		if got, err := ParseAnnotations(annotations); err != nil || got.L7 || !reflect.DeepEqual(got.Route, L7Options{}) {
			t.Errorf("%s, switched off for a while: %+v, %v", key, got, err)
		}
	}
}

// FuzzParseAnnotations holds that whatever is accepted is within its bounds, and means the same when it is read again.
func FuzzParseAnnotations(f *testing.F) {
	f.Add("east=90,west=10", "header:x-user", "http:/healthz", "2s", "20%")
	f.Add("", "cookie:sid", "grpc:shop.v1.Shop", "1m30s", "3")
	f.Fuzz(func(t *testing.T, clusters, hash, health, duration, number string) {
		for key := range l7Annotations {
			for _, value := range []string{clusters, hash, health, duration, number} {
				o, err := ParseAnnotations(l7(key, value))
				if err != nil {
					if !strings.Contains(err.Error(), key) {
						t.Errorf("%s: %q: the error does not name it: %v", key, value, err)
					}
					continue
				}
				if again, err := ParseAnnotations(l7(key, value)); err != nil || !reflect.DeepEqual(o, again) {
					t.Errorf("%s: %q: %+v, then %+v, %v", key, value, o, again, err)
				}
				inBounds(t, o.Route)
			}
		}
	})
}

func inBounds(t *testing.T, o L7Options) {
	t.Helper()
	sum := 0
	for _, w := range o.Weights {
		sum += w.Weight
	}
	switch h := o.Health; {
	case o.Weights != nil && sum <= 0, len(o.Failover) > maxClusters,
		(o.Algorithm == Hashed) != (o.HashHeader+o.HashCookie != ""),
		strings.ContainsAny(o.HashHeader+o.HashCookie+h.Path+h.Service, " \r\n\x00"),
		(h.Kind == HealthNone) != (h.Interval == 0), h.Timeout > h.Interval,
		o.Retries < 0 || o.Retries > 10, o.RetryBudget > 100, o.MaxEjected > 100, o.MaxConnections < 1,
		o.TryTimeout < 0, o.Timeout < 0, o.SlowStart < 0, o.EjectFor <= 0:
		t.Errorf("accepted %+v", o)
	}
}
