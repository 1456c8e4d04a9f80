package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

func TestStatusShowsPeers(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/status": strings.TrimSuffix(statusOK, "}") + `,"peers":` + peersAnswer + "}"})
	got := cli(t, nil, "status", "--socket", a.socket)
	want := `west        https://172.29.2.2:2379  0        1        2           none       away: dial tcp: refused

peer west (ID 2): connected, joined 3m ago
  control plane    ok: etcd answers
  gossip           ok: 2 of 2 speakers
  data path out    ok: RTT 0.42 ms, 0% lost, last round trip 300ms ago, pod MTU 1450, as east/node1 measures it
  data path in     ok: RTT 0.50 ms, 12.5% lost, last round trip 400ms ago, pod MTU 1450, as west/node1 measures it
  sync lag         400ms
  clock            12ms ahead

peer far (ID 3): not connected, joined 1h0m ago
  - nothing answers at UDP 4789 of far/node1
  - no pod can be reached\x1b[31m
  control plane    broken: etcd is away
  gossip           ok: 1 of 1
  data path out    broken: no echo, no round trip yet
  data path in     unknown
  sync lag         nothing yet
  clock            5m behind
  entries          250000 accepted, of at most 250000; 7 more are left out; 2 refused

peer gone (ID 4): left 10m ago
  - gone has disconnected this cluster

TABLE `
	if got.code != exitOK || !strings.Contains(got.out, want) {
		t.Errorf("got code %d, stdout\n%s\nwant in it\n%s", got.code, got.out, want)
	}
}

// waitStatuses answers with one after the other, and stays at the last one.
func waitStatuses(t *testing.T, answers ...string) (socket string) {
	var asked atomic.Int32
	return serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := min(int(asked.Add(1)), len(answers)) - 1
		io.WriteString(w, answers[n])
	}))
}

const (
	statusIll     = `{"ok":false,"problems":["store west is away"],"cluster":"east","node":"node1"}`
	statusJoining = `{"ok":true,"cluster":"east","node":"node1","peers":[{"name":"gone","state":"left"},{"name":"west","state":"joining","why":["no echo yet"]}]}`
	statusWell    = `{"ok":true,"cluster":"east","node":"node1","peers":[{"name":"gone","state":"left"},{"name":"west","state":"connected"}]}`
)

func TestStatusWaitsUntilAllIsWell(t *testing.T) {
	socket := waitStatuses(t, statusIll, statusJoining, statusWell)
	var out, errs bytes.Buffer
	e := testEnv(&out, &errs, nil)
	e.terminalErr = true
	code := run(t.Context(), e, []string{"status", "--wait", "30s", "--socket", socket})
	if code != exitOK || !strings.HasPrefix(out.String(), "east/node1: ok\n") {
		t.Errorf("got code %d, stdout\n%s", code, out.String())
	}
	lines := strings.Split(errs.String(), "\n")
	if len(lines) != 3 || !strings.HasSuffix(lines[0], "s  not well yet: store west is away") || !strings.HasSuffix(lines[1], "s  not well yet: peer west is joining: no echo yet") {
		t.Errorf("got stderr\n%s", errs.String())
	}
	if got := cli(t, nil, "status", "--wait", "30s", "--socket", waitStatuses(t, statusJoining, statusWell)); got.code != exitOK || got.err != "" {
		t.Errorf("got %+v", got)
	}
}

func TestStatusWaitsNoLongerThanItMay(t *testing.T) {
	for answer, want := range map[string]string{
		statusIll:     "error: not well within 300ms: store west is away\n",
		statusJoining: "error: not well within 300ms: peer west is joining: no echo yet\n",
	} {
		got := cli(t, nil, "status", "--wait", "300ms", "--socket", waitStatuses(t, answer))
		if got.code != exitFailed || got.err != want || !strings.HasPrefix(got.out, "east/node1: ") {
			t.Errorf("got %+v, want %q", got, want)
		}
	}
	for _, tc := range []struct {
		args string
		code int
		err  string
	}{
		{"--wait 300ms --socket /does/not/exist", exitNotAsked, "no agent is running at /does/not/exist"},
		{"--wait 30s --socket " + newFakeAgent(t, nil).socket, exitFailed, "there is no such thing"}, // at once
		{"--wait 30s --watch --socket x", exitNotAsked, "[wait watch]"},
		{"--wait nonsense", exitNotAsked, "invalid duration"},
	} {
		if got := cli(t, nil, append([]string{"status"}, strings.Fields(tc.args)...)...); got.code != tc.code || got.out != "" || !strings.Contains(got.err, tc.err) {
			t.Errorf("%s: got %+v", tc.args, got)
		}
	}
}

func TestInterruptedWhileStatusWaits(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	socket := serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cancel()
		io.WriteString(w, statusIll)
	}))
	var out, errs bytes.Buffer
	if code := run(ctx, testEnv(&out, &errs, nil), []string{"status", "--wait", "30s", "--socket", socket}); code != exitInterrupted || out.Len() > 0 || errs.String() != "error: interrupted while waiting\n" {
		t.Errorf("got code %d, stdout %q, stderr %q", code, out.String(), errs.String())
	}
}
