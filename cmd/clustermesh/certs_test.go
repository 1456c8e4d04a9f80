package main

import (
	"fmt"
	"strings"
	"testing"
)

const certsAnswer = `[
{"name":"authority","user":"east","issuer":"east","notBefore":"2025-06-01T11:00:00Z","notAfter":"2035-05-30T12:00:00Z","state":"valid"},
{"name":"agent","user":"agent","issuer":"east","notBefore":"2025-06-01T11:00:00Z","notAfter":"2025-08-30T12:00:00Z","renews":"2025-07-31T12:00:00Z","state":"valid"},
{"name":"peer west","user":"peer-east-1","issuer":"west","notAfter":"2025-06-11T12:00:00Z","renews":"2025-05-20T12:00:00Z","state":"expires soon","problem":"west does not answer"}`

func TestCerts(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/certs": certsAnswer + "]"})
	want := `NAME       USER         ISSUER  VALID UNTIL           LEFT   RENEWS  STATE
authority  east         east    2035-05-30 12:00 UTC  3650d  never   valid
agent      agent        east    2025-08-30 12:00 UTC  90d    in 60d  valid
peer west  peer-east-1  west    2025-06-11 12:00 UTC  10d    now     expires soon: west does not answer
`
	for _, args := range []string{"certs", "certs show"} {
		if got := cli(t, nil, append(strings.Fields(args), "--socket", a.socket)...); got != (result{exitOK, want, ""}) {
			t.Errorf("%s: got code %d, stderr %q, stdout\n%s\nwant\n%s", args, got.code, got.err, got.out, want)
		}
	}
	if got := cli(t, nil, "certs", "nonsense", "--socket", a.socket); got.code != exitNotAsked || !strings.Contains(got.err, `unknown command "nonsense"`) {
		t.Errorf("got %+v", got)
	}
	if got := cli(t, nil, "certs", "-o", "json", "--socket", a.socket); got.code != exitOK || !strings.Contains(got.out, `"name": "peer west"`) {
		t.Errorf("got %+v", got)
	}
}

func TestCertsThatAreNotValidExitWith1(t *testing.T) {
	for _, state := range []string{"expired", "not valid yet"} {
		a := newFakeAgent(t, map[string]string{"GET /v1/certs": certsAnswer + `,{"name":"peer far","notAfter":"2025-06-01T11:59:00Z","state":"` + state + `"}]`})
		got := cli(t, nil, "certs", "--socket", a.socket)
		if got.code != exitFailed || got.err != "" || !strings.Contains(fields(got.out), "peer far - - 2025-06-01 11:59 UTC nothing never "+state) {
			t.Errorf("got %+v", got)
		}
	}
}

func TestCertsRotate(t *testing.T) {
	for args, body := range map[string]string{"certs rotate": `{}`, "certs rotate agent": `{"name":"agent"}`, "certs rotate peer west": `{"name":"peer west"}`} {
		a := newFakeAgent(t, map[string]string{"POST /v1/certs": certsAnswer + "]"})
		got := cli(t, nil, append(strings.Fields(args), "--socket", a.socket)...)
		if got.code != exitOK || !strings.HasPrefix(got.out, "NAME ") || fmt.Sprint(a.asked) != "[POST /v1/certs "+body+"]" {
			t.Errorf("%s: got %+v, asked %q", args, got, a.asked)
		}
	}
	if got := cli(t, nil, "certs", "rotate", "--socket", newFakeAgent(t, nil).socket); got != (result{exitFailed, "", "error: there is no such thing\n"}) {
		t.Errorf("got %+v", got)
	}
}
