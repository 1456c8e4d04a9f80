package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

const walkWest = `{"peer":"west","check":{"name":"TCP","from":"east","to":"west","target":"172.29.2.11:7958/tcp","outcome":"ok","tookMs":1.2}}
{"peer":"west","check":{"name":"tunnel UDP","from":"east","to":"west","target":"172.29.2.11:4789/udp","outcome":"ok","tookMs":0.4}}
{"peer":"west","check":{"name":"tunnel UDP","from":"west","to":"east","target":"172.29.1.11:4789/udp","outcome":"failed","detail":"no echo came back","cause":"UDP 4789 is dropped on the way: open it","tookMs":3000}}
{"peer":"west","check":{"name":"path MTU","from":"west","to":"east","outcome":"skipped","detail":"the tunnel is broken"}}
{"peer":"west","verdict":"broken at tunnel UDP (west → east): no echo came back: UDP 4789 is dropped on the way; open it"}
`

func TestTroubleshootNamesWhatIsBroken(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/troubleshoot": walkWest + `{"peer":"far","check":{"name":"TCP","from":"east","to":"far","outcome":"ok","tookMs":1}}
{"peer":"far","ok":true}
`})
	got := cli(t, nil, "troubleshoot", "--socket", a.socket)
	want := `east → west
  ok         TCP              172.29.2.11:7958/tcp        1.2 ms
  ok         tunnel UDP       172.29.2.11:4789/udp        0.4 ms
west → east
  FAILED     tunnel UDP       172.29.1.11:4789/udp         3.0 s  no echo came back
             likely cause: UDP 4789 is dropped on the way: open it
  skipped    path MTU                                             the tunnel is broken
west: broken at tunnel UDP (west → east): no echo came back: UDP 4789 is dropped on the way; open it
east → far
  ok         TCP                                          1.0 ms
far: ok
`
	if got != (result{exitFailed, want, ""}) {
		t.Errorf("got code %d, stderr %q, stdout\n%s\nwant\n%s", got.code, got.err, got.out, want)
	}
	if got := cli(t, nil, "troubleshoot", "west", "-o", "json", "--socket", a.socket); got.code != exitFailed || strings.Count(got.out, "\n") != 7 {
		t.Errorf("got %+v", got)
	}
	if fmt.Sprint(a.asked) != `[POST /v1/troubleshoot {} POST /v1/troubleshoot {"peer":"west"}]` {
		t.Errorf("asked %q", a.asked)
	}
}

func TestTroubleshootExitCodes(t *testing.T) {
	for answer, want := range map[string]result{
		`{"peer":"west","verdict":"all is well","ok":true}`: {exitOK, "west: all is well\n", ""},
		``: {exitOK, "no peers: nothing to look at\n", ""},
		`{"peer":"west","check":{"name":"TCP","from":"east","to":"west","outcome":"ok"}}`: {exitFailed,
			"east → west\n  ok         TCP                                          0.0 ms\n", "error: there is no verdict on west: the agent ended too early; ask again\n"},
	} {
		a := newFakeAgent(t, map[string]string{"POST /v1/troubleshoot": answer})
		if got := cli(t, nil, "troubleshoot", "--socket", a.socket); got != want {
			t.Errorf("%s: got %+v, want %+v", answer, got, want)
		}
	}
	if got := cli(t, nil, "troubleshoot", "north", "--socket", newFakeAgent(t, nil).socket); got != (result{exitFailed, "", "error: there is no such thing\n"}) {
		t.Errorf("got %+v", got)
	}
}

func TestInterruptedTroubleshoot(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	socket := serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		cancel()
		<-r.Context().Done()
	}))
	var out, errs bytes.Buffer
	if code := run(ctx, testEnv(&out, &errs, nil), []string{"troubleshoot", "--socket", socket}); code != exitInterrupted || errs.String() != "error: interrupted\n" {
		t.Errorf("got code %d, stderr %q", code, errs.String())
	}
}

func TestTroubleshootSaysWhatItWaitsFor(t *testing.T) {
	var out bytes.Buffer
	v := &walkView{p: &printer{w: &out}, live: true}
	v.waiting(time.Second)
	v.last = "TCP (east → west)"
	v.waiting(6 * time.Second)
	if want := "  waiting    for the first check, 1.0s so far\n  waiting    for what comes after TCP (east → west), 6.0s so far\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}
