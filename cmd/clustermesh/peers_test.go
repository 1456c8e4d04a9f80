package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"causeway/agent/api"
)

const peersAnswer = `[
{"name":"west","id":2,"state":"connected","why":[],"since":"2025-06-01T11:57:00Z","control":{"ok":true,"detail":"etcd answers"},"gossip":{"ok":true,"detail":"2 of 2 speakers"},
"out":{"ok":true,"known":true,"lastMs":300,"rttMs":0.42,"loss":0,"mtu":1450,"from":"east/node1"},"in":{"ok":true,"known":true,"lastMs":400,"rttMs":0.5,"loss":12.5,"mtu":1450,"from":"west/node1"},
"syncLagMs":400,"clockSkewMs":12,"certExpires":"2025-08-30T12:00:00Z","peerCertExpires":"2025-08-29T12:00:00Z","storeEndpoints":["https://172.29.2.2:2379"],
"endpoints":["172.29.2.11:7958","172.29.2.12:7958"],"nodes":2,"entries":12,"quota":250000,"version":"v1"},
{"name":"far","id":3,"state":"not connected","why":["nothing answers at UDP 4789 of far/node1","no pod can be reached\u001b[31m"],"since":"2025-06-01T11:00:00Z",
"control":{"ok":false,"detail":"etcd is away"},"gossip":{"ok":true,"detail":"1 of 1"},"out":{"known":true,"lastMs":-1,"loss":100,"problem":"no echo"},"in":{"known":false,"lastMs":-1},
"syncLagMs":-1,"clockSkewMs":-300000,"certExpires":"2025-08-30T12:00:00Z","peerCertExpires":"0001-01-01T00:00:00Z","storeEndpoints":[],"endpoints":[],"entries":250000,"quota":250000,"excess":7,"refused":2},
{"name":"gone","id":4,"state":"left","why":["gone has disconnected this cluster"],"since":"2025-06-01T11:50:00Z"}]`

func TestPeers(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/peers": peersAnswer})
	got := cli(t, nil, "peers", "--socket", a.socket)
	want := `PEER  ID  STATE          CONTROL  GOSSIP  OUT           IN               MTU   SYNC LAG     SINCE
west  2   connected      ok       ok      0.42 ms / 0%  0.50 ms / 12.5%  1450  400ms        3m ago
far   3   not connected  broken   ok      broken        unknown          -     nothing yet  1h0m ago
gone  4   left           -        -       -             -                -     -            10m ago
  far: nothing answers at UDP 4789 of far/node1
  far: no pod can be reached\x1b[31m
  gone: gone has disconnected this cluster
`
	if got != (result{exitOK, want, ""}) {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
	empty := newFakeAgent(t, map[string]string{"GET /v1/peers": "[]"})
	if got := cli(t, nil, "peers", "--socket", empty.socket); got.code != exitOK || !strings.HasPrefix(got.out, "no peers; to join another cluster") {
		t.Errorf("got %+v", got)
	}
}

func TestOnePeerInDetail(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/peers": peersAnswer})
	for name, want := range map[string]string{
		"west": `west (ID 2): connected, joined 3m ago
  control plane    ok: etcd answers
  gossip           ok: 2 of 2 speakers
  data path out    ok: RTT 0.42 ms, 0% lost, last round trip 300ms ago, pod MTU 1450, as east/node1 measures it
  data path in     ok: RTT 0.50 ms, 12.5% lost, last round trip 400ms ago, pod MTU 1450, as west/node1 measures it
  sync lag         400ms
  clock            12ms ahead
  entries          12 accepted, of at most 250000
  nodes            2
  our certificate  until 2025-08-30 12:00 UTC (in 90d)
  its certificate  until 2025-08-29 12:00 UTC (in 89d)
  its store        https://172.29.2.2:2379
  its peering API  172.29.2.11:7958, 172.29.2.12:7958
  its version      v1
`,
		"far": `far (ID 3): not connected, joined 1h0m ago
  - nothing answers at UDP 4789 of far/node1
  - no pod can be reached\x1b[31m
  control plane    broken: etcd is away
  gossip           ok: 1 of 1
  data path out    broken: no echo, no round trip yet
  data path in     unknown
  sync lag         nothing yet
  clock            5m behind
  entries          250000 accepted, of at most 250000; 7 more are left out; 2 refused
  nodes            0
  our certificate  until 2025-08-30 12:00 UTC (in 90d)
  its certificate  none
  its store        -
  its peering API  -
  its version      -
`,
		"gone": "gone (ID 4): left 10m ago\n  - gone has disconnected this cluster\n",
	} {
		if got := cli(t, nil, "peers", name, "--socket", a.socket); got != (result{exitOK, want, ""}) {
			t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
		}
	}
	for _, args := range [][]string{{"peers", "north"}, {"peers", "north", "--watch"}} {
		if got := cli(t, nil, append(args, "--socket", a.socket)...); got != (result{exitFailed, "", "error: there is no peer north: there are west, far, gone\n"}) {
			t.Errorf("got %+v", got)
		}
	}
}

func TestPeersAsJSONAndWatched(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/peers": peersAnswer})
	var peers []api.Peer
	got := cli(t, nil, "peers", "-o", "json", "--socket", a.socket)
	if err := json.Unmarshal([]byte(got.out), &peers); err != nil || len(peers) != 3 || peers[1].Excess != 7 {
		t.Errorf("got %+v, %v", got, err)
	}
	var peer api.Peer
	got = cli(t, nil, "peers", "west", "-o", "json", "--socket", a.socket)
	if err := json.Unmarshal([]byte(got.out), &peer); err != nil || peer.Name != "west" || peer.Out.MTU != 1450 {
		t.Errorf("got %+v, %v", got, err)
	}
	states := newFakeAgent(t, map[string]string{"GET /v1/peers": `[{"name":"west","state":"joining"}]` + "\n" + `[{"name":"west","state":"connected"}]` + "\n"})
	got = cli(t, nil, "peers", "west", "--watch", "-o", "json", "--socket", states.socket)
	if strings.Count(got.out, "\n") != 2 || !strings.Contains(got.out, `"joining"`) || !strings.Contains(got.out, `"connected"`) || got.code != exitFailed {
		t.Errorf("got %+v", got)
	}
}

func TestPeersThatAreNotWellStandOut(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/peers": peersAnswer})
	var out, errs bytes.Buffer
	e := testEnv(&out, &errs, nil)
	e.terminal = true
	run(t.Context(), e, []string{"peers", "--socket", a.socket})
	for _, want := range []string{red + "not connected" + plain + "  broken", yellow + "left         " + plain, "  connected      ok"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("there is no %q in\n%s", want, out.String())
		}
	}
}

func TestMTUOfBothDirections(t *testing.T) {
	for want, mtu := range map[string][2]int{"": {0, 0}, "1450": {1450, 1450}, "1400": {0, 1400}, "1390": {1390, 0}, "1450 / 1350": {1450, 1350}} {
		if got := mtuCell(api.Peer{Out: api.Path{MTU: mtu[0]}, In: api.Path{MTU: mtu[1]}}); got != want {
			t.Errorf("%v: got %q, want %q", mtu, got, want)
		}
	}
}

// TestNarrowedPathIsNoProblem: the peer is connected, and what has changed lately is said below.
func TestNarrowedPathIsNoProblem(t *testing.T) {
	for _, isNew := range []bool{true, false} {
		peer := api.Peer{Name: "west", ID: 2, State: peerConnected, Out: api.Path{
			OK: true, Known: true, MTU: 1290, Narrowed: true, Note: "path MTU: kept to 1290", NoteIsNew: isNew,
		}, In: api.Path{OK: true, Known: true, MTU: 1390}}
		var out strings.Builder
		printPeers(&printer{w: &out}, []api.Peer{peer})
		if !strings.Contains(out.String(), "1290 narrowed / 1390") || strings.Contains(out.String(), "\n  west: path MTU: kept to 1290\n") != isNew {
			t.Errorf("new %v:\n%s", isNew, out.String())
		}
		if text := pathText(&printer{w: &out}, peer.Out); !strings.Contains(text, "pod MTU 1290 (narrowed), path MTU: kept to 1290") || !strings.HasPrefix(text, "ok") {
			t.Errorf("got %q", text)
		}
	}
}

func TestDisconnect(t *testing.T) {
	for answer, want := range map[string]string{
		`{"cluster":"west","known":true,"told":true,"tookMs":312}`:                                "disconnected from west in 0.31s; it has been told\n",
		`{"cluster":"west","known":true,"reason":"no answer from 172.29.2.11:7958","tookMs":900}`: "disconnected from west in 0.90s; it could not be told (no answer from 172.29.2.11:7958): it finds out when it asks next\n",
		`{"cluster":"west","known":true,"tookMs":20}`:                                             "disconnected from west in 0.02s; it was not told: it finds out when it asks next\n",
		`{"cluster":"west"}`: "there is no peer west: nothing to do\n",
	} {
		a := newFakeAgent(t, map[string]string{"DELETE /v1/peers/west": answer})
		if got := cli(t, nil, "disconnect", "west", "--force", "--socket", a.socket); got != (result{exitOK, want, ""}) || a.asked[0] != "DELETE /v1/peers/west?force=true " {
			t.Errorf("got %+v, asked %q, want %q", got, a.asked, want)
		}
		if got := cli(t, nil, "disconnect", "west", "-o", "json", "--socket", a.socket); !strings.Contains(got.out, `"cluster": "west"`) || a.asked[1] != "DELETE /v1/peers/west " {
			t.Errorf("got %+v, asked %q", got, a.asked)
		}
	}
	if got := cli(t, nil, "disconnect"); got.code != exitNotAsked {
		t.Errorf("got %+v", got)
	}
}
