package testbed

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"causeway/agent"

	"sigs.k8s.io/yaml"
)

// Every node of a bed has the bed's key in a file of its own, which nobody else may read, and the key is nowhere else.
func TestGossipKeys(t *testing.T) {
	b := mustUp(t, Options{Nodes: 1})
	var keys [][]byte
	for _, cluster := range []string{"east", "west"} {
		doc, err := os.ReadFile(b.agentConfig(cluster, "node1"))
		if err != nil {
			t.Fatal(err)
		}
		var cfg agent.Config
		if err := yaml.UnmarshalStrict(doc, &cfg); err != nil {
			t.Fatal(err)
		}
		if want := b.path(cluster, "node1", "gossip.key"); cfg.Gossip.KeyFile != want || cfg.Gossip.Mesh != b.ID() {
			t.Errorf("%s gossips as %+v", cluster, cfg.Gossip)
		}
		fi, err := os.Stat(cfg.Gossip.KeyFile)
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Fatalf("mode %v, %v", fi.Mode(), err)
		}
		key, err := os.ReadFile(cfg.Gossip.KeyFile)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(keys[0])))
	if err != nil || len(raw) != 32 || !bytes.Equal(keys[0], keys[1]) {
		t.Errorf("keys %d bytes, alike: %v, %v", len(raw), bytes.Equal(keys[0], keys[1]), err)
	}
	wantSecret(t, b.Dir(), bytes.TrimSpace(keys[0]))
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
