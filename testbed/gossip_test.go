package testbed

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestGossipKeys: clusters that are joined have one gossip key. Every node has it in a file of its own, which nobody else may read, and it is
// nowhere else on the machine.
func TestGossipKeys(t *testing.T) {
	needRoot(t)
	program, err := realBinary()
	if err != nil {
		t.Fatal(err)
	}
	b := mustUp(t, Options{Nodes: 1, Binary: program})
	first := map[string]string{}
	for _, cluster := range []string{"east", "west"} {
		file := b.gossipKey(cluster, "node1")
		fi, err := os.Stat(file)
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Fatalf("%s: %v, %v", file, fi, err)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(line)); err == nil && len(raw) == 32 {
				first[cluster] = strings.TrimSpace(line)
				break
			}
		}
	}
	if first["east"] == "" || first["east"] != first["west"] {
		t.Error("the clusters do not encrypt with the same key")
	}
	wantSecret(t, b.Dir(), []byte(first["east"]))
}

// wantSecret looks for a key in the command lines and environments of all processes, and in every file of a bed but the nodes' key files.
func wantSecret(t *testing.T, dir string, key []byte) {
	t.Helper()
	var files []string
	for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ", dir + "/*", dir + "/*/*", dir + "/*/*/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	for _, file := range files {
		// A directory, or what is gone meanwhile, can't be read.
		if content, err := os.ReadFile(file); err == nil && bytes.Contains(content, key) && filepath.Base(file) != "gossip.key" {
			t.Errorf("%s shows the gossip key", file)
		}
	}
}
