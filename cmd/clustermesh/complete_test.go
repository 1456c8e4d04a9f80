package main

import (
	"bytes"
	"context"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if got := cli(t, nil, "completion", shell); got.code != exitOK || got.err != "" || !strings.Contains(got.out, "clustermesh") {
			t.Errorf("%s: got code %d, stderr %q", shell, got.code, got.err)
		}
	}
}

func TestCompletion(t *testing.T) {
	a := newFakeAgent(t, map[string]string{
		"GET /v1/peers":  peersAnswer,
		"GET /v1/tokens": `[{"id":"5f0c9a17","state":"open"}]`,
		"GET /v1/certs":  certsAnswer + "]",
	})
	broken := newFakeAgent(t, nil)
	const peers = "west\tconnected\nfar\tnot connected\ngone\tleft\n:4\n"
	for args, want := range map[string]string{
		"disconnect --socket " + a.socket + " ":        peers,
		"peers --socket " + a.socket + " ":             peers,
		"troubleshoot --socket " + a.socket + " ":      peers,
		"troubleshoot west --socket " + a.socket + " ": ":4\n",
		"token delete --socket " + a.socket + " ":      "5f0c9a17\topen\n:4\n",
		"certs rotate --socket " + a.socket + " a":     "authority\tvalid\nagent\tvalid\n:4\n",
		"peers --node ":                         "east/node1\n:4\n",
		"peers -o ":                             "table\njson\nyaml\n:4\n",
		"keyring list -o ":                      "table\njson\nyaml\n:4\n",
		"connect ":                              ":4\n",
		"peers --socket /does/not/exist ":       ":4\n",
		"peers --node west/node1 ":              ":4\n",
		"peers --socket " + broken.socket + " ": ":4\n",
	} {
		words := strings.Split(args, " ")
		got := cli(t, nil, append([]string{"__complete"}, words...)...)
		if args == "certs rotate --socket "+a.socket+" a" {
			got.out = strings.ReplaceAll(got.out, "peer west\texpires soon\n", "") // a shell leaves out what does not begin so
		}
		if got.code != exitOK || got.out != want {
			t.Errorf("%q: got %+v, want %q", args, got, want)
		}
	}
}

// An agent that does not answer must not hold up the shell.
func TestCompletionDoesNotWaitForLong(t *testing.T) {
	socket := serveAgent(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // much more than it may take
	defer cancel()
	var out, errs bytes.Buffer
	code := run(ctx, testEnv(&out, &errs, nil), []string{"__complete", "peers", "--socket", socket, ""})
	if code != exitOK || out.String() != ":4\n" || ctx.Err() != nil {
		t.Errorf("got code %d, %q, %v", code, out.String(), ctx.Err())
	}
}
