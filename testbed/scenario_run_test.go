package testbed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"causeway/agent/api"
	"causeway/identity"
)

// fakeWorld is two clusters of two nodes whose agents learn of a dead node after a while. It can be told to fail.
type fakeWorld struct {
	mu      sync.Mutex
	notice  time.Duration // how long a death takes to be known
	killed  map[identity.NodeName]time.Time
	servers map[string]server
	// flicker takes a backend out of the kernel once, at this look at it.
	flicker, looked int
	deaf            string // an agent that does not answer
	startTakes      time.Duration
	startFails      error
	result          *LoadResult
	done            []string
}

func newFakeWorld() *fakeWorld {
	w := &fakeWorld{notice: time.Second, killed: map[identity.NodeName]time.Time{}, servers: map[string]server{}, result: &LoadResult{Requests: 10}}
	for i, n := range w.nodes() {
		_ = w.runServer(context.Background(), n, "shop-"+n.Node)
		s := w.servers[n.Cluster+"/shop-"+n.Node]
		s.address = netip.AddrPortFrom(nodePodCIDRs(identity.ClusterID(i/2+1), i%2+1)[0].Addr().Next(), backendPort)
		w.servers[s.name] = s
	}
	w.done = nil
	return w
}

func (w *fakeWorld) nodes() (nodes []identity.NodeName) {
	for _, c := range []string{"east", "west"} {
		nodes = append(nodes, identity.NodeName{Cluster: c, Node: "node1"}, identity.NodeName{Cluster: c, Node: "node2"})
	}
	return nodes
}

func (w *fakeWorld) did(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = append(w.done, fmt.Sprintf(format, args...))
}

func (w *fakeWorld) kill(_ context.Context, v Victim) (time.Time, error) {
	w.did("kill %v", v)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.killed[identity.NodeName{Cluster: v.Cluster, Node: v.Node}] = time.Now()
	return time.Now(), nil
}

func (w *fakeWorld) start(ctx context.Context, v Victim, begun func(time.Time)) error {
	w.mu.Lock()
	delete(w.killed, identity.NodeName{Cluster: v.Cluster, Node: v.Node})
	w.mu.Unlock()
	begun(time.Now())
	err := errors.Join(pause(ctx, w.startTakes), w.startFails)
	w.did("start %v", v)
	return err
}

func (w *fakeWorld) partition(_ context.Context, p Partition) error { w.did("%v", p); return nil }
func (w *fakeWorld) lose(_ context.Context, percent float64) error {
	w.did("lose %g", percent)
	return nil
}
func (w *fakeWorld) mtu(_ context.Context, p PathMTU) error { w.did("%v", p); return nil }
func (w *fakeWorld) clock(_ context.Context, place string, offset time.Duration) error {
	w.did("clock %s %v", place, offset)
	return nil
}
func (w *fakeWorld) heal(context.Context) error { w.did("heal"); return nil }
func (w *fakeWorld) flap(ctx context.Context, n identity.NodeName, o FlapOptions) error {
	w.did("flap %v %v", n, o)
	return pause(ctx, o.Duration)
}

func (w *fakeWorld) runServer(_ context.Context, n identity.NodeName, name string) error {
	w.did("run %v %s", n, name)
	w.mu.Lock()
	defer w.mu.Unlock()
	at := netip.AddrPortFrom(addr(fmt.Sprintf("10.9.9.%d", len(w.servers)+1)), backendPort)
	w.servers[n.Cluster+"/"+name] = server{name: n.Cluster + "/" + name, node: n, address: at, runs: true}
	return nil
}

func (w *fakeWorld) deleteServer(_ context.Context, name string) error {
	w.did("delete %s", name)
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.servers, name)
	return nil
}

func (w *fakeWorld) traffic(_ context.Context, cluster string, rate float64) (func() (*LoadResult, error), error) {
	w.did("traffic %s %g", cluster, rate)
	return func() (*LoadResult, error) { w.did("end %s", cluster); return w.result, nil }, nil
}

func (w *fakeWorld) look(_ context.Context, what looks) *sight {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &sight{at: time.Now(), kernels: map[identity.NodeName][]frontend{}, views: map[identity.NodeName]*api.Members{}}
	f := frontend{address: addr("100.64.64.1"), known: true}
	m := &api.Members{Enabled: true, Transitions: []api.Transition{{At: s.at, Subject: "west", From: "unknown", To: "reachable"}}}
	for _, n := range w.nodes() {
		state := identity.NodeAlive
		if at, dead := w.killed[n]; dead && time.Since(at) >= w.notice {
			state = identity.NodeDead
			m.Transitions = append(m.Transitions, api.Transition{At: at.Add(w.notice), Subject: n.String(), From: "alive", To: "dead"})
		}
		m.Nodes = append(m.Nodes, api.NodeLiveness{Liveness: identity.Liveness{Cluster: n.Cluster, Node: n.Node, State: state, Reason: "no answer", Quarantined: state == identity.NodeDead}})
	}
	for _, server := range w.servers {
		_, dead := w.killed[server.node]
		server.runs = !dead
		s.servers = append(s.servers, server)
		if at := w.killed[server.node]; at.IsZero() || time.Since(at) < w.notice {
			f.backends = append(f.backends, server.address)
		}
	}
	if w.looked++; what&lookKernels != 0 && w.looked == w.flicker {
		f.backends = f.backends[1:]
	}
	for _, n := range w.nodes() {
		if _, dead := w.killed[n]; dead {
			continue
		}
		s.kernels[n] = []frontend{f}
		if n.String() == w.deaf {
			s.silent = append(s.silent, n.String()+": no agent")
			continue
		}
		s.views[n] = m
	}
	return s
}

// play runs steps in a fake world, in fake time.
func play(t *testing.T, w *fakeWorld, steps string) (events []ScenarioEvent, took time.Duration, err error) {
	t.Helper()
	s := mustParse(t, steps, false)
	began := time.Now()
	err = s.run(t.Context(), w, func(e ScenarioEvent) {
		if e.Done {
			events = append(events, e)
		}
	})
	return events, time.Since(began), err
}

func TestScenarioRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newFakeWorld()
		w.startTakes = 3 * time.Second
		events, took, err := play(t, w, `traffic 50/s from every cluster
from here on: every backend of east in every kernel; no transitions but of west/node2 in any view
4 backends in every kernel
kill node west/node2
within 2s: node west/node2 is dead in every view; every node is alive or dead in every view
within 2s: no backend of west/node2 in any kernel
for 500ms: 3 backends in every kernel; exactly the running servers in every kernel
start node west/node2
within 1s: server west/shop-node2 in every kernel
partition east from west
up to here
heal
stop traffic
no request failed
`)
		if err != nil {
			t.Fatal(err)
		}
		// The start was waited for before the partition, but not before its own expectation.
		if took < 4500*time.Millisecond || took > 4700*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		i := slices.IndexFunc(events, func(e ScenarioEvent) bool { return e.Line == 8 })
		if len(events) != 15 || i < 0 || !strings.HasPrefix(events[i].Detail, "after 1.0") {
			t.Errorf("%d events %+v", len(events), events)
		}
		want := []string{"traffic east 50", "traffic west 50", "kill node west/node2", "start node west/node2", "east <-> west loses 100 %", "heal"}
		if got := w.done[:6]; !slices.Equal(got, want) {
			t.Errorf("done: %q", got)
		}
	})
}

func TestScenarioFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newFakeWorld()
		events, _, err := play(t, w, "mtu east west/node1 1400\nclock east +5m\nclock west/node2 -1h\nclock east 0\nheal\n")
		if err != nil || len(events) < 5 {
			t.Fatalf("%v, %+v", err, events)
		}
		want := []string{"east <-> west/node1 loses packets over 1400 bytes", "clock east 5m0s", "clock west/node2 -1h0m0s", "clock east 0s", "heal"}
		if !slices.Equal(w.done, want) {
			t.Errorf("done: %q", w.done)
		}
	})
	for _, st := range mustParse(t, "mtu east west 1400\nclock east +5m\n", false).steps {
		if !st.action.fault {
			t.Errorf("%q: requests may not fail by it", st.text)
		}
	}
}

// Each kind of expectation fails with its line, what was expected and what there was.
func TestScenarioFails(t *testing.T) {
	failures := &LoadResult{Requests: 10, Failed: 1, Errors: map[string]int{"timeout": 1}, Servers: map[string]int{"west/shop-node1": 9}}
	for _, tc := range []struct {
		name, steps string
		world       func(*fakeWorld)
		want        string
	}{
		{"within", "kill node west/node2\nwithin 900ms: no backend of west/node2 in any kernel", nil,
			`x.txt:5: expected "within 900ms: no backend of west/node2 in any kernel", but after 900ms the kernel of east/node1 has west/shop-node2, at 100.64.64.1`},
		{"within, the view", "kill node west/node2\nwithin 900ms: node west/node2 is dead in every view", nil,
			"but after 900ms east/node1 has west/node2 as alive (no answer)"},
		{"within, the second of two", "kill node west/node2\nwithin 2s: node west/node2 is dead in every view\nwithin 900ms: 3 backends in every kernel", nil,
			"x.txt:6: expected"},
		{"within, an agent is silent", "kill node west/node2\nwithin 2s: node west/node2 is dead in every view", func(w *fakeWorld) { w.deaf = "east/node2" },
			"does not answer: east/node2: no agent"},
		{"for", "kill node west/node2\nfor 2s: 4 backends in every kernel", nil,
			"x.txt:5: expected"},
		{"for, the difference", "for 2s: 5 backends in every kernel", nil, "the kernel of east/node1 has 4 backends, at 100.64.64.1"},
		{"from here on", "from here on: every backend in every kernel\nkill node west/node2\nwait 5s", nil,
			`x.txt:4: expected "from here on: every backend in every kernel", but 1.00 s later the kernel of east/node1 lacks west/shop-node2`},
		{"from here on, of views", "from here on: no transitions in any view\nkill node west/node2\nwait 5s", nil,
			"tells that west/node2 went from alive to dead 1s after that"},
		{"from here on, quarantine", "from here on: nothing is quarantined in any view\nkill node west/node2\nwait 5s", nil,
			"has west/node2 quarantined as dead (no answer)"},
		{"nobody ever answers", "kill node west/node1\nkill node west/node2\nkill node east/node1\nfor 1s: every node is alive in every view", func(w *fakeWorld) { w.deaf = "east/node2" },
			"no agent has ever told its view"},
		{"now", "3 backends in every kernel", nil, "x.txt:4: expected"},
		{"a start fails", "kill node west/node2\nstart node west/node2\nwait 1s", func(w *fakeWorld) { w.startFails = errors.New("no luck") },
			"x.txt:5: start node west/node2: no luck"},
		{"requests", "traffic 5/s from east\nstop traffic\nno request failed", func(w *fakeWorld) { w.result = failures },
			"1 of 10 from east failed: timeout 1"},
		{"who answered", "traffic 5/s from east\nstop traffic\nserver west/shop-node2 answered requests from east", func(w *fakeWorld) { w.result = failures },
			"9 requests were answered by west/shop-node1 9"},
		{"no traffic", "stop traffic", nil, "there is no traffic to stop"},
		{"traffic twice", "traffic 5/s from east\ntraffic 5/s from every cluster", nil, "there is traffic from east already"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newFakeWorld()
				if tc.world != nil {
					tc.world(w)
				}
				_, _, err := play(t, w, tc.steps)
				var failed *StepError
				if !errors.As(err, &failed) || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got  %v\nwant %s", err, tc.want)
				}
			})
		})
	}
}

// A map that is read while it is written may lack an entry in one look; that is no withdrawal.
func TestOneLookIsNoProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newFakeWorld()
		w.flicker = 3
		if _, _, err := play(t, w, "for 1s: 4 backends in every kernel"); err != nil || w.looked < 100 {
			t.Errorf("%v in %d looks", err, w.looked)
		}
	})
}

// An agent that is being started says nothing of others.
func TestSilenceIsNoNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newFakeWorld()
		w.deaf = "east/node2"
		if _, _, err := play(t, w, "from here on: every node is alive in every view\nwait 1s"); err != nil {
			t.Error(err)
		}
	})
}

func TestChurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newFakeWorld()
		_, _, err := play(t, w, "churn servers in west every 100ms\nwait 250ms\nstop churn\n4 backends in every kernel")
		if err != nil || strings.Join(w.done, ", ") != "run west/node1 churn-1, delete west/churn-1, run west/node1 churn-2, delete west/churn-2, run west/node1 churn-3, delete west/churn-3" {
			t.Errorf("%v, done: %q", err, w.done)
		}
	})
}

// Whatever a scenario has begun is ended with it, also when it is interrupted.
func TestScenarioIsInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newFakeWorld()
		s := mustParse(t, "traffic 5/s from east\nfrom here on: all is well\nchurn servers in west every 1h\nflap west/node1 down 1s up 1s for 1h\n", false)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := s.run(ctx, w, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if !slices.Contains(w.done, "end east") || !slices.Contains(w.done, "delete west/churn-1") {
			t.Errorf("done: %q", w.done)
		}
	})
}

func TestFailuresAreExcusedByFaults(t *testing.T) {
	began := time.Now()
	s := &sight{faults: []interval{{began.Add(10 * time.Second), began.Add(12 * time.Second)}}}
	for sent, want := range map[time.Duration]bool{
		9 * time.Second: false, 9900 * time.Millisecond: true, 11 * time.Second: true, 13900 * time.Millisecond: true, 14100 * time.Millisecond: false,
	} {
		if s.excused(began.Add(sent), 2*time.Second) != want {
			t.Errorf("sent after %v: not %v", sent, want)
		}
	}
	c, err := parsePhrase(conditions, strings.Fields("requests failed only within 2s after a fault"), &Setup{})
	if err != nil {
		t.Fatal(err)
	}
	s.traffic = map[string]*LoadResult{"east": {Requests: 1, Failed: 1, Failures: []LoadFailure{{Sent: began.Add(15 * time.Second), Error: "timeout"}}}}
	if p := c.problem(s); !strings.Contains(p, "one from east failed (timeout)") || !strings.Contains(p, "3s after a fault") {
		t.Errorf("%q", p)
	}
}
