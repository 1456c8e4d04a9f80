package gossip

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"causeway/identity"
)

// peersOf tells the nodes of a cluster who its peers are, and of the nodes of these.
func (m *mesh) peersOf(cluster string, peers ...string) {
	var rows []identity.Node
	for _, row := range m.rows() {
		if row.Cluster == cluster || slices.Contains(peers, row.Cluster) {
			rows = append(rows, row)
		}
	}
	for _, n := range m.nodes {
		if n.row.Cluster == cluster {
			n.SetPeers(peers)
			n.SetNodes(rows)
		}
	}
}

// startAlone starts clusters without peers, and waits until they would have opened the mesh's pool.
func (m *mesh) startAlone() {
	for cluster := range m.clusters() {
		m.peersOf(cluster)
	}
	for _, n := range m.nodes {
		n.run()
	}
	time.Sleep(3 * time.Second)
}

// reachable waits until all nodes of a cluster see another, and returns how long that took.
func (m *mesh) reachable(from, to string) time.Duration {
	m.Helper()
	began := time.Now()
	m.eventually(from+" reaches "+to, func() string {
		for name, n := range m.nodes {
			if r := n.reachOf(to); n.row.Cluster == from && (r.State != identity.Reachable || n.life(to+"/n1").State != identity.NodeAlive) {
				return fmt.Sprintf("%s finds it %q", name, r.State)
			}
		}
		return ""
	})
	return time.Since(began)
}

// left lists what a node still knows of a cluster.
func (n *node) left(cluster string) (left []string) {
	for _, p := range n.Overview().Pools {
		for _, member := range p.Members {
			if member.Node.Cluster == cluster {
				left = append(left, p.Name+" member "+member.Node.String())
			}
		}
	}
	o := n.Overview()
	for _, row := range o.Nodes {
		if row.Cluster == cluster {
			left = append(left, "node "+row.Node)
		}
	}
	for _, r := range o.Clusters {
		if r.Cluster == cluster {
			left = append(left, "reach")
		}
	}
	for _, p := range o.Problems {
		if strings.Contains(p, cluster) {
			left = append(left, p)
		}
	}
	if len(o.Speakers[cluster])+len(o.Blocked[cluster]) > 0 {
		left = append(left, "speakers")
	}
	n.Gossip.mu.Lock()
	defer n.Gossip.mu.Unlock()
	left = append(left, namesOf(cluster, "book", n.book)...)
	left = append(left, namesOf(cluster, "facts", n.facts)...)
	left = append(left, namesOf(cluster, "verdict", n.verdicts)...)
	left = append(left, namesOf(cluster, "private", n.private)...)
	left = append(left, namesOf(cluster, "complete", n.complete)...)
	left = append(left, namesOf(cluster, "target", n.detector.targets)...)
	for key, e := range n.ledger.entries {
		if e.Cluster == cluster {
			left = append(left, "ledger "+key)
		}
	}
	for key, d := range n.early {
		if d.Cluster == cluster {
			left = append(left, "early "+key)
		}
	}
	if n.detector.clusters[cluster] != nil {
		left = append(left, "watcher")
	}
	if n.own.Votes[cluster] != "" || n.own.RTTs[cluster] != 0 {
		left = append(left, "vote")
	}
	if p := n.pools[meshPool]; p != nil {
		for _, member := range p.list.Members() {
			if strings.HasPrefix(member.Name, cluster+"/") {
				left = append(left, "memberlist "+member.Name)
			}
		}
	}
	return left
}

func namesOf[V any](cluster, what string, m map[identity.NodeName]V) (names []string) {
	for name := range m {
		if name.Cluster == cluster {
			names = append(names, what+" "+name.Node)
		}
	}
	return names
}

// gone waits until nothing of a cluster is left with the nodes of another.
func (m *mesh) gone(from, cluster string) time.Duration {
	m.Helper()
	began := time.Now()
	m.eventually("nothing of "+cluster+" is left in "+from, func() string {
		for name, n := range m.nodes {
			if left := n.left(cluster); n.row.Cluster == from && len(left) > 0 {
				return fmt.Sprintf("%s has %v", name, left)
			}
			n.mu.Lock()
			told := len(n.reaches) > 0 && n.reaches[cluster].Cluster != "" || n.lives[cluster+"/n1"].Node != ""
			n.mu.Unlock()
			if n.row.Cluster == from && told {
				return name + " has not told of it"
			}
		}
		return ""
	})
	return time.Since(began)
}

// quiet fails if anybody ever found a node other than alive, or another cluster out of reach.
func (m *mesh) quiet() {
	m.Helper()
	for name, n := range m.nodes {
		n.mu.Lock()
		for of, ever := range n.ever {
			if slices.ContainsFunc(ever, func(s identity.LivenessState) bool { return s != identity.NodeAlive }) {
				m.Errorf("%s saw %s as %v", name, of, ever)
			}
		}
		n.mu.Unlock()
		for _, t := range n.Overview().Transitions {
			if t.To != string(identity.NodeAlive) && t.To != string(identity.Reachable) {
				m.Errorf("%s: %+v", name, t)
			}
		}
	}
}

// TestPeerComes: two clusters that run become peers, and see each other at once, whoever hears of it first.
func TestPeerComes(t *testing.T) {
	for _, nodes := range []int{1, 9} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) {
			inFakeTime(t, func(t *testing.T) {
				m := newMesh(t)
				for i := range nodes {
					m.add(fmt.Sprintf("east/n%d", i+1))
					m.add(fmt.Sprintf("west/n%d", i+1))
				}
				m.startAlone()
				for name, n := range m.nodes {
					if o := n.Overview(); len(o.Pools) != 1 || len(o.Clusters) != 1 || len(o.Nodes) != nodes {
						t.Errorf("%s: %d pools, %v, %d nodes", name, len(o.Pools), o.Clusters, len(o.Nodes))
					}
				}
				m.peersOf("east", "west")
				time.Sleep(700 * time.Millisecond)
				m.peersOf("west", "east")
				took := max(m.reachable("east", "west"), m.reachable("west", "east"))
				t.Logf("seen after %v", took)
				if took > 600*time.Millisecond {
					t.Errorf("it took %v", took)
				}
				m.quiet()
			})
		})
	}
}

// TestPeerGoes: nothing of it is left with the cluster that has left it, and nobody else notices.
func TestPeerGoes(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		m.peersOf("west", "north")
		for _, n := range m.nodes {
			if n.row.Cluster == "east" {
				n.SetPeers([]string{"north"}) // the store's nodes go later
			}
		}
		if took := max(m.gone("east", "west"), m.gone("west", "east")); took > 600*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		m.peersOf("east", "north")
		for range 300 {
			time.Sleep(100 * time.Millisecond)
			for name, n := range m.nodes {
				for from, to := range map[string]string{"east": "west", "west": "east"} {
					if left := n.left(to); n.row.Cluster == from && len(left) > 0 {
						t.Fatalf("%s has again %v", name, left)
					}
				}
				if r := n.reachOf("north"); n.row.Cluster != "north" && r.State != identity.Reachable {
					t.Fatalf("%s finds north %q", name, r.State)
				}
			}
		}
		for _, p := range m.nodes["north/n1"].Overview().Pools {
			if p.Name == meshPool && len(p.Members) != 9 {
				t.Errorf("north has %d members in the mesh's pool", len(p.Members))
			}
		}
		m.quiet()
	})
}

// TestPeerComesBack: it starts anew, with the same incarnations, and nothing grows.
func TestPeerComesBack(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		owner := m.nodes["west/n2"]
		key := "addresses/west/10.0.2.5"
		owner.owned[key] = true
		owner.Publish(Entry{Key: key, Version: identity.Version{Incarnation: owner.Incarnation, Sequence: 5}, Value: []byte(`{}`)})
		owner.Complete()
		round := func() {
			m.eventually("the entry", func() string {
				for name, n := range m.nodes {
					if _, ok := n.entry(key); n != owner && !ok {
						return name + " lacks it"
					}
				}
				return ""
			})
			m.peersOf("east", "north")
			m.peersOf("west", "north")
			m.gone("east", "west")
			m.gone("west", "east")
			for _, n := range m.nodes {
				n.mu.Lock()
				if n.row.Cluster == "east" {
					clear(n.entries)
				}
				n.mu.Unlock()
			}
			m.peersOf("east", "north", "west")
			m.peersOf("west", "north", "east")
			m.reachable("east", "west")
			m.reachable("west", "east")
		}
		var before string
		for i := range 50 {
			round()
			if i == 4 || i == 49 {
				time.Sleep(40 * time.Second)
				after := m.sizes()
				t.Log(after)
				if i == 49 && after != before {
					t.Errorf("after 5 rounds: %s\nafter 50: %s", before, after)
				}
				before = after
			}
		}
		m.quiet()
	})
}

// sizes is all that could grow.
func (m *mesh) sizes() string {
	var heap runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&heap)
	m.Logf("heap %d kB", heap.HeapAlloc>>10)
	out := fmt.Sprintf("%d goroutines", runtime.NumGoroutine())
	for _, name := range []string{"east/n1", "east/n2", "east/n3", "north/n1"} {
		n := m.nodes[name]
		n.Gossip.mu.Lock()
		askers, others := 0, 0
		for _, t := range n.detector.targets {
			askers, others = askers+len(t.askers), others+len(t.others)
		}
		out += fmt.Sprintf("; %s: %d pools, %d closing, ledger %d %d, targets bounded %v (%d, %d), clusters %d, book %d, facts %d, verdicts %d %d, early %d, rows %d %d, history %v, complete %d, own %d %d",
			name, len(n.pools), len(n.closing), len(n.ledger.entries), len(n.ledger.count), len(n.detector.targets) <= len(m.nodes), askers, others, len(n.detector.clusters), len(n.book), len(n.facts),
			len(n.verdicts), len(n.private), len(n.early), len(n.rows), len(n.reaches), len(n.history) <= maxTransitions, len(n.complete), len(n.own.Votes), len(n.own.Silent))
		n.Gossip.mu.Unlock()
	}
	return out
}

// TestBlockedPeer: all nodes of a cluster know that UDP does not pass to another, while TCP does.
func TestBlockedPeer(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := newMesh(t)
		for _, name := range []string{"east/n1", "east/n2", "east/n3", "east/n4", "west/n1"} {
			m.add(name)
		}
		m.start()
		blocked := func(share float64, want int) {
			t.Helper()
			for _, n := range m.nodes {
				if n.row.Cluster == "east" {
					m.net.lose(n.row.Address, m.nodes["west/n1"].row.Address, share)
				}
			}
			m.eventually("blocked", func() string {
				for name, n := range m.nodes {
					o := n.Overview()
					told := slices.ContainsFunc(o.Problems, func(p string) bool { return strings.Contains(p, "over UDP does not pass") })
					if n.row.Cluster == "east" && (len(o.Blocked["west"]) != want || told != (want > 0)) {
						return fmt.Sprintf("%s: by %v; %v", name, o.Blocked, o.Problems)
					}
				}
				return ""
			})
		}
		blocked(0.999999, Speakers) // TCP makes up for loss, here
		blocked(0, 0)
	})
}
