package gossip

import (
	"crypto/ed25519"
	"errors"
	"strings"
	"testing"
	"time"

	"causeway/identity"
)

func newKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func publicOf(key ed25519.PrivateKey) ed25519.PublicKey { return key.Public().(ed25519.PublicKey) }

func TestDeltaSignature(t *testing.T) {
	key := newKey(t)
	d := Delta{Cluster: "east", Node: "n1", Key: "addresses/east/10.1.1.5", Incarnation: 7, Sequence: 3, Value: []byte("x")}
	d.sign(key)
	var back Delta
	if err := decode(encode(&d), &back); err != nil {
		t.Fatal(err)
	}
	if err := back.verify(publicOf(key)); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Delta){
		"value":       func(d *Delta) { d.Value = []byte("y") },
		"key":         func(d *Delta) { d.Key = "addresses/east/10.1.1.6" },
		"sequence":    func(d *Delta) { d.Sequence++ },
		"incarnation": func(d *Delta) { d.Incarnation++ },
		"withdrawn":   func(d *Delta) { d.Withdrawn = true },
		"node":        func(d *Delta) { d.Node = "n2" },
		"signature":   func(d *Delta) { d.Signature = nil },
	} {
		forged := d
		change(&forged)
		if err := forged.verify(publicOf(key)); !errors.Is(err, ErrForged) {
			t.Errorf("another %s: %v", name, err)
		}
	}
	if err := d.verify(publicOf(newKey(t))); !errors.Is(err, ErrForged) {
		t.Errorf("another node's key: %v", err)
	}
	if err := d.verify(nil); !errors.Is(err, ErrForged) {
		t.Errorf("a node without a key: %v", err)
	}
}

func TestDeltaMay(t *testing.T) {
	for _, c := range []struct {
		cluster, node, key string
		refused            string // empty: it may
	}{
		{"east", "n1", "addresses/east/10.1.1.5", ""},
		{"east", "n1", "slices/east/web/shop/n1", ""},
		{"east", "n1", "slices/east/web/shop/n1.2", ""},
		{"east", "n1", "slices/east/web/shop/n2", "only speak for itself"},
		{"east", "n1", "slices/west/web/shop/n1", "another cluster"},
		{"east", "n1", "slices/east/web/shop/_shop-x7k2p.1", ""},
		{"east", "n1", "slices/west/web/shop/_shop-x7k2p.1", "another cluster"},
		{"east", "n1", "addresses/west/10.2.1.5", "another cluster"},
		{"east", "n1", "facts/east/n1", ""},
		{"east", "n1", "facts/east/n2", "only speak for itself"},
		{"east", "n1", "verdicts/east/n2", ""},
		{"east", "n1", "verdicts/west/n2", "another cluster"},
		{"east", "n1", "verdicts/east", "another cluster"},
		{"east", "n1", "keyring", ""},
		{"east", "n1", "keyring/east/n1", "unknown kind"},
		{"east", "n1", "services/east/web/shop", "unknown kind"},
		{"east", "n1", "nodes/east/n1", "unknown kind"},
		{"east", "n1", "", "another cluster"},
		{"east", "n1", "addresses/east/" + strings.Repeat("1", 1000), "too long"},
	} {
		d := Delta{Cluster: c.cluster, Node: c.node, Key: c.key}
		err := d.may()
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s/%s on %.60q: %v, want %q", c.cluster, c.node, c.key, err, c.refused)
		}
	}
}

func TestNewest(t *testing.T) {
	l := newLedger()
	now := time.Now()
	put := func(incarnation, sequence uint64, withdrawn bool) bool {
		d := Delta{Cluster: "east", Node: "n1", Key: "addresses/east/10.1.1.5", Incarnation: incarnation, Sequence: sequence, Withdrawn: withdrawn}
		if !l.news(&d) {
			return false
		}
		if err := l.put(d, now); err != nil {
			t.Fatal(err)
		}
		return true
	}
	for _, c := range []struct {
		incarnation, sequence uint64
		withdrawn, news       bool
	}{
		{1, 5, false, true}, {1, 5, false, false}, {1, 4, true, false}, {1, 5, true, true}, {1, 5, false, false},
		{1, 6, false, true}, {2, 1, false, true}, {1, 99, true, false}, {2, 1, true, true},
	} {
		if got := put(c.incarnation, c.sequence, c.withdrawn); got != c.news {
			t.Errorf("%+v: %v", c, got)
		}
	}
	if l.count[identity.NodeName{Cluster: "east", Node: "n1"}] != 1 {
		t.Errorf("%v entries of one key", l.count)
	}
}

// TestExchange: two ledgers that pull what they lack from each other become equal, whatever each had.
func TestExchange(t *testing.T) {
	all := func(*Delta) bool { return true }
	a, b := newLedger(), newLedger()
	entry := func(node, key string, sequence uint64) Delta {
		return Delta{Cluster: "east", Node: node, Key: key, Incarnation: 1, Sequence: sequence}
	}
	for _, d := range []Delta{entry("n1", "a", 1), entry("n1", "b", 2), entry("n2", "c", 1)} {
		_ = a.put(d, time.Now())
	}
	for _, d := range []Delta{entry("n1", "b", 3), entry("n2", "c", 1), entry("n3", "d", 1)} {
		_ = b.put(d, time.Now())
	}
	pull := func(to, from *ledger) {
		for _, d := range from.of(to.lacking(from.digests(all), all), all) {
			if to.news(&d) {
				_ = to.put(d, time.Now())
			}
		}
	}
	pull(a, b)
	pull(b, a)
	if got := a.lacking(b.digests(all), all); len(got) != 0 || len(b.entries) != 4 || len(a.entries) != 4 || b.get("b").Sequence != 3 {
		t.Errorf("still different: %v; %d and %d entries", got, len(a.entries), len(b.entries))
	}
}

// TestLedgerIsBounded: one node cannot fill the memory of others.
func TestLedgerIsBounded(t *testing.T) {
	l := newLedger()
	var err error
	for i := uint64(0); err == nil && i < 2*maxEntries; i++ {
		err = l.put(Delta{Cluster: "east", Node: "n1", Key: "addresses/east/" + time.Duration(i).String(), Incarnation: 1, Sequence: i}, time.Now())
	}
	if err == nil || len(l.entries) != maxEntries {
		t.Errorf("%d entries of one node: %v", len(l.entries), err)
	}
	if err := l.put(Delta{Cluster: "east", Node: "n2", Key: "x"}, time.Now()); err != nil {
		t.Errorf("another node's: %v", err)
	}
}

func TestVerdictOrder(t *testing.T) {
	subject := identity.NodeName{Cluster: "east", Node: "n2"}
	now := time.Now()
	suspect := newVerdict(subject, nil, verdict{State: identity.NodeSuspect}, now)
	dead := newVerdict(subject, &suspect, verdict{State: identity.NodeDead}, now)
	alive := newVerdict(subject, &dead, verdict{State: identity.NodeAlive}, now)
	late := newVerdict(subject, &suspect, verdict{State: identity.NodeDead}, now.Add(time.Hour))
	if !dead.newer(&suspect) || !alive.newer(&dead) || !alive.newer(&late) || late.newer(&alive) {
		t.Errorf("suspect %v, dead %v, alive %v, late %v", suspect.Version(), dead.Version(), alive.Version(), late.Version())
	}
	if _, err := decodeVerdict(&Delta{Sequence: 1, Value: encode(verdict{State: identity.NodeDead})}); err == nil {
		t.Error("a state of another severity was accepted")
	}
	if _, err := decodeVerdict(&Delta{Sequence: 3, Value: encode(verdict{State: identity.NodeDead, Reason: strings.Repeat("x", 1000)})}); err == nil {
		t.Error("a novel was accepted")
	}
}

// FuzzMessage: whatever a member sends, nothing breaks, and nothing unsigned has an effect.
func FuzzMessage(f *testing.F) {
	key := newKey(f)
	d := Delta{Cluster: "east", Node: "n1", Key: "facts/east/n1", Incarnation: 1, Sequence: 1, Value: encode(&facts{Speaker: true})}
	d.sign(key)
	f.Add(message(msgDeltas, []Delta{d}))
	f.Add(message(msgAsk, &ask{From: identity.NodeName{Cluster: "east", Node: "n1"}, Subject: identity.NodeName{Cluster: "east", Node: "n2"}, Back: "127.0.0.1:7956"}))
	f.Add(message(msgObservation, &observation{Subject: identity.NodeName{Cluster: "east", Node: "n2"}}))
	f.Add(message(msgPull, &pull{Back: "127.0.0.1:7956"}))
	f.Add(encode(&state{Back: "x", Digests: []digest{{Count: 1}}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		g := newQuiet(t)
		g.SetNodes([]identity.Node{{Cluster: "east", Name: "n1", GossipKey: publicOf(newKey(t))}, {Cluster: "east", Name: "n2", GossipKey: publicOf(newKey(t))}})
		g.mu.Lock()
		defer g.mu.Unlock()
		g.handle(event{pool: clusterPool, kind: evMessage, payload: data, at: time.Now()})
		g.handle(event{pool: clusterPool, kind: evState, payload: data, at: time.Now()})
		g.handle(event{pool: clusterPool, kind: evAcked, payload: data, at: time.Now()})
		if len(g.ledger.entries) > 0 || len(g.facts) > 0 {
			t.Errorf("%q had an effect", data)
		}
	})
}
