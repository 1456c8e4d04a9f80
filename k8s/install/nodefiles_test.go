package install

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"causeway/identity/pki"
)

func testNode(t *testing.T, mode string) NodeFiles {
	t.Helper()
	dir := t.TempDir()
	f := NodeFiles{
		Mode: mode, Authority: filepath.Join(dir, "authority"), PKI: filepath.Join(dir, "pki"), BinDir: filepath.Join(dir, "bin"), ConfDir: filepath.Join(dir, "conf"),
		Program: filepath.Join(dir, "clustermesh"),
	}
	for _, d := range []string{f.Authority, f.BinDir, f.ConfDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	authority, err := pki.NewAuthority("east", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(f.Authority, "ca.crt"), authority.CertPEM())
	write(t, filepath.Join(f.Authority, "ca.key"), authority.KeyPEM())
	write(t, f.Program, []byte("program 1"))
	return f
}

func (f NodeFiles) read(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestPrepareNode(t *testing.T) {
	f := testNode(t, ModeCNI)
	plugin := filepath.Join(f.BinDir, pluginName)
	for _, content := range []string{"program 1", "program 1", "program 2", "program"} {
		write(t, f.Program, []byte(content))
		before, _ := os.Stat(plugin)
		had := ""
		if before != nil {
			had = f.read(t, plugin)
		}
		if err := PrepareNode(f, time.Now()); err != nil {
			t.Fatal(err)
		}
		after, err := os.Stat(plugin)
		if err != nil || after.Mode() != 0o755 || f.read(t, plugin) != content {
			t.Errorf("the plugin is %v, %v", after, err)
		}
		// A program that runs is never written to: another one takes its place.
		if before != nil && os.SameFile(before, after) != (had == content) {
			t.Errorf("the plugin %q was replaced by %q in its file, or by itself", had, content)
		}
	}
	var config struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal([]byte(f.read(t, f.ConfDir, configName)), &config); err != nil || config.Name != "causeway" || len(config.Plugins) != 1 || config.Plugins[0]["type"] != pluginName {
		t.Errorf("configuration %+v, %v", config, err)
	}
	for dir, n := range map[string]int{f.BinDir: 1, f.ConfDir: 1, f.PKI: 3} {
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != n {
			t.Errorf("%s has %v, %v", dir, entries, err)
		}
	}
	for range 2 {
		if err := UndoNode(f); err != nil {
			t.Fatal(err)
		}
	}
	if entries, _ := os.ReadDir(f.ConfDir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

func TestPrepareNodeChained(t *testing.T) {
	for name, other := range map[string]string{
		"10-bridge.conflist": `{"cniVersion":"0.4.0","name":"net","plugins":[{"type":"bridge","ipam":{"type":"host-local"}},{"type":"portmap"}]}`,
		"10-bridge.conf":     `{"cniVersion":"0.4.0","name":"net","type":"bridge","ipam":{"type":"host-local"}}`,
	} {
		f := testNode(t, ModeChained)
		if err := PrepareNode(f, time.Now()); err == nil || !strings.Contains(err.Error(), "no network configuration") {
			t.Errorf("behind none: %v", err)
		}
		if entries, _ := os.ReadDir(f.BinDir); len(entries) != 0 {
			t.Errorf("refused, and there is %v", entries)
		}
		write(t, filepath.Join(f.ConfDir, "99-loopback.conf"), []byte(`{"name":"lo","type":"loopback"}`))
		write(t, filepath.Join(f.ConfDir, "README"), []byte("none"))
		write(t, filepath.Join(f.ConfDir, name), []byte(other))
		var before string
		for range 2 { // the second time ours is there
			if err := PrepareNode(f, time.Now()); err != nil {
				t.Fatal(err)
			}
			text := f.read(t, f.ConfDir, configName)
			var config struct {
				CNIVersion, Name string
				Plugins          []map[string]any
			}
			if err := json.Unmarshal([]byte(text), &config); err != nil || config.Name != "net" || config.CNIVersion != "0.4.0" {
				t.Fatalf("%s: %s, %v", name, text, err)
			}
			if first, last := config.Plugins[0], config.Plugins[len(config.Plugins)-1]; first["type"] != "bridge" || first["ipam"] == nil || last["type"] != pluginName {
				t.Errorf("%s: %s", name, text)
			}
			if before != "" && text != before {
				t.Errorf("again: %s", text)
			}
			before = text
		}
	}
}

func TestPrepareNodeRefuses(t *testing.T) {
	f := testNode(t, ModeCNI)
	write(t, filepath.Join(f.Authority, "ca.key"), []byte("none"))
	if err := PrepareNode(f, time.Now()); err == nil {
		t.Error("a broken authority was taken")
	}
	if err := os.Remove(filepath.Join(f.Authority, "ca.key")); err != nil {
		t.Fatal(err)
	}
	if err := PrepareNode(f, time.Now()); err == nil || !strings.Contains(err.Error(), AuthorityName) {
		t.Errorf("no key: %v", err)
	}
	f = testNode(t, ModeChained)
	write(t, filepath.Join(f.ConfDir, "10-x.conf"), []byte("{"))
	if err := PrepareNode(f, time.Now()); err == nil || !strings.Contains(err.Error(), "10-x.conf") {
		t.Errorf("a broken configuration: %v", err)
	}
}
