package testbed

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"causeway/agent/api"
)

// untar returns the files of a bundle, by their names without the first directory.
func untar(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	packed, err := gzip.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for entries := tar.NewReader(packed); ; {
		header, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		_, name, _ := strings.Cut(header.Name, "/")
		if files[name], err = io.ReadAll(entries); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBundleHoldsNoSecret compares a bundle with every secret that a bed has: private keys, gossip keys, a token.
func TestBundleHoldsNoSecret(t *testing.T) {
	m := newUnconnected(t, 1, "west", "east")
	m.connect("west", "east")
	client := m.bed.Client("east", "node1")
	defer client.Close()
	token, err := client.CreateToken(t.Context(), api.TokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var bundle bytes.Buffer
	if err := client.Bundle(t.Context(), &bundle); err != nil {
		t.Fatal(err)
	}
	files := untar(t, &bundle)
	for _, want := range []string{"status.json", "peers.json", "tables/addresses.json", "maps/lb.json", "metrics.json", "log.txt", "config.json"} {
		if len(files[want]) == 0 {
			t.Errorf("the bundle has no %s", want)
		}
	}
	for what, secret := range bedSecrets(t, m.bed, token.Text) {
		for name, data := range files {
			if bytes.Contains(data, []byte(secret)) {
				t.Errorf("%s has %s in it", name, what)
			}
		}
	}
}

// bedSecrets returns a line of every private key that is in a file of the bed, and the token's.
func bedSecrets(t *testing.T, b *Bed, token string) map[string]string {
	t.Helper()
	secrets := map[string]string{"the token": strings.TrimPrefix(token, "cm1.")[40:80]}
	err := filepath.WalkDir(b.Dir(), func(path string, d os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".key") && !strings.HasSuffix(path, ".keys") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(data)) {
			if line = strings.TrimSpace(line); len(line) > 32 && !strings.HasPrefix(line, "-") && !strings.HasPrefix(line, "#") {
				secrets[path] = line
				break
			}
		}
		if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	})
	if err != nil || len(secrets) < 6 {
		t.Fatalf("found %d secrets: %v", len(secrets), err)
	}
	return secrets
}
