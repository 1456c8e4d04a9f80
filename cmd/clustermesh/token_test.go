package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"causeway/agent/api"
)

const (
	tokenSecret = "cm1.c2VjcmV0c2VjcmV0c2VjcmV0"
	tokenAnswer = `{"token":"` + tokenSecret + `","id":"5f0c9a17","expires":"2025-06-01T12:15:00Z","cluster":"west","endpoints":["172.29.2.11:7958"]}`
)

func TestTokenCreatePrintsTheTokenAlone(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/tokens": tokenAnswer})
	got := cli(t, nil, "token", "create", "--socket", a.socket)
	if got != (result{exitOK, tokenSecret + "\n", ""}) {
		t.Errorf("got %+v", got)
	}
	cli(t, nil, "token", "create", "--ttl", "1h", "--isolated", "--socket", a.socket)
	if strings.Join(a.asked, "\n") != `POST /v1/tokens {"ttl":900}`+"\n"+`POST /v1/tokens {"ttl":3600,"isolated":true}` {
		t.Errorf("asked %q", a.asked)
	}
}

func TestTokenCreateTellsAPersonWhatToDoWithIt(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/tokens": tokenAnswer})
	var out, errs bytes.Buffer
	e := testEnv(&out, &errs, nil)
	e.terminalErr = true
	code := run(t.Context(), e, []string{"token", "create", "--socket", a.socket})
	until := time.Date(2025, 6, 1, 12, 15, 0, 0, time.UTC).Local().Format(time.TimeOnly)
	want := "To join west, type in the other cluster, with the line below for TOKEN:\n  clustermesh connect TOKEN\nIt can be used once, until " + until + " (15m from now).\n"
	if code != exitOK || out.String() != tokenSecret+"\n" || errs.String() != want {
		t.Errorf("got code %d, stdout %q, stderr\n%s\nwant\n%s", code, out.String(), errs.String(), want)
	}
}

func TestTokenCreateAsJSONIsTheAPI(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"POST /v1/tokens": tokenAnswer})
	var token api.Token
	got := cli(t, nil, "token", "create", "-o", "json", "--socket", a.socket)
	if err := json.Unmarshal([]byte(got.out), &token); err != nil || token.Text != tokenSecret || token.ID != "5f0c9a17" || got.err != "" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestTokenListAndDelete(t *testing.T) {
	a := newFakeAgent(t, map[string]string{
		"GET /v1/tokens": `[
{"id":"5f0c9a17","created":"2025-06-01T11:57:00Z","expires":"2025-06-01T12:12:00Z","node":"node1","state":"open","isolated":true,"for":"far"},
{"id":"77aa0001","created":"2025-06-01T11:00:00Z","expires":"2025-06-01T11:15:00Z","node":"node2","state":"used","usedBy":"east","usedAt":"2025-06-01T11:01:00Z"}]`,
		"DELETE /v1/tokens/5f0c9a17": "",
	})
	got := cli(t, nil, "token", "list", "--socket", a.socket)
	want := `ID        STATE                    CREATED   EXPIRES  BY     USED BY
5f0c9a17  open, isolated, for far  3m ago    in 12m   node1  -
77aa0001  used                     1h0m ago  45m ago  node2  east 59m ago
`
	if got != (result{exitOK, want, ""}) {
		t.Errorf("got %+v\n%s\nwant\n%s", got, got.out, want)
	}
	got = cli(t, nil, "token", "delete", "5f0c9a17", "--socket", a.socket)
	if got != (result{exitOK, "token 5f0c9a17 deleted: nobody can join with it any more\n", ""}) || len(a.asked) != 1 {
		t.Errorf("got %+v, asked %q", got, a.asked)
	}
	if got = cli(t, nil, "token", "delete", "other", "--socket", a.socket); got != (result{exitFailed, "", "error: there is no such thing\n"}) {
		t.Errorf("got %+v", got)
	}
}

// Whatever somebody does with a token by mistake, it doesn't get into what may be logged.
func TestTokensAreNotInErrors(t *testing.T) {
	a := newFakeAgent(t, nil)
	for _, args := range [][]string{
		{tokenSecret},
		{"token", tokenSecret},
		{"token", "list", tokenSecret},
		{"token", "delete", tokenSecret},
		{"connect", tokenSecret, tokenSecret},
		{"connect", tokenSecret, "--nonsense"},
		{"connect", tokenSecret, "--socket", "/does/not/exist"},
		{"connect", tokenSecret, "--timeout", "0s"},
	} {
		if len(args) < 4 {
			args = append(args, "--socket", a.socket)
		}
		got := cli(t, nil, args...)
		if got.code != exitNotAsked || got.out != "" || !strings.HasPrefix(got.err, "error: ") || strings.Contains(got.err, "c2Vj") {
			t.Errorf("%q: got %+v", args, got)
		}
	}
}
