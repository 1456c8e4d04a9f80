package balance

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"causeway/lb"
	"causeway/lb/l7/state"
)

var web = lb.PortKey{Service: lb.Name{Namespace: "shop", Name: "web"}, Port: "http", Protocol: lb.TCP, Family: lb.IPv4}

// bench is a table with one port, and a clock.
type bench struct {
	*Table
	at      time.Time
	options lb.L7Options
}

func newBench(change func(*lb.L7Options)) *bench {
	b := &bench{Table: NewTable(), at: time.Unix(1_800_000_000, 0), options: lb.DefaultL7Options()}
	b.now = func() time.Time { return b.at }
	if change != nil {
		change(&b.options)
	}
	b.Apply([]state.Update{{Reset: true}, {Self: &state.Self{Cluster: "east", Node: "node1"}}, {Route: &lb.Route{Port: web, Number: 80, Options: b.options}}})
	return b
}

func target(cluster string, n int) *lb.Target {
	id := map[string]byte{"east": 1, "west": 2, "north": 3}[cluster]
	return &lb.Target{
		TargetKey: lb.TargetKey{Port: web, Address: netip.AddrFrom4([4]byte{10, id, byte(n >> 8), byte(n)}), Number: 8080},
		Cluster:   cluster, ClusterID: id, Node: fmt.Sprintf("node%d", n), Local: cluster == "east",
	}
}

// fill gives clusters n backends each, and ends the state.
func (b *bench) fill(n int, clusters ...string) *bench {
	var updates []state.Update
	for _, c := range clusters {
		for i := range n {
			updates = append(updates, state.Update{Target: target(c, i+1)})
		}
	}
	b.Apply(append(updates, state.Update{Synced: true}))
	return b
}

func (b *bench) port() *Port { return b.Ports()[0] }

// quarantine puts the first n backends of a cluster out of service, and the others into it.
func (b *bench) quarantine(cluster string, n, of int) {
	var updates []state.Update
	for i := range of {
		x := target(cluster, i+1)
		x.Quarantined = i < n
		updates = append(updates, state.Update{Target: x})
	}
	b.Apply(updates)
}

func (b *bench) pass(d time.Duration) {
	b.at = b.at.Add(d)
	b.Tick(b.at)
}

func (b *bench) picks(t *testing.T, n int) (byCluster map[string]int, byEndpoint map[string]int) {
	t.Helper()
	byCluster, byEndpoint = map[string]int{}, map[string]int{}
	for range n {
		e, err := b.port().Pick(&Query{})
		if err != nil {
			t.Fatal(err)
		}
		byCluster[e.Target().Cluster]++
		byEndpoint[e.Address().String()]++
	}
	return byCluster, byEndpoint
}

func within(got, want int, percentOf, of int) bool {
	return math.Abs(float64(got-want)) <= float64(percentOf)/100*float64(of)
}

func TestRoundRobinIsEven(t *testing.T) {
	b := newBench(nil).fill(3, "east", "west")
	_, by := b.picks(t, 6000)
	if len(by) != 6 {
		t.Errorf("%v", by)
	}
	for a, n := range by {
		if n != 1000 {
			t.Errorf("%s got %d of 6000", a, n)
		}
	}
}

func TestAlgorithmsSpread(t *testing.T) {
	for _, a := range []lb.L7Algorithm{lb.RoundRobin, lb.Random, lb.LeastRequest} {
		b := newBench(func(o *lb.L7Options) { o.Algorithm = a }).fill(3, "east", "west")
		_, by := b.picks(t, 60_000)
		for address, n := range by {
			if !within(n, 10_000, 1, 60_000) {
				t.Errorf("%s: %s got %d of 60000", a, address, n)
			}
		}
	}
}

func TestLeastRequestAvoidsTheBusy(t *testing.T) {
	b := newBench(func(o *lb.L7Options) { o.Algorithm = lb.LeastRequest }).fill(2, "east")
	busy := b.port().Endpoints()[0]
	for range 100 {
		busy.Begin()
	}
	_, by := b.picks(t, 10_000)
	if n := by[busy.Address().String()]; n > 3000 { // It is taken only when both choices are it.
		t.Errorf("the busy one got %d of 10000", n)
	}
}

func TestWeights(t *testing.T) {
	weights := func(o *lb.L7Options) {
		o.Weights = []lb.ClusterWeight{{Cluster: "east", Weight: 90}, {Cluster: "west", Weight: 10}}
	}
	b := newBench(weights).fill(3, "east", "west", "north")
	by, each := b.picks(t, 10_000)
	if !within(by["east"], 9000, 1, 10_000) || !within(by["west"], 1000, 1, 10_000) || by["north"] != 0 {
		t.Errorf("%v", by)
	}
	for a, n := range each {
		if want := map[byte]int{1: 3000, 2: 333}[netip.MustParseAddrPort(a).Addr().As4()[1]]; !within(n, want, 1, 10_000) {
			t.Errorf("%s got %d, want %d", a, n, want)
		}
	}
	b.quarantine("east", 3, 3)
	if by, _ := b.picks(t, 1000); by["west"] != 1000 {
		t.Errorf("without east: %v", by)
	}
	b.quarantine("west", 3, 3)
	if by, _ := b.picks(t, 1000); by["north"] != 1000 {
		t.Errorf("with nobody who has a weight: %v", by)
	}
	b.quarantine("east", 0, 3)
	if by, _ := b.picks(t, 1000); by["east"] != 1000 {
		t.Errorf("with east back: %v", by)
	}
}

func TestLevels(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*lb.L7Options)
		order  []string
	}{
		{"local", func(o *lb.L7Options) { o.Affinity = lb.AffinityLocal }, []string{"east"}},
		{"failover", func(o *lb.L7Options) { o.Failover = []string{"north", "east", "west"} }, []string{"north", "east", "west"}},
		{"nearest", func(o *lb.L7Options) { o.Affinity = lb.AffinityNearest }, []string{"east", "north", "west"}},
	} {
		b := newBench(test.change).fill(10, "east", "west", "north")
		b.Apply([]state.Update{
			{Cluster: &state.Cluster{Name: "east", RTT: time.Millisecond}}, {Cluster: &state.Cluster{Name: "north", RTT: 20 * time.Millisecond}},
			{Cluster: &state.Cluster{Name: "west", RTT: 50 * time.Millisecond}},
		})
		for i, c := range test.order {
			if by, _ := b.picks(t, 1000); by[c] != 1000 {
				t.Errorf("%s: %s should get all: %v", test.name, c, by)
			}
			b.quarantine(c, 5, 10) // 5 of 10 take 70 %
			if by, _ := b.picks(t, 1000); i+1 < len(test.order) && (!within(by[c], 700, 1, 1000) || !within(by[test.order[i+1]], 300, 1, 1000)) {
				t.Errorf("%s: with half of %s: %v", test.name, c, by)
			}
			b.quarantine(c, 10, 10)
		}
		b.quarantine(test.order[0], 2, 10) // 8 of 10 are trusted with all
		if by, _ := b.picks(t, 1000); by[test.order[0]] != 1000 {
			t.Errorf("%s: back again: %v", test.name, by)
		}
	}
	b := newBench(func(o *lb.L7Options) { o.Affinity = lb.AffinityRemote }).fill(3, "east", "west", "north")
	if by, _ := b.picks(t, 900); by["east"] != 0 || by["west"] != 450 || by["north"] != 450 {
		t.Errorf("remote: %v", by)
	}
}

func TestNearestDoesNotFlip(t *testing.T) {
	b := newBench(func(o *lb.L7Options) { o.Affinity = lb.AffinityNearest }).fill(1, "west", "north")
	trip := func(c string, ms int) {
		b.Apply([]state.Update{{Cluster: &state.Cluster{Name: c, RTT: time.Duration(ms) * time.Millisecond}}})
	}
	trip("west", 20)
	trip("north", 22)
	for _, step := range []struct {
		north int
		want  string
	}{{19, "west"}, {17, "west"}, {15, "north"}, {19, "north"}, {24, "north"}, {30, "west"}} {
		trip("north", step.north)
		if by, _ := b.picks(t, 10); by[step.want] != 10 {
			t.Errorf("west 20 ms, north %d: %v, want %s", step.north, by, step.want)
		}
	}
}

func TestAllQuarantinedIsNone(t *testing.T) {
	b := newBench(nil).fill(2, "east", "west")
	b.quarantine("east", 2, 2)
	b.quarantine("west", 2, 2)
	if _, by := b.picks(t, 400); len(by) != 4 {
		t.Errorf("%v", by)
	}
}

func TestTried(t *testing.T) {
	for _, a := range []lb.L7Algorithm{lb.RoundRobin, lb.Random, lb.LeastRequest, lb.Hashed} {
		b := newBench(func(o *lb.L7Options) { o.Algorithm = a }).fill(3, "east")
		b.quarantine("east", 1, 3)
		q := Query{Hash: 77, Hashed: a == lb.Hashed}
		for i := range 3 {
			e, err := b.port().Pick(&q)
			if err != nil || slices.Contains(q.Tried, e) {
				t.Fatalf("%s, try %d: %v, %v", a, i, e, err)
			}
			if quarantined := e.Target().Quarantined; quarantined != (i == 2) {
				t.Errorf("%s: the quarantined one is the %dth choice", a, i+1)
			}
			q.Tried = append(q.Tried, e)
		}
		if _, err := b.port().Pick(&q); err != ErrNoBackend {
			t.Errorf("%s: after all: %v", a, err)
		}
	}
}

func TestMaglevMovesLittle(t *testing.T) {
	const n, keys = 10, 20_000
	b := newBench(func(o *lb.L7Options) { o.Algorithm, o.HashHeader = lb.Hashed, "x-user" }).fill(n, "east")
	place := func(b *bench) (list []netip.AddrPort) {
		for i := range keys {
			e, err := b.port().Pick(&Query{Hash: Hash(fmt.Append(nil, "user", i)), Hashed: true})
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, e.Address())
		}
		return list
	}
	before := place(b)
	if other := place(newBench(func(o *lb.L7Options) { o.Algorithm, o.HashHeader = lb.Hashed, "x-user" }).fill(n, "east")); !slices.Equal(before, other) {
		t.Error("another node has another table")
	}
	gone := b.port().Endpoints()[3].Address()
	b.Apply([]state.Update{{TargetGone: &target("east", 4).TargetKey}})
	moved, of := 0, map[netip.AddrPort]int{}
	for i, a := range place(b) {
		if a == gone {
			t.Fatal("the removed one is chosen")
		}
		if before[i] != gone && a != before[i] {
			moved++
		}
		of[before[i]]++
	}
	if moved > keys*3/100 {
		t.Errorf("%d of %d keys moved although their backend is there", moved, keys)
	}
	for a, k := range of {
		if !within(k, keys/n, 2, keys) {
			t.Errorf("%s had %d of %d keys", a, k, keys)
		}
	}
}

func TestEjection(t *testing.T) {
	b := newBench(func(o *lb.L7Options) { o.OutlierFailures, o.EjectFor, o.MaxEjected = 3, 10*time.Second, 50 }).fill(4, "east")
	list := b.port().Endpoints()
	fail := func(e *Endpoint, n int) {
		for range n {
			e.Begin()
			e.End(Failure)
		}
	}
	fail(list[0], 2)
	list[0].Begin()
	list[0].End(Success)
	fail(list[0], 2)
	if list[0].Health().Ejected {
		t.Error("ejected, though it has answered in between")
	}
	fail(list[0], 1)
	if _, by := b.picks(t, 300); by[list[0].Address().String()] != 0 || !list[0].Health().Ejected {
		t.Errorf("not ejected: %v", by)
	}
	fail(list[1], 3)
	fail(list[2], 3)
	if list[2].Health().Ejected || !list[1].Health().Ejected {
		t.Error("more than half are ejected")
	}
	b.pass(9 * time.Second)
	if !list[0].Health().Ejected {
		t.Error("back too early")
	}
	b.pass(2 * time.Second)
	if _, by := b.picks(t, 400); by[list[0].Address().String()] == 0 {
		t.Errorf("not back: %v", by)
	}
	fail(list[0], 3)
	b.pass(15 * time.Second)
	if !list[0].Health().Ejected {
		t.Error("the second ejection is not longer")
	}
	b.pass(6 * time.Second)
	if list[0].Health().Ejected || list[0].Health().Ejections != 2 {
		t.Errorf("%+v", list[0].Health())
	}
	fail(list[0], 3)
	b.Apply([]state.Update{{TargetGone: &list[0].Target().TargetKey}})
	fail(list[1], 3) // The removed one's place is free.
	if !list[1].Health().Ejected {
		t.Error("a removed endpoint counts as ejected for ever")
	}
}

func TestOneBackendIsNeverEjected(t *testing.T) {
	b := newBench(nil).fill(1, "east")
	for range 50 {
		b.port().Endpoints()[0].Begin()
		b.port().Endpoints()[0].End(Failure)
	}
	if b.port().Endpoints()[0].Health().Ejected {
		t.Error("the only one is ejected")
	}
}

func TestActiveHealth(t *testing.T) {
	b := newBench(nil).fill(3, "east")
	e := b.port().Endpoints()[1]
	e.SetHealthy(false, "GET /healthz: 503")
	if _, by := b.picks(t, 300); by[e.Address().String()] != 0 {
		t.Errorf("%v", by)
	}
	if h := e.Health(); !h.Unhealthy || h.Reason == "" {
		t.Errorf("%+v", h)
	}
	e.SetHealthy(true, "")
	if _, by := b.picks(t, 300); by[e.Address().String()] != 100 {
		t.Errorf("%v", by)
	}
}

func TestSlowStart(t *testing.T) {
	b := newBench(func(o *lb.L7Options) { o.SlowStart = 10 * time.Second }).fill(3, "east")
	if _, by := b.picks(t, 300); len(by) != 3 {
		t.Errorf("those of the first state are not new: %v", by)
	}
	b.Apply([]state.Update{{Target: target("east", 4)}})
	fresh := b.port().Endpoints()[3].Address().String()
	last := 0
	for _, step := range []struct{ seconds, want int }{{0, 10}, {5, 50}, {5, 100}} {
		b.pass(time.Duration(step.seconds) * time.Second)
		_, by := b.picks(t, 20_000)
		old := (20_000 - by[fresh]) / 3
		if got := 100 * by[fresh] / old; math.Abs(float64(got-step.want)) > 3 || by[fresh] <= last {
			t.Errorf("after %d s more it gets %d %% of another's", step.seconds, got)
		}
		last = by[fresh]
	}
}

func TestRetryBudget(t *testing.T) {
	b := newBench(func(o *lb.L7Options) { o.Retries, o.RetryBudget = 2, 20 }).fill(1, "east")
	p := b.port()
	taken := func() (n int) {
		for p.Retry(1) {
			n++
		}
		return n
	}
	if n := taken(); n != leastRetries {
		t.Errorf("%d retries of a new port", n)
	}
	for range 1000 {
		p.Arrived()
	}
	if n := taken(); n != 200 {
		t.Errorf("%d retries of 1000 requests", n)
	}
	b.pass(time.Second)
	if n := taken(); n != leastRetries {
		t.Errorf("%d retries in a second without requests", n)
	}
	b.pass(time.Second)
	if p.Retry(3) {
		t.Error("a third retry, with two allowed")
	}
}

func TestWholeStatesReplace(t *testing.T) {
	b := newBench(nil).fill(2, "east", "west")
	port, kept := b.port(), b.port().Endpoints()[0]
	gone := b.port().Endpoints()[3]
	front := netip.MustParseAddrPort("100.64.0.1:80")
	frontend := &lb.Frontend{FrontendKey: lb.FrontendKey{Address: front.Addr(), Port: 80, Protocol: lb.TCP}, Target: web, L7: true}
	b.Apply([]state.Update{{Frontend: frontend}})
	b.Apply([]state.Update{{Reset: true}, {Self: &state.Self{Cluster: "east"}}, {Route: port.Route()}, {Target: target("east", 1)}, {Target: target("east", 2)}})
	if len(port.Endpoints()) != 4 {
		t.Error("something is gone before the state is complete")
	}
	if p, ok := b.Frontend(front); !ok || p != port {
		t.Error("the frontend is gone before the state is complete")
	}
	b.Apply([]state.Update{{Synced: true}})
	if len(port.Endpoints()) != 2 || port.Endpoints()[0] != kept || b.port() != port {
		t.Errorf("%v", port.Endpoints())
	}
	select {
	case <-gone.Removed():
	default:
		t.Error("what is no more is not removed")
	}
	if _, ok := b.Frontend(front); ok {
		t.Error("the frontend is still there")
	}
	b.Apply([]state.Update{{RouteGone: &web}})
	select {
	case <-port.Gone():
	default:
		t.Error("the port is not gone")
	}
	if _, err := port.Pick(&Query{}); err != nil {
		t.Errorf("requests on a port that has gone: %v", err)
	}
	b.Apply([]state.Update{{Route: port.Route()}})
	if again := b.port(); again == port || len(again.Endpoints()) != 2 {
		t.Errorf("the same port again: %v", again.Endpoints())
	}
}

// TestNobodyUnwellIsPreferred: whatever is quarantined, sick or ejected, requests go to those who are well if there are any, and shares are what was asked for.
func TestNobodyUnwellIsPreferred(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		clusters := []string{"east", "west", "north"}
		b := newBench(func(o *lb.L7Options) {
			o.Algorithm = rapid.SampledFrom([]lb.L7Algorithm{lb.RoundRobin, lb.LeastRequest, lb.Random, lb.Hashed}).Draw(t, "algorithm")
			switch rapid.IntRange(0, 4).Draw(t, "clusters") {
			case 0:
				o.Affinity = lb.AffinityLocal
			case 1:
				o.Affinity = lb.AffinityNearest
			case 2:
				o.Failover = []string{"west", "east"}
			case 3:
				o.Weights = []lb.ClusterWeight{{Cluster: "east", Weight: rapid.IntRange(0, 3).Draw(t, "w")}, {Cluster: "west", Weight: 1}}
			}
		})
		well := map[string]bool{}
		var updates []state.Update
		for _, c := range clusters {
			for i := range rapid.IntRange(0, 4).Draw(t, c) {
				x := target(c, i+1)
				x.Quarantined = rapid.Bool().Draw(t, "quarantined")
				updates = append(updates, state.Update{Target: x})
			}
		}
		b.Apply(append(updates, state.Update{Synced: true}))
		for _, e := range b.port().Endpoints() {
			if rapid.IntRange(0, 3).Draw(t, "sick") == 0 {
				e.SetHealthy(false, "sick")
			}
			if e.healthy() {
				well[e.Address().String()] = true
			}
		}
		for range 50 {
			e, err := b.port().Pick(&Query{Hash: rapid.Uint64().Draw(t, "hash"), Hashed: true})
			if len(updates) == 0 {
				if err != ErrNoBackend {
					t.Fatalf("%v, %v", e, err)
				}
				return
			}
			if err != nil || len(well) > 0 && !well[e.Address().String()] {
				t.Fatalf("%v, %v; well are %v", e, err, slices.Collect(maps.Keys(well)))
			}
		}
	})
}

func TestConcurrently(t *testing.T) {
	b := newBench(func(o *lb.L7Options) { o.OutlierFailures = 2 }).fill(5, "east", "west")
	port := b.port()
	var tasks sync.WaitGroup
	for w := range 4 {
		tasks.Go(func() {
			for i := range 2000 {
				e, err := port.Pick(&Query{})
				if err != nil {
					t.Error(err)
					return
				}
				e.Begin()
				port.Arrived()
				port.Retry(1)
				e.End(Outcome((i + w) % 3))
				if i%100 == 0 {
					e.SetHealthy(i%200 == 0, "sick")
				}
			}
		})
	}
	for i := range 200 {
		x := target("west", i%5+1)
		if i%3 == 0 {
			b.Apply([]state.Update{{TargetGone: &x.TargetKey}})
		} else {
			b.Apply([]state.Update{{Target: x}})
		}
		b.Tick(b.at.Add(time.Duration(i) * time.Second))
	}
	tasks.Wait()
	for _, e := range port.Endpoints() {
		if e.InFlight() != 0 {
			t.Errorf("%s has %d in flight", e.Address(), e.InFlight())
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for _, a := range []lb.L7Algorithm{lb.RoundRobin, lb.LeastRequest, lb.Random, lb.Hashed} {
		for _, n := range []int{3, 300} {
			b.Run(fmt.Sprintf("%s/%d", a, n), func(b *testing.B) {
				port := newBench(func(o *lb.L7Options) { o.Algorithm = a }).fill(n, "east", "west").port()
				b.ReportAllocs()
				var q Query
				q.Hashed = a == lb.Hashed
				for b.Loop() {
					q.Hash++
					if _, err := port.Pick(&q); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkApply is one backend's change, quarantine set or lifted, in a service of n.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			t := newBench(nil).fill(n/2, "east", "west")
			for i := 0; b.Loop(); i++ {
				x := target("east", 1)
				x.Quarantined = i%2 == 0
				t.Apply([]state.Update{{Target: x}})
			}
		})
	}
}
