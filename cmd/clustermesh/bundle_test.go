package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBundleIsAPrivateFile(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/bundle": "a tar", "GET /v1/status": statusOK})
	t.Chdir(t.TempDir())
	const name = "causeway-east-node1-20250601T120000Z.tar.gz"
	got := cli(t, nil, "bundle", "--socket", a.socket)
	if got != (result{exitOK, name + ": 5 bytes\n", ""}) {
		t.Errorf("got %+v", got)
	}
	there, err := os.Stat(name)
	if err != nil || there.Mode() != 0o600 {
		t.Fatalf("got %v, %v", there, err)
	}
	onlyFiles(t, ".", name)
	if got = cli(t, nil, "bundle", "--socket", a.socket); got.code != exitFailed || !strings.Contains(got.err, name+" is there already") {
		t.Errorf("got %+v", got)
	}
	a.answers["GET /v1/bundle"] = "another"
	got = cli(t, nil, "bundle", "--output", name, "--force", "--socket", a.socket)
	if text, err := os.ReadFile(name); got.code != exitOK || string(text) != "another" {
		t.Errorf("got %+v, %q, %v", got, text, err)
	}
}

// onlyFiles fails if anything else is in a directory.
func onlyFiles(t *testing.T, dir string, names ...string) {
	t.Helper()
	var got []string
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if err != nil || strings.Join(got, " ") != strings.Join(names, " ") {
		t.Errorf("got files %q, %v, want %q", got, err, names)
	}
}

func TestBundleOfANodeThatCannotSayWhoItIs(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/bundle": "a tar"})
	t.Chdir(t.TempDir())
	if got := cli(t, nil, "bundle", "--socket", a.socket); got != (result{exitOK, "causeway-node-20250601T120000Z.tar.gz: 5 bytes\n", ""}) {
		t.Errorf("got %+v", got)
	}
	a.answers["GET /v1/status"] = `{"cluster":"../..","node":"/etc"}`
	if got := cli(t, nil, "bundle", "--socket", a.socket); got.code != exitOK || strings.Contains(got.out, "/") {
		t.Errorf("got %+v", got)
	}
}

func TestBundleToStandardOutput(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/bundle": "a tar"})
	if got := cli(t, nil, "bundle", "--output", "-", "--socket", a.socket); got != (result{exitOK, "a tar", ""}) {
		t.Errorf("got %+v", got)
	}
	var out, errs bytes.Buffer
	e := testEnv(&out, &errs, nil)
	e.terminal = true
	if code := run(t.Context(), e, []string{"bundle", "--output", "-", "--socket", a.socket}); code != exitNotAsked || out.Len() > 0 || !strings.Contains(errs.String(), "on the terminal") {
		t.Errorf("got code %d, stdout %q, stderr %q", code, out.String(), errs.String())
	}
}

func TestBundleThatFailsLeavesNothing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	socket := serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half a tar")
		w.(http.Flusher).Flush()
		if r.Header.Get("Interrupt") == "" && ctx.Err() == nil {
			panic(http.ErrAbortHandler)
		}
	}))
	dir := t.TempDir()
	file := filepath.Join(dir, "b.tar.gz")
	if got := cli(t, nil, "bundle", "--output", file, "--socket", socket); got.code != exitFailed || !strings.Contains(got.err, "ended while it was sending the bundle") {
		t.Errorf("got %+v", got)
	}
	onlyFiles(t, dir)
	cancel()
	var out, errs bytes.Buffer
	if code := run(ctx, testEnv(&out, &errs, nil), []string{"bundle", "--output", file, "--socket", socket}); code != exitInterrupted || !strings.Contains(errs.String(), "interrupted") {
		t.Errorf("got code %d, stderr %q", code, errs.String())
	}
	onlyFiles(t, dir)
	// With --force, what was there stays until the new one is complete.
	if err := os.WriteFile(file, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	cli(t, nil, "bundle", "--output", file, "--force", "--socket", filepath.Join(dir, "none"))
	if text, _ := os.ReadFile(file); string(text) != "old" {
		t.Errorf("got %q", text)
	}
	onlyFiles(t, dir, "b.tar.gz")
	if got := cli(t, nil, "bundle", "--output", dir, "--force", "--socket", socket); got.code != exitFailed || !strings.Contains(got.err, "no file") {
		t.Errorf("got %+v", got)
	}
}

func TestBundleShowsItsProgressOnATerminal(t *testing.T) {
	a := newFakeAgent(t, map[string]string{"GET /v1/bundle": strings.Repeat("a tar", 10<<10)})
	var out, errs bytes.Buffer
	e := testEnv(&out, &errs, nil)
	e.terminalErr = true
	code := run(t.Context(), e, []string{"bundle", "--output", filepath.Join(t.TempDir(), "b"), "--socket", a.socket})
	if code != exitOK || !strings.Contains(errs.String(), " so far") || !strings.HasSuffix(errs.String(), "\r\x1b[K") || !strings.HasSuffix(out.String(), ": 50 KiB\n") {
		t.Errorf("got code %d, stdout %q, stderr %q", code, out.String(), errs.String())
	}
}
