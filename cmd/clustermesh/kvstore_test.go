package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"causeway/clustermesh/peering"
	"causeway/identity/pki"
	"causeway/kvstore"
)

func TestKVStoreFlags(t *testing.T) {
	for args, want := range map[string]string{
		"--data-dir x --listen-client 127.0.0.1:1":                                             "[pki ca]",
		"--data-dir x --listen-client 127.0.0.1:1 --pki y":                                     "[cluster]",
		"--data-dir x --listen-client 127.0.0.1:1 --ca y":                                      "[cert key]",
		"--data-dir x --listen-client 127.0.0.1:1 --pki y --cluster z --ca y --cert y --key y": "[ca pki]",
		"init --ca x --ca-key y":                                                               `"endpoints"`,
	} {
		got := cli(t, nil, append([]string{"kvstore"}, strings.Fields(args)...)...)
		if got.code != exitNotAsked || !strings.Contains(got.err, want) {
			t.Errorf("%s: %d %s", args, got.code, got.err)
		}
	}
}

// runningStore is a store that runs in this process, by storeCerts.
type runningStore struct {
	*testing.T
	dir, address string
	log          bytes.Buffer
}

// run serves until during returns.
func (s *runningStore) run(during func()) error {
	s.Helper()
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	ready, ended := make(chan net.Addr, 1), make(chan error, 1)
	certs := &storeCerts{dir: filepath.Join(s.dir, "pki"), cluster: "east", now: time.Now, log: &s.log}
	go func() {
		ended <- certs.serve(ctx, kvstore.ServerConfig{
			DataDir: filepath.Join(s.dir, "data"), ListenClient: s.address, UnsafeNoFsync: true, LogLevel: "error",
		}, func(addr net.Addr) { ready <- addr })
	}()
	select {
	case err := <-ended:
		return err
	case <-ready:
	}
	during()
	cancel()
	return <-ended
}

func (s *runningStore) file(name string) string { return filepath.Join(s.dir, "pki", name) }

func (s *runningStore) dial(cert string) kvstore.Store {
	s.Helper()
	store, err := kvstore.Dial(context.Background(), kvstore.Config{
		Endpoints: []string{s.address}, CAFile: s.file("ca.crt"), CertFile: s.file(cert + ".crt"), KeyFile: s.file(cert + ".key"),
	})
	if err != nil {
		s.Fatal(err)
	}
	return store
}

func newRunningStore(t *testing.T) *runningStore {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return &runningStore{T: t, dir: t.TempDir(), address: l.Addr().String()}
}

// TestKVStoreWithItsOwnCertificates starts a store twice, takes its authority away, and exchanges it.
func TestKVStoreWithItsOwnCertificates(t *testing.T) {
	s := newRunningStore(t)
	ctx := t.Context()
	agentReads := func() {
		t.Helper()
		agent, server := s.dial(pki.FileAgent), s.dial(pki.FileServer)
		defer agent.Close()
		defer server.Close()
		entry, err := agent.Get(ctx, peering.AuthorityKey)
		if err != nil {
			t.Fatal(err)
		}
		stored, err := peering.DecodeAuthority(entry.Value)
		if err != nil {
			t.Fatal(err)
		}
		if file, err := os.ReadFile(s.file("ca.crt")); err != nil || !bytes.Equal(file, stored.CertPEM()) {
			t.Errorf("the store has another authority than the file, %v", err)
		}
		// Whoever has no user may do nothing.
		if _, err := server.Get(ctx, kvstore.Prefix+"x"); !errors.Is(err, kvstore.ErrDenied) {
			t.Errorf("the server's own certificate: %v", err)
		}
	}
	for range 2 {
		if err := s.run(agentReads); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.ReadFile(s.file("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	// Without the authority's key the store goes on with what it was given.
	if err := os.Remove(s.file("ca.key")); err != nil {
		t.Fatal(err)
	}
	if err := s.run(agentReads); err != nil || !strings.Contains(s.log.String(), "ca.key is not in") {
		t.Errorf("without the authority's key: %v, %s", err, s.log.String())
	}
	// Somebody else's files.
	other, err := pki.NewAuthority("east", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.WriteFiles(s.file("ca.crt"), s.file("ca.key"), pki.Pair{Cert: other.CertPEM(), Key: other.KeyPEM()}); err != nil {
		t.Fatal(err)
	}
	if err := s.run(func() { t.Error("ready with another authority") }); !errors.Is(err, peering.ErrOtherAuthority) {
		t.Errorf("another authority: %v", err)
	}
	if strings.Contains(s.log.String(), string(before[30:60])) {
		t.Error("the log shows a key")
	}
}

// TestKVStoreInit makes a store ready that was started with files that somebody else made.
func TestKVStoreInit(t *testing.T) {
	s := newRunningStore(t)
	ctx := t.Context()
	if _, err := pki.Ensure(filepath.Join(s.dir, "pki"), "east", nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	serving, cancel := context.WithCancel(ctx)
	ready, ended := make(chan net.Addr, 1), make(chan error, 1)
	go func() {
		ended <- kvstore.Serve(serving, kvstore.ServerConfig{
			DataDir: filepath.Join(s.dir, "data"), ListenClient: s.address, UnsafeNoFsync: true, LogLevel: "error",
			CAFile: s.file("ca.crt"), CertFile: s.file("server.crt"), KeyFile: s.file("server.key"),
			Ready: func(addr net.Addr) { ready <- addr },
		})
	}()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		t.Fatal(err)
	}
	for range 2 {
		got := cli(t, nil, "kvstore", "init", "--endpoints", "https://"+s.address, "--ca", s.file("ca.crt"), "--ca-key", s.file("ca.key"))
		if got.code != exitOK || !strings.Contains(got.out, `certificates of the user "agent"`) {
			t.Fatalf("%d %s%s", got.code, got.out, got.err)
		}
	}
	server, agent := s.dial(pki.FileServer), s.dial(pki.FileAgent)
	defer server.Close()
	defer agent.Close()
	if _, err := server.Get(ctx, kvstore.Prefix+"x"); !errors.Is(err, kvstore.ErrDenied) {
		t.Errorf("a certificate without a user: %v", err)
	}
	if _, err := agent.Get(ctx, peering.AuthorityKey); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(s.file("ca.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	got := cli(t, nil, "kvstore", "init", "--endpoints", s.address, "--ca", s.file("ca.crt"), "--ca-key", s.file("ca.key"))
	if got.code != exitFailed || !strings.Contains(got.err, "chmod 600") {
		t.Errorf("a key that others can read: %d %s", got.code, got.err)
	}
}
