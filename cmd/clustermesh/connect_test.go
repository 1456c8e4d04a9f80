package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"causeway/agent/api"
)

const connectOK = `{"stage":"preflight","peer":"west","check":{"name":"TCP","from":"east","to":"west","target":"172.29.2.11:7958/tcp","outcome":"ok","tookMs":1.21},"atMs":12}
{"stage":"preflight","peer":"west","check":{"name":"gossip UDP","from":"west","to":"east","outcome":"skipped","detail":"east does not gossip"},"atMs":20}
{"stage":"plan","peer":"west","text":"west, ID 2, reads what east exports","atMs":31}
{"stage":"done","peer":"west","atMs":2090}
`

func TestConnectShowsWhatHappens(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/connect": connectOK})
	got := cli(t, nil, "connect", tokenSecret, "--isolated", "--socket", a.socket)
	want := `   0.01s  ok         east → west    TCP              172.29.2.11:7958/tcp        1.2 ms
   0.02s  skipped    west → east    gossip UDP                                           east does not gossip
   0.03s  plan       west, ID 2, reads what east exports
connected with west in 2.1s
`
	if got != (result{exitOK, want, ""}) {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
	if fmt.Sprint(a.asked) != `[POST /v1/connect {"token":"`+tokenSecret+`","isolated":true}]` {
		t.Errorf("asked %q", a.asked)
	}
}

func TestConnectEndsWithWhatTheAgentSaysOfIt(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/connect": `{"stage":"done","peer":"west","text":"connected with west (ID 2) in 2.1s","atMs":2090}`})
	if got := cli(t, nil, "connect", tokenSecret, "--socket", a.socket); got != (result{exitOK, "connected with west (ID 2) in 2.1s\n", ""}) {
		t.Errorf("got %+v", got)
	}
}

func TestConnectThatFailsNamesTheCause(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/connect": `{"stage":"verify","peer":"west","atMs":3010,"check":{"name":"tunnel UDP","from":"west","to":"east","target":"172.29.1.11:4789/udp",` +
		`"outcome":"failed","detail":"no echo came back","cause":"UDP 4789 is dropped: open it","tookMs":3000}}
{"stage":"undo","text":"nothing of ` + tokenSecret + ` is left","atMs":3100}
{"stage":"undo","atMs":3200,"error":"not connected: tunnel UDP (west → east) fails for ` + tokenSecret + `"}
`})
	got := cli(t, nil, "connect", tokenSecret, "--socket", a.socket)
	want := `   3.01s  FAILED     west → east    tunnel UDP       172.29.1.11:4789/udp         3.0 s  no echo came back
                    likely cause: UDP 4789 is dropped: open it
   3.10s  undo       nothing of (a token) is left
`
	if got != (result{exitFailed, want, "error: not connected: tunnel UDP (west → east) fails for (a token)\n"}) {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
}

func TestConnectThatIsRefused(t *testing.T) {
	for answer, want := range map[string]string{
		`{"stage":"preflight","atMs":2,"error":"the token has expired: make a new one"}`: "the token has expired",
		`{"stage":"join","atMs":2}`:             "stopped in the middle of connecting",
		`{"stage":"done","atMs":2,"error":"x"}`: "error: x",
	} {
		a := newFakeAgent(t, map[string]string{"POST /v1/connect": answer})
		if got := cli(t, nil, "connect", tokenSecret, "--socket", a.socket); got.code != exitFailed || got.out != "" || !strings.Contains(got.err, want) {
			t.Errorf("%s: got %+v", answer, got)
		}
	}
	a := newFakeAgent(t, nil)
	if got := cli(t, nil, "connect", tokenSecret, "--socket", a.socket); got != (result{exitFailed, "", "error: there is no such thing\n"}) {
		t.Errorf("got %+v", got)
	}
}

func TestConnectReadsTheTokenFromStandardInput(t *testing.T) {
	for _, tc := range []struct {
		args     []string
		stdin    string
		terminal bool
		code     int
		err      string
	}{
		{nil, tokenSecret + "\n", false, exitOK, ""},
		{nil, "  " + tokenSecret, false, exitOK, ""},
		{[]string{"-"}, tokenSecret + "\r\nand more\n", false, exitOK, ""},
		{[]string{"-"}, tokenSecret + "\n", true, exitOK, "token: "},
		{nil, tokenSecret + "\n", true, exitNotAsked, "error: no token given: make one in the other cluster"},
		{nil, "", false, exitNotAsked, "error: no token on standard input"},
		{[]string{"-"}, "\n" + tokenSecret, false, exitNotAsked, "error: no token on standard input"},
	} {
		a := newFakeAgent(t, map[string]string{"POST /v1/connect": connectOK})
		var out, errs bytes.Buffer
		e := testEnv(&out, &errs, nil)
		e.in, e.terminalIn = strings.NewReader(tc.stdin), tc.terminal
		code := run(t.Context(), e, append([]string{"connect", "--socket", a.socket}, tc.args...))
		if code != tc.code || !strings.HasPrefix(errs.String(), tc.err) || strings.Contains(out.String()+errs.String(), tokenSecret) {
			t.Errorf("%+v: got code %d, stderr %q, stdout\n%s", tc, code, errs.String(), out.String())
		}
		if asked := `[POST /v1/connect {"token":"` + tokenSecret + `"}]`; (code == exitOK) != (fmt.Sprint(a.asked) == asked) {
			t.Errorf("%+v: asked %q", tc, a.asked)
		}
	}
}

func TestConnectAsJSONIsALineForEachEvent(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/connect": connectOK})
	got := cli(t, nil, "connect", tokenSecret, "-o", "json", "--socket", a.socket)
	lines := strings.Split(strings.TrimSpace(got.out), "\n")
	var last api.ConnectEvent
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || len(lines) != 4 || last.Stage != api.StageDone || got.code != exitOK {
		t.Errorf("got %+v, %v", got, err)
	}
	if yaml := cli(t, nil, "connect", tokenSecret, "-o", "yaml", "--socket", a.socket); strings.Count(yaml.out, "---\n") != 4 {
		t.Errorf("got %+v", yaml)
	}
}

// stuckConnect begins to connect, and does not get on. ended closes when whoever asked has left.
func stuckConnect(t *testing.T) (socket string, begun, ended chan struct{}) {
	begun, ended = make(chan struct{}), make(chan struct{})
	return serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		_, _ = io.Copy(io.Discard, r.Body)
		io.WriteString(w, `{"stage":"verify","peer":"west","text":"packets are sent","atMs":5}`+"\n")
		w.(http.Flusher).Flush()
		close(begun)
		<-r.Context().Done()
	})), begun, ended
}

func TestInterruptedConnectHasTheAgentStop(t *testing.T) {
	socket, begun, ended := stuckConnect(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-begun; cancel() }()
	var out, errs bytes.Buffer
	code := run(ctx, testEnv(&out, &errs, nil), []string{"connect", tokenSecret, "--socket", socket})
	if code != exitInterrupted || errs.String() != "error: interrupted; what was begun is taken back\n" {
		t.Errorf("got code %d, stderr %q", code, errs.String())
	}
	<-ended
}

func TestConnectGivesUpInTime(t *testing.T) {
	socket, _, ended := stuckConnect(t)
	got := cli(t, nil, "connect", tokenSecret, "--timeout", "100ms", "--socket", socket)
	if got.code != exitFailed || got.err != "error: not connected within 100ms, while waiting for packets to pass in both directions; what was begun is taken back\n" {
		t.Errorf("got %+v", got)
	}
	<-ended
}

func TestInterruptedWhileTheTokenIsReadEnds(t *testing.T) {
	never, end := io.Pipe()
	defer end.Close() // or its reader would outlive the test
	a := newFakeAgent(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs bytes.Buffer
	e := testEnv(&out, &errs, nil)
	e.in = never
	if code := run(ctx, e, []string{"connect", "--socket", a.socket}); code != exitInterrupted || len(a.asked) > 0 || !strings.Contains(errs.String(), "interrupted") {
		t.Errorf("got code %d, stderr %q, asked %q", code, errs.String(), a.asked)
	}
}

func TestConnectSaysWhatItWaitsForOnATerminal(t *testing.T) {
	var out bytes.Buffer
	v := &connectView{p: &printer{w: &out}, live: true, token: tokenSecret, last: api.ConnectEvent{Stage: "join"}}
	v.waiting(1500 * time.Millisecond)
	if want := "   1.50s  waiting    exchanging trust\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	out.Reset()
	v.live = false
	if v.waiting(time.Second); out.Len() > 0 {
		t.Errorf("got %q on a pipe", out.String())
	}
}
