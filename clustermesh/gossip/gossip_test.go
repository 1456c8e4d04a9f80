package gossip

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"

	"causeway/identity"
)

// patience bounds every wait, in fake time; a wait that needs it has failed.
const patience = 30 * time.Second

// inFakeTime runs a test whose time passes when nothing else is left to do.
func inFakeTime(t *testing.T, test func(*testing.T)) {
	synctest.Test(t, func(t *testing.T) {
		// What memberlist leaves behind ends with its timers. This runs last.
		t.Cleanup(func() { time.Sleep(time.Minute) })
		test(t)
	})
}

// mesh is nodes with the real memberlist on a network in memory, in fake time.
type mesh struct {
	*testing.T
	net   *network
	nodes map[string]*node
	key   []byte
}

type node struct {
	*Gossip
	mesh *mesh
	row  identity.Node
	dir  string
	stop context.CancelFunc
	done chan error
	// drained before the agent was started.
	drained bool

	mu      sync.Mutex
	entries map[string]Entry
	owned   map[string]bool
	lives   map[string]identity.Liveness
	reaches map[string]identity.Reach
	refused []string
	// rings are what commands on this node have made; onRing is called with each.
	rings  []Ring
	onRing func(Ring)
	// ever are the states that were seen of each node.
	ever map[string][]identity.LivenessState
}

func newMesh(t *testing.T) *mesh {
	return &mesh{T: t, net: newNetwork(), nodes: map[string]*node{}, key: NewKey()}
}

// add makes a node, "CLUSTER/NODE", that is known to all; start starts it.
func (m *mesh) add(name string) *node {
	m.Helper()
	parsed, err := parseName(name)
	if err != nil {
		m.Fatal(err)
	}
	key := newKey(m.T)
	n := &node{mesh: m, dir: m.TempDir(), entries: map[string]Entry{}, owned: map[string]bool{},
		lives: map[string]identity.Liveness{}, reaches: map[string]identity.Reach{}, ever: map[string][]identity.LivenessState{}}
	n.row = identity.Node{Cluster: parsed.Cluster, Name: parsed.Node, Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(len(m.nodes) + 1)}), GossipKey: publicOf(key)}
	n.row.PodCIDRs = []netip.Prefix{podRange(parsed)}
	m.nodes[name] = n
	n.make(key)
	return n
}

func (n *node) make(key ed25519.PrivateKey) {
	m := n.mesh
	m.Helper()
	keys := filepath.Join(n.dir, "gossip.key")
	if _, err := os.Stat(keys); err != nil {
		if err := os.WriteFile(keys, []byte(base64.StdEncoding.EncodeToString(m.key)), 0o600); err != nil {
			m.Fatal(err)
		}
	}
	var peers []string
	for _, c := range []string{"east", "west", "north"} {
		if c != n.row.Cluster {
			peers = append(peers, c)
		}
	}
	g, err := New(Config{
		Self: n.row.NodeName(), Address: n.row.Address, Port: 7956, MeshPort: 7957, Mesh: "test", Peers: peers, KeyFile: keys,
		SigningKey: key, Incarnation: uint64(time.Now().UnixNano()), Draining: n.drained, Log: slog.New(slog.DiscardHandler),
		Echo: n.echo, Deliver: n.deliver, Settled: func(Entry) bool { return false }, Known: n.known, Changed: n.changed, RingChanged: n.ringChanged,
		transport: func(a netip.AddrPort) memberlist.Transport { return m.net.open(a) },
		Refused: func(cluster, key string, reason error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.refused = append(n.refused, key+": "+reason.Error())
		},
	})
	if err != nil {
		m.Fatal(err)
	}
	n.Gossip = g
}

// podRange gives n1 of every cluster 10.0.1.0/24, and so on: nothing here looks at two clusters' ranges at once.
func podRange(n identity.NodeName) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, n.Node[len(n.Node)-1] - '0', 0}), 24)
}

// echo comes back if the network lets it, whatever has become of the other's agent.
func (n *node) echo(to netip.Addr, nonce uint64) error {
	if n.mesh.net.passes(n.row.Address, to) && n.mesh.net.passes(to, n.row.Address) {
		time.AfterFunc(2*delay, func() { n.Answered(to, nonce, time.Now()) })
	}
	return nil
}

func (n *node) deliver(e Entry) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.entries[e.Key] = e
}

func (n *node) known(e Entry) (known, gone bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e.Node == n.Self {
		return n.owned[e.Key], !n.owned[e.Key]
	}
	held, ok := n.entries[e.Key]
	return ok && !e.Newer(held.Version) && (held.Withdrawn || !e.Withdrawn), ok && held.Withdrawn
}

func (n *node) changed(rows []identity.Liveness, reaches []identity.Reach) {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.lives)
	for _, r := range rows {
		name := r.NodeName().String()
		n.lives[name] = r
		if seen := n.ever[name]; len(seen) == 0 || seen[len(seen)-1] != r.State {
			n.ever[name] = append(seen, r.State)
		}
	}
	clear(n.reaches)
	for _, r := range reaches {
		n.reaches[r.Cluster] = r
	}
}

func (n *node) ringChanged(r Ring) {
	n.mu.Lock()
	n.rings = append(n.rings, r)
	hook := n.onRing
	n.mu.Unlock()
	if hook != nil {
		hook(r)
	}
}

func (n *node) life(of string) identity.Liveness {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lives[of]
}

func (n *node) reachOf(cluster string) identity.Reach {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.reaches[cluster]
}

func (n *node) entry(key string) (Entry, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	e, ok := n.entries[key]
	return e, ok
}

// start runs all nodes, which know each other.
func (m *mesh) start() {
	m.Helper()
	for _, n := range m.nodes {
		n.SetNodes(m.rows())
		n.run()
	}
	m.eventually("all know all", func() string {
		for name, n := range m.nodes {
			pool := 0
			for _, p := range n.Overview().Pools {
				if p.Name == clusterPool {
					pool = len(p.Members)
				}
			}
			want := 0
			for _, other := range m.nodes {
				if other.row.Cluster == n.row.Cluster {
					want++
				}
			}
			if pool != want {
				return fmt.Sprintf("%s has %d members of %d", name, pool, want)
			}
			for cluster := range m.clusters() {
				if r := n.reachOf(cluster); cluster != n.row.Cluster && r.State != identity.Reachable {
					return fmt.Sprintf("%s finds %s %q", name, cluster, r.State)
				}
			}
		}
		return ""
	})
}

func (m *mesh) clusters() map[string]bool {
	out := map[string]bool{}
	for _, n := range m.nodes {
		out[n.row.Cluster] = true
	}
	return out
}

func (m *mesh) rows() (rows []identity.Node) {
	for _, n := range m.nodes {
		rows = append(rows, n.row)
	}
	return rows
}

func (n *node) run() {
	ctx, cancel := context.WithCancel(context.Background())
	n.stop, n.done = cancel, make(chan error, 1)
	g := n.Gossip
	go func() { n.done <- g.Run(ctx) }()
	n.mesh.Cleanup(func() { n.end() })
}

// end stops an agent as planned.
func (n *node) end() {
	if n.stop == nil {
		return
	}
	n.stop()
	n.stop = nil
	if err := <-n.done; err != nil {
		n.mesh.Error(err)
	}
}

// killAgent ends an agent without a word: nothing that it says at its end gets out.
func (m *mesh) killAgent(name string) {
	n := m.nodes[name]
	m.net.power(n.row.Address, false)
	n.end()
	m.net.power(n.row.Address, true)
}

// killNode cuts a node's power.
func (m *mesh) killNode(name string) {
	n := m.nodes[name]
	m.net.power(n.row.Address, false)
	n.end()
}

// restart starts a node that was killed, or its agent.
func (m *mesh) restart(name string) {
	n := m.nodes[name]
	m.net.power(n.row.Address, true)
	n.make(n.SigningKey)
	n.SetNodes(m.rows())
	n.run()
}

// eventually waits until problem returns "".
func (m *mesh) eventually(what string, problem func() string) {
	m.Helper()
	deadline := time.Now().Add(patience)
	for {
		p := problem()
		if p == "" {
			return
		}
		if time.Now().After(deadline) {
			m.Fatalf("%s: %s", what, p)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// all waits until every node that runs, but the named ones, sees a state of a node.
func (m *mesh) all(of string, state identity.LivenessState, but ...string) {
	m.Helper()
	m.eventually(fmt.Sprintf("%s is %s", of, state), func() string {
		for name, n := range m.nodes {
			if got := n.life(of); !slices.Contains(but, name) && (got.State != state) {
				return fmt.Sprintf("%s says %q (%s)", name, got.State, got.Reason)
			}
		}
		return ""
	})
}

// newQuiet is a node that is not started.
func newQuiet(t *testing.T) *Gossip {
	m := newMesh(t)
	return m.add("east/self").Gossip
}

func threeByThree(t *testing.T) *mesh {
	m := newMesh(t)
	for _, c := range []string{"east", "west", "north"} {
		for _, n := range []string{"n1", "n2", "n3"} {
			m.add(c + "/" + n)
		}
	}
	m.start()
	return m
}

// TestNodeDies: known everywhere, by nodes of all clusters, and gone again when it is back.
func TestNodeDies(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		killed := time.Now()
		m.killNode("west/n2")
		m.all("west/n2", identity.NodeSuspect, "west/n2")
		t.Logf("known everywhere after %v", time.Since(killed).Round(time.Millisecond))
		for name, n := range m.nodes {
			if life := n.life("west/n2"); name != "west/n2" && (!life.Quarantined || life.Reason == "" || !strings.HasPrefix(life.By, "west/")) {
				t.Errorf("%s: %+v", name, life)
			}
		}
		m.all("west/n2", identity.NodeDead, "west/n2")

		m.net.power(m.nodes["west/n2"].row.Address, true)
		m.all("west/n2", identity.NodeAgentDown, "west/n2")
		m.restart("west/n2")
		m.all("west/n2", identity.NodeAlive)
	})
}

// TestAgentDies: the node stays in service, and is watched on.
func TestAgentDies(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		m.killAgent("west/n2")
		m.all("west/n2", identity.NodeAgentDown, "west/n2")
		for name, n := range m.nodes {
			n.mu.Lock()
			if name != "west/n2" && (n.lives["west/n2"].Quarantined || slices.Contains(n.ever["west/n2"], identity.NodeSuspect)) {
				t.Errorf("%s took its backends out of service: %v", name, n.ever["west/n2"])
			}
			n.mu.Unlock()
		}
		m.net.power(m.nodes["west/n2"].row.Address, false)
		m.all("west/n2", identity.NodeSuspect, "west/n2")
	})
}

// TestAgentStops: as planned, and announced.
func TestAgentStops(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		m.nodes["west/n2"].end()
		m.all("west/n2", identity.NodeAgentDown, "west/n2")
		if life := m.nodes["east/n1"].life("west/n2"); !strings.Contains(life.Reason, "announced") || life.Quarantined {
			t.Errorf("%+v", life)
		}
	})
}

// TestDrain: out of service while the agent runs, and left when it stops.
func TestDrain(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		if told := m.nodes["west/n2"].Drain(true); told < 2 {
			t.Errorf("%d have acknowledged", told)
		}
		quarantined := func(want bool) {
			t.Helper()
			m.eventually("drained", func() string {
				for name, n := range m.nodes {
					if life := n.life("west/n2"); life.Quarantined != want || life.Draining != want {
						return fmt.Sprintf("%s: %+v", name, life)
					}
				}
				return ""
			})
		}
		quarantined(true)
		m.nodes["west/n2"].Drain(false)
		quarantined(false)
		m.nodes["west/n2"].Drain(true)
		quarantined(true)
		m.nodes["west/n2"].end()
		m.all("west/n2", identity.NodeLeft, "west/n2")
	})
}

// TestClusterDies: out of reach for the others, each by its own speakers' votes, and back when it answers.
func TestClusterDies(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		west := []string{"west/n1", "west/n2", "west/n3"}
		reach := func(want identity.ReachState) {
			t.Helper()
			m.eventually("west is "+string(want), func() string {
				for name, n := range m.nodes {
					if r := n.reachOf("west"); !slices.Contains(west, name) && r.State != want {
						return fmt.Sprintf("%s finds it %q (%s)", name, r.State, r.Reason)
					}
				}
				return ""
			})
		}
		killed := time.Now()
		for _, name := range west {
			m.net.power(m.nodes[name].row.Address, false)
		}
		for _, name := range west {
			m.killNode(name)
		}
		reach(identity.Unreachable)
		t.Logf("known everywhere after %v", time.Since(killed).Round(time.Millisecond))
		if life := m.nodes["north/n1"].life("west/n1"); !life.Quarantined {
			t.Errorf("%+v", life)
		}
		healed := time.Now()
		for _, name := range west {
			m.net.power(m.nodes[name].row.Address, true)
		}
		reach(identity.ReachControlPlaneDown)
		t.Logf("back after %v", time.Since(healed).Round(time.Millisecond))
		if life := m.nodes["north/n1"].life("west/n1"); life.Quarantined {
			t.Errorf("%+v", life)
		}
	})
}

// TestNodeDiesInAClusterWithoutAgents: its peers notice, and do not forget.
func TestNodeDiesInAClusterWithoutAgents(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		for _, name := range []string{"west/n1", "west/n2", "west/n3"} {
			m.killAgent(name)
		}
		m.eventually("west has no agents", func() string {
			return difference(m.nodes["east/n1"].reachOf("west").State, identity.ReachControlPlaneDown)
		})
		m.net.power(m.nodes["west/n3"].row.Address, false)
		out := func(want bool) {
			t.Helper()
			m.eventually("west/n3 is out of service", func() string {
				for _, viewer := range []string{"east/n1", "east/n2", "north/n3"} {
					if life := m.nodes[viewer].life("west/n3"); life.Quarantined != want {
						return fmt.Sprintf("%s: %+v", viewer, life)
					}
				}
				return ""
			})
		}
		out(true)
		m.killAgent("east/n3")
		m.restart("east/n3") // it has never had an answer from west/n3
		time.Sleep(2 * time.Minute)
		out(true)
		for _, viewer := range []string{"east/n1", "east/n3", "north/n1"} {
			if life := m.nodes[viewer].life("west/n3"); !life.Quarantined || m.nodes[viewer].life("west/n1").Quarantined {
				t.Errorf("%s says after two minutes: %+v, %+v", viewer, life, m.nodes[viewer].life("west/n1"))
			}
		}
		m.net.power(m.nodes["west/n3"].row.Address, true)
		out(false)
	})
}

func difference[T comparable](got, want T) string {
	if got == want {
		return ""
	}
	return fmt.Sprintf("%v, want %v", got, want)
}

// TestEntries: what a node writes comes to all, and goes from all; what it does not own does not count.
func TestEntries(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		owner := m.nodes["west/n1"]
		key := "addresses/west/10.0.1.5"
		owner.owned[key] = true
		owner.Publish(Entry{Key: key, Version: identity.Version{Incarnation: owner.Incarnation, Sequence: 5}, Value: []byte(`{}`)})
		have := func(withdrawn bool) {
			t.Helper()
			m.eventually("the entry", func() string {
				for name, n := range m.nodes {
					if e, ok := n.entry(key); n != owner && (!ok || e.Withdrawn != withdrawn || e.Node.String() != "west/n1") {
						return fmt.Sprintf("%s has %+v", name, e)
					}
				}
				return ""
			})
		}
		have(false)
		// A large one does not fit a packet.
		large := "slices/west/web/shop/n1"
		owner.owned[large] = true
		owner.Publish(Entry{Key: large, Version: identity.Version{Incarnation: owner.Incarnation, Sequence: 6}, Value: make([]byte, 20000)})
		m.eventually("the large entry", func() string {
			for name, n := range m.nodes {
				if e, ok := n.entry(large); n != owner && (!ok || len(e.Value) != 20000) {
					return name + " lacks it"
				}
			}
			return ""
		})
		owner.mu.Lock()
		delete(owner.owned, key)
		owner.mu.Unlock()
		owner.Publish(Entry{Key: key, Version: identity.Version{Incarnation: owner.Incarnation, Sequence: 5}, Withdrawn: true})
		have(true)

		// A liar: another node's address, which it has not, and another node's slice.
		liar := m.nodes["west/n2"]
		liar.Publish(Entry{Key: large, Version: identity.Version{Incarnation: liar.Incarnation + 1<<40, Sequence: 1}, Value: []byte("lie")})
		liar.Publish(Entry{Key: key, Version: identity.Version{Incarnation: liar.Incarnation + 1<<40, Sequence: 2}, Withdrawn: true})
		m.eventually("the lies are refused", func() string {
			n := m.nodes["west/n3"]
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, reason := range []string{"only speak for itself", "outside of node west/n2's pod ranges"} {
				if !slices.ContainsFunc(n.refused, func(s string) bool { return strings.Contains(s, reason) }) {
					return fmt.Sprint(n.refused)
				}
			}
			return ""
		})
		if e, _ := m.nodes["east/n1"].entry(large); len(e.Value) != 20000 {
			t.Errorf("the lie was believed: %+v", e)
		}
	})
}

// TestLateComer learns by an exchange what was said before it came.
func TestLateComer(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := newMesh(t)
		for _, name := range []string{"east/n1", "east/n2", "west/n1"} {
			m.add(name)
		}
		m.start()
		owner := m.nodes["west/n1"]
		owner.owned["addresses/west/10.0.1.5"] = true
		owner.Publish(Entry{Key: "addresses/west/10.0.1.5", Version: identity.Version{Incarnation: owner.Incarnation, Sequence: 5}, Value: []byte(`{}`)})
		m.eventually("the entry", func() string {
			if _, ok := m.nodes["east/n2"].entry("addresses/west/10.0.1.5"); !ok {
				return "east/n2 lacks it"
			}
			return ""
		})
		late := m.add("east/n3")
		for _, n := range m.nodes {
			n.SetNodes(m.rows())
		}
		late.run()
		m.eventually("the late-comer has it", func() string {
			if _, ok := late.entry("addresses/west/10.0.1.5"); !ok {
				return "it lacks it"
			}
			return ""
		})
	})
}

// TestKeyring: a key is changed without interruption, and no step can be taken too early.
func TestKeyring(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := threeByThree(t)
		n := m.nodes["east/n1"]
		old := Fingerprint(m.key)
		next := NewKey()
		fresh := Fingerprint(next)
		if err := n.UseKey(fresh); err == nil {
			t.Error("a key that nobody has was used")
		}
		if err := n.AddKey(next); err != nil {
			t.Fatal(err)
		}
		if err := n.AddKey(next); err == nil {
			t.Error("a key was added twice")
		}
		try := func(what string, f func() error) {
			t.Helper()
			m.eventually(what, func() string {
				if err := f(); err != nil {
					return err.Error()
				}
				return ""
			})
		}
		try("use", func() error { return n.UseKey(fresh) })
		if err := n.RemoveKey(fresh); err == nil {
			t.Error("the key that encrypts was removed")
		}
		try("remove", func() error { return n.RemoveKey(old) })
		m.eventually("all have the new key alone", func() string {
			for name, n := range m.nodes {
				if o := n.Overview().Keys; len(o) != 1 || o[0].Fingerprint != fresh {
					return fmt.Sprintf("%s: %+v", name, o)
				}
				if ring, err := keyFile(n.KeyFile).read(); err != nil || len(ring.Keys) != 1 || Fingerprint(ring.Keys[0]) != fresh {
					return fmt.Sprintf("%s: the file: %v", name, err)
				}
			}
			return ""
		})
		for name, n := range m.nodes {
			n.mu.Lock()
			for of, ever := range n.ever {
				if len(ever) > 1 {
					t.Errorf("%s saw %s as %v", name, of, ever)
				}
			}
			n.mu.Unlock()
		}
	})
}

func TestKeyFile(t *testing.T) {
	good := base64.StdEncoding.EncodeToString(NewKey())
	for _, c := range []struct {
		name, content, want string
		mode                os.FileMode
	}{
		{"none", "", "there is none", 0o600},
		{"short", "YWJj", "base64 of 32 bytes", 0o600},
		{"no base64", "***", "base64 of 32 bytes", 0o600},
		{"twice", good + "\n" + good, "is there twice", 0o600},
		{"open to others", good, "chmod 600", 0o644},
		{"good", "# ours\n\n" + good + "\n", "", 0o600},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(path, []byte(c.content), c.mode); err != nil {
				t.Fatal(err)
			}
			_, err := keyFile(path).read()
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), good) {
				t.Errorf("the error tells the key: %v", err)
			}
		})
	}
}
