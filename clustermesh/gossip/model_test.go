package gossip

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"causeway/identity"
)

// A dozen random histories a run; more with -rapid.checks.
func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "rapid.checks" })
	if !given {
		_ = flag.Set("rapid.checks", "12")
	}
	os.Exit(m.Run())
}

// step of a random history.
type step struct {
	Do   string
	Node string
	Peer string
	Wait time.Duration
}

func (s step) String() string { return fmt.Sprintf("%s %s %s, then %v", s.Do, s.Node, s.Peer, s.Wait) }

var modelNodes = []string{"east/n1", "east/n2", "east/n3", "west/n1", "west/n2", "west/n3"}

func steps(t *rapid.T) []step {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
		return step{
			Do: rapid.SampledFrom([]string{
				"kill node", "kill agent", "stop agent", "start", "start", "start", "partition", "one-way", "lose", "split", "heal",
				"publish", "publish", "withdraw", "drain", "undrain", "wait",
			}).Draw(t, "do"),
			Node: rapid.SampledFrom(modelNodes).Draw(t, "node"),
			Peer: rapid.SampledFrom(modelNodes).Draw(t, "peer"),
			Wait: time.Duration(rapid.IntRange(0, 40).Draw(t, "wait")) * 100 * time.Millisecond,
		}
	}), 1, 14).Draw(t, "steps")
}

// model is what should come of a history: so simple that it is right.
type model struct {
	*mesh
	powered, agent, draining map[string]bool
	entries                  map[string]map[string]string // by owner, key
	ever                     map[string]map[string]bool   // every value that an owner has given a key
	sequence                 uint64
}

// TestModel runs random histories of kills, partitions, restarts and changes. When the network is whole again and all had
// time to say so: no live backend is quarantined, every dead one is, and what a node owns is what it said last.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		history := steps(rt)
		problem := ""
		synctest.Test(t, func(t *testing.T) {
			t.Cleanup(func() { time.Sleep(time.Minute) })
			m := newModel(t)
			for _, s := range history {
				m.do(s)
				time.Sleep(s.Wait)
			}
			m.heal()
			time.Sleep(40 * time.Second)
			problem = m.problem()
		})
		if problem != "" {
			rt.Fatalf("%s\nafter %v", problem, history)
		}
	})
}

func newModel(t *testing.T) *model {
	m := &model{mesh: newMesh(t), powered: map[string]bool{}, agent: map[string]bool{}, draining: map[string]bool{},
		entries: map[string]map[string]string{}, ever: map[string]map[string]bool{}}
	for _, name := range modelNodes {
		m.add(name)
		m.powered[name], m.agent[name] = true, true
		m.entries[name], m.ever[name] = map[string]string{}, map[string]bool{}
	}
	m.start()
	return m
}

func (m *model) lose(a, b string, share float64, both bool) {
	x, y := m.nodes[a].row.Address, m.nodes[b].row.Address
	m.net.lose(x, y, share)
	if both {
		m.net.lose(y, x, share)
	}
}

func (m *model) heal() {
	for _, a := range modelNodes {
		for _, b := range modelNodes {
			m.lose(a, b, 0, false)
		}
	}
}

func (m *model) do(s step) {
	n := m.nodes[s.Node]
	switch s.Do {
	case "kill node":
		if m.powered[s.Node] {
			m.killNode(s.Node)
			m.powered[s.Node], m.agent[s.Node] = false, false
		}
	case "kill agent":
		if m.agent[s.Node] {
			m.killAgent(s.Node)
			m.agent[s.Node] = false
		}
	case "stop agent":
		if m.agent[s.Node] {
			n.end()
			m.agent[s.Node] = false
		}
	case "start":
		m.startAgain(s.Node)
	case "partition":
		m.lose(s.Node, s.Peer, 1, true)
	case "one-way":
		m.lose(s.Node, s.Peer, 1, false)
	case "lose":
		m.lose(s.Node, s.Peer, 0.2, true)
	case "split":
		for _, a := range modelNodes[:3] {
			for _, b := range modelNodes[3:] {
				m.lose(a, b, 1, true)
			}
		}
	case "heal":
		m.heal()
	case "publish":
		if m.agent[s.Node] {
			m.publish(s.Node, fmt.Sprintf("addresses/%s/%s", n.row.Cluster, podRange(n.row.NodeName()).Addr().Next()), fmt.Sprint("value ", m.sequence))
		}
	case "withdraw":
		if keys := slices.Sorted(maps.Keys(m.entries[s.Node])); m.agent[s.Node] && len(keys) > 0 {
			m.withdraw(s.Node, keys[0])
		}
	case "drain", "undrain":
		if m.agent[s.Node] {
			m.draining[s.Node] = s.Do == "drain"
			n.Drain(m.draining[s.Node])
		}
	}
}

func (m *model) publish(name, key, value string) {
	n := m.nodes[name]
	m.sequence++
	n.mu.Lock()
	n.owned[key] = true
	n.mu.Unlock()
	m.entries[name][key], m.ever[name][value] = value, true
	n.Publish(Entry{Key: key, Version: identity.Version{Incarnation: n.Incarnation, Sequence: m.sequence}, Value: []byte(value)})
}

func (m *model) withdraw(name, key string) {
	n := m.nodes[name]
	n.mu.Lock()
	delete(n.owned, key)
	n.mu.Unlock()
	delete(m.entries[name], key)
	n.Publish(Entry{Key: key, Version: identity.Version{Incarnation: n.Incarnation, Sequence: m.sequence}, Withdrawn: true})
}

// startAgain starts what is not running, as an agent does: it tells all that it has, and that this is all.
func (m *model) startAgain(name string) {
	if m.agent[name] {
		return
	}
	n := m.nodes[name]
	m.powered[name], m.agent[name] = true, true
	n.drained = m.draining[name]
	m.restart(name)
	for key, value := range maps.Clone(m.entries[name]) {
		m.publish(name, key, value)
	}
	n.Complete()
}

func (m *model) problem() string {
	for _, viewer := range modelNodes {
		if !m.agent[viewer] {
			continue
		}
		for _, name := range modelNodes {
			if p := m.judged(viewer, name); p != "" {
				return p
			}
			if p := m.told(viewer, name); p != "" {
				return p
			}
		}
	}
	return ""
}

// judged compares what a node says of another's life with the truth.
func (m *model) judged(viewer, name string) string {
	life := m.nodes[viewer].life(name)
	say := func(want string) string {
		return fmt.Sprintf("%s says of %s, which is %s: %+v; of its cluster: %+v", viewer, name, want, life, m.nodes[viewer].reachOf(life.Cluster))
	}
	switch {
	case m.agent[name]:
		if life.State != identity.NodeAlive || life.Quarantined != m.draining[name] {
			return say(fmt.Sprintf("alive, draining %v", m.draining[name]))
		}
	case m.powered[name]:
		if life.Quarantined && !m.draining[name] || life.State == identity.NodeSuspect || life.State == identity.NodeDead {
			return say("alive but for its agent")
		}
	case !life.Quarantined:
		return say("dead")
	}
	return ""
}

// told compares the entries that a node has of another with what that one said last.
func (m *model) told(viewer, owner string) string {
	n := m.nodes[viewer]
	n.mu.Lock()
	defer n.mu.Unlock()
	for key, e := range n.entries {
		if e.Node.String() != owner {
			continue
		}
		if !e.Withdrawn && !m.ever[owner][string(e.Value)] {
			return fmt.Sprintf("%s has of %s what that one never said: %s %q", viewer, owner, key, e.Value)
		}
		if want, ok := m.entries[owner][key]; m.agent[owner] && (ok == e.Withdrawn || ok && want != string(e.Value)) {
			return fmt.Sprintf("%s has of %s: %s %q, withdrawn %v; it said last %q, %v", viewer, owner, key, e.Value, e.Withdrawn, want, ok)
		}
	}
	for key := range m.entries[owner] {
		if _, ok := n.entries[key]; viewer != owner && m.agent[owner] && !ok {
			return fmt.Sprintf("%s lacks %s of %s", viewer, key, owner)
		}
	}
	return ""
}
