package agent

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh/gossip"
	"causeway/clustermesh/peering"
	"causeway/identity"
	"causeway/identity/pki"
)

// TestOutSaysWhatIsBroken: the data path is well only if echoes come back, and else says which port or which size it is.
func TestOutSaysWhatIsBroken(t *testing.T) {
	now := time.Now()
	old := now.Add(-time.Minute)
	a := &agent{cfg: Config{Node: NodeConfig{VXLANPort: 4789}, Encryption: EncryptionConfig{Mode: identity.EncryptOff}}}
	encrypts := &agent{cfg: Config{Encryption: EncryptionConfig{Mode: identity.EncryptInterCluster}}}
	v := &peerView{tunnelPorts: a.tunnelPorts, life: &life{self: identity.NodeName{Cluster: "east", Node: "node1"}}}
	ls := &links{mtu: 1450}
	for _, test := range []struct {
		name    string
		state   linkState
		gossips bool
		want    string // in the problem; empty: it is well
	}{
		{"well", linkState{opened: old, tried: now, last: now, mtu: 1450}, true, ""},
		{"silent", linkState{opened: old, tried: now, last: now.Add(-10 * time.Second)}, false, "UDP port 4789"},
		{"dropped", linkState{opened: old, tried: now}, true, "something drops it: other packets get through"},
		{"narrow", linkState{opened: old, tried: now, last: now, limit: 1350, mtu: 1350}, true, ""},
		{"too narrow", linkState{opened: old, tried: now, last: now, tooNarrow: true}, true, "packets of 576 bytes do not get through"},
		{"nobody", linkState{opened: old}, false, "no node of the peer is known"},
	} {
		path := v.out(&channel{cluster: "west", link: &link{links: ls, state: test.state}}, test.gossips)
		if path.OK != (test.want == "") || !strings.Contains(path.Problem, test.want) || (test.want == "") != (path.Problem == "") {
			t.Errorf("%s: %+v, want %q", test.name, path, test.want)
		}
	}
	v.tunnelPorts = encrypts.tunnelPorts
	for want, keys := range map[string][]identity.TunnelKey{
		"UDP port 51872 (WireGuard) must be open":               {{Slot: 1, Port: 51872}},
		"UDP ports 51871 and 51872 (WireGuard) must be open":    {{Slot: 1, Port: 51872}, {Slot: 0, Port: 51871}},
		"the UDP ports of encryption.ports (WireGuard) must be": nil,
	} {
		state := linkState{opened: old, tried: now, node: identity.Node{Cluster: "west", Name: "node1", TunnelKeys: keys}}
		path := v.out(&channel{cluster: "west", link: &link{links: ls, state: state}}, false)
		if path.OK || !path.Known || !strings.Contains(path.Problem, want) {
			t.Errorf("%+v, want %q", path, want)
		}
	}
	// Nothing is said of the first moments, in which the other side may not know of this one yet.
	joined := v.out(&channel{cluster: "west", link: &link{links: ls, state: linkState{opened: now, tried: now, window: []bool{false}}}}, true)
	if joined.OK || joined.Known || joined.Problem != "" {
		t.Errorf("the first echo is under way, and it says %+v", joined)
	}
	fresh := v.out(&channel{cluster: "west", link: &link{links: ls, state: linkState{opened: now}}}, true)
	if fresh.OK || fresh.Known || fresh.Problem != "" {
		t.Errorf("nothing was tried yet, and it says %+v", fresh)
	}
}

// TestInIsThePeersWord: the other direction is what the peer says lately, and no word is no good news.
func TestInIsThePeersWord(t *testing.T) {
	v, c, now := &peerView{}, &channel{cluster: "west"}, time.Now()
	node := identity.NodeName{Cluster: "west", Node: "node2"}
	for _, test := range []struct {
		name string
		last report
		ok   bool
		want string
	}{
		{"not asked yet", report{}, false, ""},
		{"it has no echo yet", report{heard: now, word: peering.Report{Node: node, Last: -1, Loss: 100}}, false, ""},
		{"well", report{heard: now, word: peering.Report{Node: node, RTT: time.Millisecond}}, true, ""},
		{"it sees nothing", report{heard: now, word: peering.Report{Node: node, Last: -1, Problems: []string{"data path: no packet"}}}, false, "as west/node2 says: data path: no packet"},
		{"silent", report{heard: now.Add(-time.Minute), err: errors.New("no route")}, false, "no agent of west answers"},
		{"left", report{heard: now.Add(-time.Minute), err: peering.ErrLeft}, false, "peer left"},
	} {
		path := v.in(c, test.last)
		if path.OK != test.ok || !strings.Contains(path.Problem, test.want) || test.want == "" && path.Problem != "" {
			t.Errorf("%s: %+v, want %q", test.name, path, test.want)
		}
		if known := test.ok || test.name == "it sees nothing"; path.Known != known {
			t.Errorf("%s: known is %v", test.name, path.Known)
		}
	}
}

func TestGossipPlane(t *testing.T) {
	v := &peerView{mesh: 7957}
	pool := func(members ...gossip.MemberView) []gossip.PoolView {
		return []gossip.PoolView{{Name: "cluster"}, {Name: "mesh", Members: members}}
	}
	member := func(blocked bool) gossip.MemberView {
		return gossip.MemberView{Node: identity.NodeName{Cluster: "west", Node: "node1"}, RTT: time.Millisecond, UDPBlocked: blocked}
	}
	reach := func(s identity.ReachState) []identity.Reach { return []identity.Reach{{Cluster: "west", State: s}} }
	for _, test := range []struct {
		name string
		o    gossip.Overview
		ok   bool
		want string
	}{
		{"well", gossip.Overview{Pools: pool(member(false)), Clusters: reach(identity.Reachable)}, true, "1 speakers"},
		{"UDP blocked", gossip.Overview{Pools: pool(member(true)), Clusters: reach(identity.Reachable)}, false, "UDP port 7957 is blocked"},
		{"one of two blocked", gossip.Overview{Pools: pool(member(true), member(false)), Clusters: reach(identity.Reachable)}, true, "2 speakers"},
		{"nobody there", gossip.Overview{Pools: pool()}, false, "port 7957 open between the clusters, UDP and TCP?"},
		{"no speaker itself", gossip.Overview{Pools: []gossip.PoolView{{Name: "cluster"}}, Clusters: reach(identity.Reachable)}, true, "as this cluster's say"},
		{"unreachable", gossip.Overview{Pools: pool(member(false)), Clusters: reach(identity.Unreachable)}, false, "west is unreachable"},
	} {
		plane := v.gossipPlane("west", test.o)
		if plane.OK != test.ok || !strings.Contains(plane.Detail, test.want) {
			t.Errorf("%s: %+v, want %q", test.name, plane, test.want)
		}
	}
}

// TestCertificatesEnd: one that has expired is told, at whichever side, before it shows as anything else.
func TestCertificatesEnd(t *testing.T) {
	now := time.Now()
	authority, err := pki.NewAuthority("west", now)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.Issue(pki.Request{User: "peer-east-abc", Validity: time.Hour}, now)
	if err != nil {
		t.Fatal(err)
	}
	record := peering.Peer{Cluster: identity.ClusterInfo{Name: "west"}, Cert: string(pair.Cert), UserExpires: now.Add(time.Hour)}
	for _, test := range []struct {
		after time.Duration
		want  string
	}{
		{0, ""},
		{90 * time.Minute, "this cluster's for cluster west expired 30m"},
		{-3 * time.Hour, "is not valid before"},
	} {
		v := &peerView{now: func() time.Time { return now.Add(test.after) }}
		if got := v.certProblem(record, &api.Peer{}); !strings.Contains(got, test.want) || test.want == "" && got != "" {
			t.Errorf("after %s: %q, want %q", test.after, got, test.want)
		}
	}
	record.UserExpires = now.Add(-time.Minute)
	v := &peerView{now: func() time.Time { return now }}
	if got := v.certProblem(record, &api.Peer{}); !strings.Contains(got, "cluster west's for this cluster expired 1m0s ago") {
		t.Errorf("the peer's certificate has ended: %q", got)
	}
	if got := v.clockProblem("west", 5*time.Minute); !strings.Contains(got, "5m0s ahead of") {
		t.Errorf("the clock: %q", got)
	}
	if got := v.clockProblem("west", -time.Second); got != "" {
		t.Errorf("a second is well, and it says %q", got)
	}
}

// TestFirstBroken: of all that fails, what the rest follows from is named.
func TestFirstBroken(t *testing.T) {
	failed := func(name, from, to string) peering.Check {
		return peering.Check{Name: name, From: from, To: to, Outcome: peering.Failed, Detail: "x", Cause: "y"}
	}
	ok := peering.Check{Name: peering.CheckName, From: "east", To: "west", Outcome: peering.OK}
	for _, test := range []struct {
		checks []peering.Check
		want   string
	}{
		{[]peering.Check{ok}, ""},
		{[]peering.Check{ok, failed(peering.CheckPods, "east", "west"), failed(peering.CheckTunnel, "west", "east")}, "tunnel UDP from west to east: x; likely cause: y"},
		{[]peering.Check{failed(peering.CheckPods, "east", "west"), failed(peering.CheckWireGuard, "west", "east")}, "WireGuard UDP from west to east: x; likely cause: y"},
		{[]peering.Check{failed(peering.CheckStore, "east", "west"), failed(peering.CheckClock, "east", "west")}, "clock from east"},
		{[]peering.Check{failed(peering.CheckTLS, "east", "west"), failed(peering.CheckMTU, "west", "east")}, "path MTU from west"},
		{[]peering.Check{failed(peering.CheckTCP, "east", "west"), failed(peering.CheckStore, "east", "east")}, "etcd read from east to east"},
	} {
		if got := firstBroken(test.checks); !strings.HasPrefix(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%v: %q, want %q", test.checks, got, test.want)
		}
	}
}

// TestLogsOfBundlesHoldNoSecrets: nothing of ours logs any; should it happen all the same, it does not travel.
func TestLogsOfBundlesHoldNoSecrets(t *testing.T) {
	log := "token=cm1.AbC_-9 key=c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0MTI= -----BEGIN PRIVATE KEY-----\nMIG\n-----END PRIVATE KEY----- node=east/node1"
	got := string(secrets.ReplaceAll([]byte(log), []byte("[removed]")))
	if regexp.MustCompile(`AbC|c2Vj|MIG`).MatchString(got) || !strings.Contains(got, "node=east/node1") {
		t.Errorf("what is left of the log: %s", got)
	}
}
