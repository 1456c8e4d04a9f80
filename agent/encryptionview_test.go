package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/identity"
	"causeway/tunnel"
)

// encryptedNode is a row of the tunnels table that has been in force for so long.
func encryptedNode(t *testing.T, tables *clustermesh.Tables, row identity.Tunnel, age time.Duration) {
	t.Helper()
	txn := tables.DB.WriteTxn(tables.Tunnels)
	defer txn.Abort()
	r := &clustermesh.Row[identity.Tunnel]{Object: row, Status: clustermesh.Status{Kind: clustermesh.Done, At: time.Now().Add(-age)}}
	if _, _, err := tables.Tunnels.Insert(txn, r); err != nil {
		t.Fatal(err)
	}
	txn.Commit()
}

func TestEncryptionAsItIsShown(t *testing.T) {
	tables, wg := newTables(t), newFakeWireGuard(0)
	e := newTestEncryption(tables, wg)
	e.Open(t.Context())
	rules := e.rules()
	encryptedNode(t, tables, rules.derive(tunnelNode("east", 1, 0), nil, 0, none), time.Hour)
	encryptedNode(t, tables, rules.derive(tunnelNode("west", 1, 0), nil, 0, none), time.Hour)
	encryptedNode(t, tables, rules.derive(tunnelNode("west", 2, 1, 0), nil, 1300, none), time.Hour)
	encryptedNode(t, tables, rules.derive(tunnelNode("west", 3), nil, 0, none), time.Hour)
	encryptedNode(t, tables, rules.derive(tunnelNode("west", 4), nil, 0, none), time.Hour)
	shaken := time.Now().Add(-time.Minute)
	wg.peers = []tunnel.WireGuardPeer{
		{Node: identity.NodeName{Cluster: "west", Node: "node2"}, Slot: 0, Remote: 0, Received: 1, Transmitted: 2, Handshake: time.Now()},
		{Node: identity.NodeName{Cluster: "west", Node: "node2"}, Slot: 0, Remote: 1, Received: 10, Transmitted: 20, Handshake: shaken, Shaken: true, Keepalive: 25 * time.Second},
	}
	wg.problems = []string{"UDP port 51872 is taken"}
	put(t, tables, tables.Liveness, identity.Liveness{Cluster: "west", Node: "node1", State: identity.NodeAlive})

	s := e.state(tables.DB.ReadTxn())
	names := []string{}
	for _, n := range s.Nodes {
		names = append(names, n.Cluster+"/"+n.Node)
	}
	if want := []string{"west/node1", "west/node2", "west/node3", "west/node4"}; !slices.Equal(names, want) {
		t.Fatalf("the nodes are %v, want %v", names, want)
	}
	if n := s.Nodes[1]; !n.Session || n.Remote != 1 || n.Received != 11 || n.Transmitted != 22 || !n.Handshake.Equal(shaken) || n.Keepalive != 25 || n.MTU != 1300 {
		t.Errorf("west/node2 is %+v", n)
	}
	if len(s.Devices) != 1 || !s.Devices[0].Preferred || s.Repairs["route"] != 2 {
		t.Errorf("devices %+v, repairs %v", s.Devices, s.Repairs)
	}
	for _, want := range []string{"UDP port 51872 is taken", "packets to west/node3 and another node are dropped: node west/node3 has published no WireGuard key",
		"packets to west/node1 are dropped, as there never was a WireGuard session"} {
		if !slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%q is not among the problems %q", want, s.Problems)
		}
	}
	if len(s.Problems) != 3 {
		t.Errorf("the problems are %q", s.Problems)
	}
}

func TestEncryptionWithoutADeviceIsAProblem(t *testing.T) {
	e := newTestEncryption(newTables(t), nil)
	e.missing = errors.New("no TUN here")
	if s := e.state(e.tables.DB.ReadTxn()); len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "no TUN here") {
		t.Errorf("the problems are %q", s.Problems)
	}
	e.mode = identity.EncryptOff
	if s := e.state(e.tables.DB.ReadTxn()); len(s.Problems) != 0 {
		t.Errorf("a node that does not encrypt complains: %q", s.Problems)
	}
}

// testSnapshot is a node that knows two others.
func testSnapshot() (snapshot, error) {
	now := time.Now()
	return snapshot{
		status: api.Status{
			Cluster: "east", Node: "node1", Version: "1", Problems: []string{"one"}, Tables: map[string]api.Table{"tunnels": {Rows: 3, Pending: 1}},
			Peers:  []api.Peer{{Name: "west", State: "connected", Out: api.Path{MTU: 1390}}},
			Gossip: api.Members{Nodes: []api.NodeLiveness{{Liveness: identity.Liveness{Cluster: "west", Node: "node1", State: identity.NodeAlive}}}},
		},
		encryption: api.Encryption{
			Mode: identity.EncryptAll, Rotations: 3, Repairs: map[string]uint64{"route": 2},
			Devices: []api.WireGuardDevice{{Name: "causeway-wg0", Kind: "kernel", Made: now.Add(-time.Hour)}},
			Nodes: []api.EncryptionNode{
				{Cluster: "west", Node: "node1", Mode: identity.TunnelWireGuard, Session: true, Handshake: now.Add(-time.Minute), Received: 10, Transmitted: 20, MTU: 1390},
				{Cluster: "west", Node: "node2", Mode: identity.TunnelClosed, Why: "no key", MTU: 1390},
			},
		},
		drops: []api.BPFDrop{{Reason: "came without encryption", Direction: "ingress", Packets: 3, Bytes: 300}},
		now:   now,
	}, nil
}

func TestMetrics(t *testing.T) {
	w := httptest.NewRecorder()
	metricsHandler(testSnapshot).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	text := w.Body.String()
	for _, want := range []string{
		`causeway_info{cluster="east",device_kind="",encryption="all",node="node1",version="1"} 1`,
		`causeway_problems 1`,
		`causeway_dropped_packets_total{direction="ingress",reason="came without encryption"} 3`,
		`causeway_table_rows{status="done",table="tunnels"} 2`,
		`causeway_nodes{cluster="west",state="alive"} 1`,
		`causeway_peer_connected{cluster="west"} 1`,
		`causeway_path_mtu_bytes{cluster="west"} 1390`,
		`causeway_tunnel_mode{cluster="west",mode="closed",node="node2"} 1`,
		`causeway_tunnel_mode{cluster="west",mode="wireguard",node="node2"} 0`,
		`causeway_wireguard_handshake_age_seconds{cluster="west",node="node1"} 60`,
		`causeway_wireguard_received_bytes_total{cluster="west",node="node1"} 10`,
		`causeway_wireguard_device{device="causeway-wg0",kind="kernel"} 1`,
		`causeway_wireguard_key_age_seconds{device="causeway-wg0"} 3600`,
		`causeway_wireguard_rotations_total 3`,
		`causeway_wireguard_repairs_total{what="route"} 2`,
		`process_cpu_seconds_total`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is missing in\n%s", want, text)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("Prometheus' own rules: %v %v", problems, err)
	}
}

func TestMetricsThatCannotBeTakenAreAnError(t *testing.T) {
	w := httptest.NewRecorder()
	metricsHandler(func() (snapshot, error) { return snapshot{}, errors.New("no maps") }).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), "no maps") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

func TestMetricsAreServedWhereConfigured(t *testing.T) {
	l, err := listenMetrics("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenMetrics(l.Addr().String()); err == nil || !strings.Contains(err.Error(), "metrics.listen") {
		t.Errorf("a port that is taken: %v", err)
	}
	run(t, func(ctx context.Context) error { return serveMetrics(ctx, l, metricsHandler(testSnapshot)) })
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + l.Addr().(*net.TCPAddr).String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(body), "causeway_info") {
		t.Errorf("got %s (%v)", body, err)
	}
	if l, err := listenMetrics(""); l != nil || err != nil {
		t.Errorf("without a configuration: %v %v", l, err)
	}
}
