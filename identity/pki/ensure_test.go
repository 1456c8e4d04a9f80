package pki

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type directory struct {
	*testing.T
	path string
}

func newDirectory(t *testing.T) directory { return directory{t, filepath.Join(t.TempDir(), "pki")} }

func (d directory) ensure(at time.Time, hosts ...string) *Authority {
	d.Helper()
	return must(Ensure(d.path, "east", hosts, at))(d)
}

func (d directory) file(name string) string { return filepath.Join(d.path, name) }

func (d directory) read(name string) []byte {
	d.Helper()
	return must(os.ReadFile(d.file(name)))(d)
}

func (d directory) pair(name string) Pair {
	d.Helper()
	p := Pair{d.read(name + ".crt"), d.read(name + ".key")}
	if _, err := p.TLS(); err != nil {
		d.Fatalf("%s: %v", name, err)
	}
	return p
}

func (d directory) refused(want string) {
	d.Helper()
	if _, err := Ensure(d.path, "east", nil, start); err == nil || !strings.Contains(err.Error(), want) {
		d.Errorf("got %v, want %q", err, want)
	}
}

func TestEnsure(t *testing.T) {
	d := newDirectory(t)
	a := d.ensure(start, "172.29.1.2", "store.east", "0.0.0.0", "")
	if err := handshake(t, a, d.pair(FileServer), d.pair(FileAgent), "172.29.1.2", start); err != nil {
		t.Error(err)
	}
	for _, host := range []string{"store.east", "localhost", "127.0.0.1", "::1"} {
		if err := handshake(t, a, d.pair(FileServer), d.pair(FileAgent), host, start); err != nil {
			t.Error(err)
		}
	}
	modes := map[string]os.FileMode{".": 0o700, "ca.key": 0o600, "server.key": 0o600, "agent.key": 0o600, "ca.crt": 0o644, "server.crt": 0o644, "agent.crt": 0o644}
	for name, want := range modes {
		if info := must(os.Stat(d.file(name)))(t); info.Mode().Perm() != want {
			t.Errorf("%s has mode %o", name, info.Mode().Perm())
		}
	}
	if entries := must(os.ReadDir(d.path))(t); len(entries) != 6 {
		t.Errorf("files: %v", entries)
	}
	if user := must(ParseCert(d.read("agent.crt")))(t).Subject.CommonName; user != UserAgent {
		t.Errorf("the agents' user is %q", user)
	}
}

func TestEnsureRenewsWhatIsDue(t *testing.T) {
	d := newDirectory(t)
	first := d.ensure(start, "172.29.1.2")
	server, agent := d.read("server.crt"), d.read("agent.crt")
	d.ensure(start.Add(24*time.Hour), "172.29.1.2")
	if !bytes.Equal(server, d.read("server.crt")) || !bytes.Equal(agent, d.read("agent.crt")) {
		t.Error("renewed what is good for long")
	}
	d.ensure(start.Add(48*time.Hour), "172.29.1.2", "10.0.0.1")
	if bytes.Equal(server, d.read("server.crt")) || !bytes.Equal(agent, d.read("agent.crt")) {
		t.Error("a new host needs a new certificate of the server, and nothing else")
	}
	late := start.Add(89 * 24 * time.Hour)
	again := d.ensure(late, "172.29.1.2")
	if again.Fingerprint() != first.Fingerprint() {
		t.Error("the authority has changed")
	}
	if err := handshake(t, first, d.pair(FileServer), d.pair(FileAgent), "172.29.1.2", late.Add(80*24*time.Hour)); err != nil {
		t.Error("after the renewal:", err)
	}
}

func TestEnsureReplacesWhatAnotherAuthoritySigned(t *testing.T) {
	d := newDirectory(t)
	d.ensure(start, "172.29.1.2")
	other := newTestAuthority(t)
	if err := WriteFiles(d.file("ca.crt"), d.file("ca.key"), Pair{other.CertPEM(), other.KeyPEM()}); err != nil {
		t.Fatal(err)
	}
	a := d.ensure(start, "172.29.1.2")
	if a.Fingerprint() != other.Fingerprint() {
		t.Error("the authority is not the one of the files")
	}
	if err := handshake(t, a, d.pair(FileServer), d.pair(FileAgent), "172.29.1.2", start); err != nil {
		t.Error(err)
	}
}

func TestEnsureWithoutTheAuthoritysKey(t *testing.T) {
	d := newDirectory(t)
	d.ensure(start, "172.29.1.2")
	agent := d.read("agent.crt")
	os.Remove(d.file("ca.key"))
	if a := d.ensure(start.Add(89*24*time.Hour), "172.29.1.2"); a != nil || !bytes.Equal(agent, d.read("agent.crt")) {
		t.Error("somebody else's authority was used")
	}
	os.Remove(d.file("agent.key"))
	d.refused("agent.crt or agent.key is missing")
}

// TestEnsureAfterACrash stops a replacement at each of its steps.
func TestEnsureAfterACrash(t *testing.T) {
	for _, name := range []string{FileAuthority, FileServer} {
		d := newDirectory(t)
		a := d.ensure(start, "172.29.1.2")
		next := must(NewAuthority("east", start))(t)
		p := Pair{next.CertPEM(), next.KeyPEM()}
		if name != FileAuthority {
			p = must(a.Issue(Request{User: FileServer, Server: true, Hosts: serverHosts([]string{"172.29.1.2"})}, start))(t)
		}
		f := filesOf(d.path, name)
		if err := writeNew(f.key, p.Key, 0o600); err != nil {
			t.Fatal(err)
		}
		d.ensure(start, "172.29.1.2") // only one of two was written: nothing has happened
		if err := writeNew(f.cert, p.Cert, 0o644); err != nil {
			t.Fatal(err)
		}
		d.ensure(start, "172.29.1.2")
		if bytes.Equal(d.pair(name).Cert, p.Cert) {
			t.Errorf("%s was replaced before its key was", name)
		}
		if err := os.Rename(f.key+newSuffix, f.key); err != nil {
			t.Fatal(err)
		}
		d.ensure(start, "172.29.1.2")
		if !bytes.Equal(d.pair(name).Cert, p.Cert) {
			t.Errorf("%s: the replacement was not finished", name)
		}
	}
}

func TestEnsureRefuses(t *testing.T) {
	open := newDirectory(t)
	open.ensure(start)
	if err := os.Chmod(open.file("ca.key"), 0o640); err != nil {
		t.Fatal(err)
	}
	open.refused("chmod 600")

	lonely := newDirectory(t)
	lonely.ensure(start)
	os.Remove(lonely.file("ca.crt"))
	lonely.refused("bring the certificate back")

	mixed := newDirectory(t)
	mixed.ensure(start)
	other := newTestAuthority(t)
	if err := os.WriteFile(mixed.file("ca.key"), other.KeyPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	mixed.refused("does not belong")

	if _, err := Ensure(t.TempDir(), "East_1", nil, start); err == nil || !strings.Contains(err.Error(), "lower case") {
		t.Errorf("bad cluster name: %v", err)
	}
	bad := t.TempDir()
	if _, err := Ensure(bad, "east", []string{"a b"}, start); err == nil || len(must(os.ReadDir(bad))(t)) != 0 {
		t.Errorf("bad host: %v", err)
	}
}

func TestWriteFilesRefusesWhatDoesNotFit(t *testing.T) {
	d := newDirectory(t)
	d.ensure(start)
	before := d.pair(FileAgent)
	err := WriteFiles(d.file("agent.crt"), d.file("agent.key"), Pair{before.Cert, d.read("server.key")})
	if err == nil || !strings.Contains(err.Error(), "does not match") {
		t.Errorf("got %v", err)
	}
	if after := d.pair(FileAgent); !bytes.Equal(after.Key, before.Key) {
		t.Error("the key was replaced")
	}
}

func TestEnsureAgent(t *testing.T) {
	d := newDirectory(t)
	a := newTestAuthority(t)
	ensure := func(a *Authority, at time.Time) []byte {
		t.Helper()
		if err := EnsureAgent(d.path, a, at); err != nil {
			t.Fatal(err)
		}
		return d.pair(FileAgent).Cert
	}
	first := ensure(a, start)
	if cert := must(ParseCert(first))(t); cert.Subject.CommonName != UserAgent || cert.CheckSignatureFrom(a.Cert) != nil || !bytes.Equal(d.read("ca.crt"), a.CertPEM()) {
		t.Errorf("the certificate is %q's", cert.Subject)
	}
	if !bytes.Equal(first, ensure(a, start.Add(24*time.Hour))) {
		t.Error("renewed what is good for long")
	}
	if bytes.Equal(first, ensure(a, start.Add(89*24*time.Hour))) {
		t.Error("not renewed what is due")
	}
	other := newTestAuthority(t)
	if cert := must(ParseCert(ensure(other, start)))(t); cert.CheckSignatureFrom(other.Cert) != nil || !bytes.Equal(d.read("ca.crt"), other.CertPEM()) {
		t.Error("kept what another authority has signed")
	}
	if entries := must(os.ReadDir(d.path))(t); len(entries) != 3 {
		t.Errorf("files: %v", entries)
	}
}
