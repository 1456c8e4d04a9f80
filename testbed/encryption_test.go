package testbed

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"causeway/identity"
)

// newMarker is a text that nothing else has.
func newMarker() string { return "marker-" + rand.Text() }

// command runs the bed's program on a node and returns what it printed.
func (m *mesh) command(node string, argv ...string) string {
	m.Helper()
	at, err := ParseTarget(node)
	if err != nil {
		m.Fatal(err)
	}
	var out bytes.Buffer
	code, err := m.bed.Exec(m.Context(), at, argv, Stdio{Out: &out, Err: &out})
	if err != nil || code != 0 {
		m.Fatalf("%s: %q ended with %d, %v: %s", node, argv, code, err, out.String())
	}
	return out.String()
}

func (m *mesh) rotate(node string) {
	m.Helper()
	m.command(node, "clustermesh", "encryption", "rotate", "--wait")
}

// kill, start: what the bed's commands do.
func (m *mesh) kill(v Victim) {
	m.Helper()
	if err := m.bed.Kill(m.Context(), v); err != nil {
		m.Fatal(err)
	}
}

func (m *mesh) start(v Victim) {
	m.Helper()
	if err := m.bed.Start(m.Context(), v); err != nil {
		m.Fatal(err)
	}
}

// devices returns the names of a node's WireGuard devices that there are.
func (m *mesh) devices(node string) (names []string) {
	m.Helper()
	at, err := ParseNode(node)
	if err != nil {
		m.Fatal(err)
	}
	s := mustState(m.T, m.bed)
	c, err := s.cluster(at.Cluster)
	if err != nil {
		m.Fatal(err)
	}
	name := m.bed.wireGuardName(c.ID, nodeNumber(at.Node))
	for line := range strings.Lines(m.command(node, "ip", "-br", "link")) {
		if device, _, _ := strings.Cut(line, " "); strings.HasPrefix(device, name) {
			names = append(names, device)
		}
	}
	return names
}

// slotOf is the number at the end of a device's name.
func slotOf(device string) int { return int(device[len(device)-1] - '0') }

// TestNothingInTheClear reads along on every link of the underlay while clusters are joined and everything happens to a node that may
// happen, and pods send a marker in all ways. Nothing of it is there to be read.
func TestNothingInTheClear(t *testing.T) {
	m := newUnconnected(t, 2, "east", "west")
	marker := newMarker()
	seen := m.wiretap(marker)
	near := m.server("east", "node2", "shop-2")
	far1, far2 := m.server("west", "node1", "shop-3"), m.server("west", "node2", "shop-2")
	c := m.chat("east", marker, near, far1, far2)
	m.connect("east", "west")
	c.waitAnswers("the connect")

	agent, node := Victim{"agent", "west", "node2"}, Victim{"node", "west", "node2"}
	const udpToVictim = "UDP to west/shop-2"
	for _, event := range []struct {
		name  string
		limit time.Duration // of the pause in answers over UDP; 0: any
		do    func()
	}{
		{"killing an agent", 2 * time.Second, func() { m.kill(agent) }},
		{"starting the agent", 2 * time.Second, func() { m.start(agent) }},
		{"rotating keys", 2 * time.Second, func() {
			m.rotate("east/node1")
			m.rotate("west/node2")
		}},
		{"killing WireGuard", 2 * time.Second, func() {
			if len(mustWireGuard(m, "west", "node2")) > 0 { // in user space
				m.kill(Victim{"wireguard", "west", "node2"})
			}
		}},
		{"removing a rule", 5 * time.Second, func() { m.command("west/node2", "ip", "rule", "del", "pref", "77") }},
		{"removing routes", 5 * time.Second, func() {
			for _, device := range m.devices("west/node2") {
				m.command("west/node2", "ip", "route", "flush", "table", fmt.Sprint(0xca00+slotOf(device)))
			}
		}},
		{"removing a device", 5 * time.Second, func() {
			for _, device := range m.devices("west/node2") {
				m.command("west/node2", "ip", "link", "del", device)
			}
		}},
		{"killing a node", 0, func() { m.kill(node); m.start(node) }},
	} {
		paused := c.pauses(udpToVictim)
		event.do()
		c.waitAnswers(event.name)
		took := paused()
		t.Logf("%s: a pause of %v", event.name, took.Round(time.Millisecond))
		if event.limit > 0 && took > event.limit {
			t.Errorf("%s: packets did not flow for %v, want at most %v", event.name, took, event.limit)
		}
	}
	c.end()
	c.wantFlowed(100)
	s := seen()
	t.Log(s)
	if s.marked > 0 || s.vxlan > 0 {
		t.Errorf("in the clear: %v", s)
	}
	if s.packets < 1000 || s.missed > uint32(s.packets/10) {
		t.Errorf("this says nothing: %v", s)
	}
}

func mustWireGuard(m *mesh, cluster, node string) []*Process {
	m.Helper()
	ps, err := mustState(m.T, m.bed).wireGuardProcesses(cluster, node)
	if err != nil {
		m.Fatal(err)
	}
	return ps
}

// TestWiretap sees all of it where nothing is encrypted, which shows that TestNothingInTheClear looks at the right place.
func TestWiretap(t *testing.T) {
	m := newMeshOf(t, Options{Encryption: identity.EncryptOff, Nodes: 1})
	marker := newMarker()
	seen := m.wiretap(marker)
	c := m.chat("east", marker, m.server("west", "node1", "shop-3"))
	c.waitAnswers("the start")
	c.end()
	if s := seen(); s.marked < 4 || s.vxlan < 4 {
		t.Errorf("only %v", s)
	}
}

// TestInterCluster encrypts what crosses clusters, and that alone.
func TestInterCluster(t *testing.T) {
	m := newMeshOf(t, Options{Encryption: identity.EncryptInterCluster})
	for _, c := range []struct {
		name   string
		server *PodStatus
		clear  bool
	}{
		{"to the other cluster", m.server("west", "node1", "far"), false},
		{"within the cluster", m.server("east", "node2", "near"), true},
	} {
		marker := newMarker()
		seen := m.wiretap(marker)
		ask := &chatter{m: m, marker: marker, kinds: map[string]*answered{}}
		at := fmt.Sprintf("http://[%v]:%d/%s", c.server.Address6, backendPort, marker)
		if err := ask.askService(t.Context(), "east", at); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if s := seen(); (s.marked > 0) != c.clear || (s.vxlan > 0) != c.clear || s.packets == 0 {
			t.Errorf("%s: %v", c.name, s)
		}
	}
}

// TestKeysAndAgentsComeAndGo changes keys and kills agents on both sides under requests across clusters, of which none may fail.
func TestKeysAndAgentsComeAndGo(t *testing.T) {
	m := newMesh(t)
	rounds := 3
	if os.Getenv("CAUSEWAY_SOAK") != "" {
		rounds = 20
	}
	nodes := []string{"east/node1", "west/node1", "west/node2", "east/node2"}
	r := m.during("east", 500, func() {
		for i := range rounds {
			m.rotate(nodes[i%len(nodes)])
			at, _ := ParseNode(nodes[(i+1)%len(nodes)])
			victim := Victim{"agent", at.Cluster, at.Node}
			m.kill(victim)
			m.start(victim)
		}
	})
	m.wantAll(r, nil, "east", "west")
	t.Logf("%d requests, %d failed", r.Requests, r.Failed)
}

// TestDualStack has pods of all nodes reach those of all others and the service, over both families, on underlays of either.
func TestDualStack(t *testing.T) {
	for _, underlay := range []Underlay{UnderlayIPv4, UnderlayIPv6} {
		t.Run(string(underlay), func(t *testing.T) {
			m := newMeshOf(t, Options{Underlay: underlay})
			marker := newMarker()
			seen := m.wiretap(marker)
			near, far := m.server("east", "node2", "near"), m.server("west", "node2", "far")
			for _, pod := range []*PodStatus{near, far} {
				if !pod.Address.Is4() || !pod.Address6.Is6() {
					t.Fatalf("pod %s/%s has the addresses %v and %v", pod.Cluster, pod.Name, pod.Address, pod.Address6)
				}
			}
			for _, cluster := range []string{"east", "west"} {
				c := m.chat(cluster, marker, near, far)
				c.waitAnswers("the start")
				c.end()
				for _, six := range []bool{false, true} {
					one := *m
					one.shop = m.serviceURL(cluster, six)
					r, err := one.load(t.Context(), cluster, 100, time.Second)
					m.wantAll(r, err, "east", "west")
				}
			}
			if s := seen(); s.marked > 0 || s.vxlan > 0 || s.fragments > 0 || s.packets < 100 {
				t.Errorf("on the underlay: %v", s)
			}
		})
	}
}
