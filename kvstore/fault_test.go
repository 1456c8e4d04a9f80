package kvstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// quiet is how long a test listens for something that must not come.
const quiet = 500 * time.Millisecond

func TestRestartedServerFlapsNothing(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	s, observer := server.dial(t, nil), server.dial(t, nil)
	ctx := t.Context()
	must(t, s.Put(ctx, "p/leased", []byte("1"), Leased))
	must(t, s.Put(ctx, "p/plain", []byte("1")))
	w := follow(t, observer, "p/")
	w.want("listed: put p/leased=1, put p/plain=1")
	lease := s.Status().Lease

	server.kill()
	eventually(t, 2*time.Second, "the loss is noticed", func() bool {
		return !s.Status().Connected && !observer.Status().Connected
	})
	server.start(t)
	eventually(t, 2*time.Second, "the server is found again", func() bool {
		return s.Status().Connected && observer.Status().Connected
	})
	w.wantNothing(quiet)
	must(t, s.Put(ctx, "p/new", []byte("2"), Leased))
	w.want("put p/new=2")
	status := s.Status()
	if status.Lease != lease || status.Reconnects != 1 || status.LastError != "" {
		t.Errorf("status after the restart: %+v, lease before %s", status, lease)
	}
}

func TestRequestsWaitOutARestart(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	s := server.dial(t, nil)
	must(t, s.Put(t.Context(), "a", nil))
	server.kill()
	eventually(t, 2*time.Second, "the loss is noticed", func() bool { return !s.Status().Connected })
	done := make(chan error, 1)
	go func() { done <- s.Put(context.Background(), "b", nil) }()
	server.start(t)
	must(t, <-done)
}

func TestDialWithoutServer(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	server.kill()
	s := server.dial(t, func(c *Config) { c.RequestTimeout = 300 * time.Millisecond })
	w := follow(t, s, "p/")
	err := s.Put(t.Context(), "p/a", nil, Leased)
	if !errors.Is(err, ErrUnavailable) {
		t.Fatalf("put without a server: %v", err)
	}
	for _, want := range []string{`"p/a"`, server.config.ListenClient, "connection refused"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error doesn't tell %s: %v", want, err)
		}
	}
	status := s.Status()
	if status.Connected || !strings.Contains(status.LastError, server.config.ListenClient) || !strings.HasSuffix(status.LastError, "connection refused") {
		t.Errorf("status without a server: %+v", status)
	}
	server.start(t)
	w.want("listed: ")
	must(t, s.Put(t.Context(), "p/a", nil, Leased))
	w.want("put p/a=")
}

func TestHungServerIsNoticed(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	s := server.dial(t, nil)
	w := follow(t, s, "p/")
	w.want("listed: ")
	server.signal(t, syscall.SIGSTOP)
	eventually(t, 5*time.Second, "the silence is noticed", func() bool { return !s.Status().Connected })
	if status := s.Status(); !strings.Contains(status.LastError, "no answer within") || !strings.Contains(status.LastError, server.config.ListenClient) {
		t.Errorf("last error %q", status.LastError)
	}
	server.signal(t, syscall.SIGCONT)
	eventually(t, 5*time.Second, "the answer is noticed", func() bool { return s.Status().Connected })
	must(t, s.Put(t.Context(), "p/a", nil))
	w.want("put p/a=")
}

// A server restored from a copy has the same cluster ID, but has forgotten: watches deliver what
// changed back, and leased keys that were written after the copy are written again.
func TestRestoredServer(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	s, observer := server.dial(t, nil), server.dial(t, nil)
	ctx := t.Context()
	must(t, s.Put(ctx, "p/same", []byte("1")))
	must(t, s.Put(ctx, "p/changed", []byte("1")))
	must(t, s.Put(ctx, "p/old lease", []byte("1"), Leased))
	server.kill()
	backup := t.TempDir()
	must(t, os.CopyFS(backup, os.DirFS(server.config.DataDir)))
	server.start(t)

	must(t, s.Put(ctx, "p/changed", []byte("2")))
	must(t, s.Put(ctx, "p/old lease", []byte("2"), Leased))
	must(t, s.Put(ctx, "p/plain", []byte("2")))
	must(t, s.Put(ctx, "p/leased", []byte("2"), Leased))
	w := follow(t, observer, "p/")
	w.want("listed: put p/changed=2, put p/leased=2, put p/old lease=2, put p/plain=2, put p/same=1")

	server.kill()
	server.wipe(t)
	must(t, os.CopyFS(server.config.DataDir, os.DirFS(backup)))
	server.start(t)
	state := map[string]string{"p/changed": "2", "p/leased": "2", "p/old lease": "2", "p/plain": "2", "p/same": "1"}
	want := map[string]string{"p/changed": "1", "p/leased": "2", "p/old lease": "2", "p/same": "1"}
	for !maps.Equal(state, want) {
		for _, ev := range w.next().Events {
			if ev.Key == "p/same" {
				t.Error("the unchanged key was delivered again")
			}
			applyTo(state, ev)
		}
	}
	must(t, s.Put(ctx, "p/after", []byte("3")))
	eventually(t, 5*time.Second, "no lost key", func() bool {
		entries, err := observer.List(ctx, "p/")
		return err == nil && len(entries) == len(want)+1
	})
}

// A writer that retries and a watch that only applies what it gets agree after
// any number of crashes, and no revision of a key is delivered twice.
func TestWatchThroughManyCrashes(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	s, observer := server.dial(t, nil), server.dial(t, nil)
	ctx := t.Context()
	written := make(chan error, 1)
	go func() { written <- writeThroughCrashes(ctx, s, 3000) }()
	w := follow(t, observer, "p/")
	state, revisions := map[string]string{}, map[string]int64{}
	for crashes := 0; state["p/end"] == ""; {
		select {
		case b, open := <-w.ch:
			if !open {
				t.Fatal("watch ended")
			}
			for _, ev := range b.Events {
				if ev.Revision <= revisions[ev.Key] {
					t.Fatalf("%s delivered at revision %d after %d", ev.Key, ev.Revision, revisions[ev.Key])
				}
				revisions[ev.Key] = ev.Revision
				applyTo(state, ev)
			}
		case err := <-written:
			must(t, err)
			written = nil
		case <-time.After(20 * time.Second):
			t.Fatal("watch stands still")
		}
		if crashes < 5 && len(revisions) > 15*(crashes+1) {
			crashes++
			server.kill()
			server.start(t)
		}
	}
	entries, err := observer.List(ctx, "p/")
	must(t, err)
	stored := map[string]string{}
	for _, e := range entries {
		stored[e.Key] = string(e.Value)
	}
	if !maps.Equal(state, stored) {
		t.Fatalf("the watch ended with\n%v\nthe store holds\n%v", state, stored)
	}
}

func writeThroughCrashes(ctx context.Context, s Store, n int) error {
	retry := func(f func() error) error {
		for {
			if err := f(); !errors.Is(err, ErrUnavailable) {
				return err
			}
		}
	}
	for i := range n {
		key := fmt.Sprintf("p/%02d", i%100)
		write := func() error { return s.Put(ctx, key, fmt.Append(nil, i), Leased) }
		if i%7 == 0 {
			write = func() error { return s.Delete(ctx, key) }
		}
		if err := retry(write); err != nil {
			return err
		}
	}
	return retry(func() error { return s.Put(ctx, "p/end", []byte("end")) })
}

func applyTo(state map[string]string, ev Event) {
	if ev.Kind == EventDelete {
		delete(state, ev.Key)
	} else {
		state[ev.Key] = string(ev.Value)
	}
}

func TestStrangersAreRefused(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	stranger := newTestCA(t)
	cert, key := stranger.issue(t, "stranger")
	quick := 500 * time.Millisecond
	for name, change := range map[string]func(*Config){
		"certificate of another authority": func(c *Config) { c.CertFile, c.KeyFile = cert, key },
		"server of another authority":      func(c *Config) { c.CAFile = stranger.file },
		"no TLS":                           func(c *Config) { c.Endpoints = []string{"http://" + server.config.ListenClient} },
	} {
		s := server.dial(t, func(c *Config) { c.RequestTimeout = quick; change(c) })
		if _, err := s.Get(t.Context(), "a"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: get returned %v", name, err)
		}
		status := s.Status()
		if status.Connected || status.LastError == "" {
			t.Errorf("%s: status %+v", name, status)
		}
		t.Log(name, "-", status.LastError)
	}
	must(t, server.dial(t, nil).Put(t.Context(), "a", nil))
}

func TestServerStopsAtOnceInSpiteOfWatches(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	s := server.dial(t, nil)
	must(t, s.Put(t.Context(), "a", nil, Leased))
	for range 10 {
		follow(t, s, "").want("listed: put a=")
	}
	start := time.Now()
	server.signal(t, syscall.SIGTERM)
	if err := server.cmd.Wait(); err != nil {
		t.Errorf("exit after SIGTERM: %v", err)
	}
	server.cmd = nil
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("stopping took %s", took)
	}
	server.start(t)
	get(t, s, "a")
}

func TestServerExplainsWhyItCannotStart(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	good := ServerConfig{
		DataDir: t.TempDir(), ListenClient: freeAddress(t),
		CAFile: server.config.CAFile, CertFile: server.config.CertFile, KeyFile: server.config.KeyFile, LogLevel: "fatal",
	}
	missing := t.TempDir() + "/missing.crt"
	for name, c := range map[string]struct {
		change func(*ServerConfig)
		want   []string
	}{
		"port taken":       {func(c *ServerConfig) { c.ListenClient = server.config.ListenClient }, []string{server.config.ListenClient, "taken by another process", "--listen-client"}},
		"no such address":  {func(c *ServerConfig) { c.ListenClient = "192.0.2.1:2379" }, []string{"192.0.2.1:2379", "no address of this machine", "--listen-client"}},
		"no port":          {func(c *ServerConfig) { c.ListenClient = "127.0.0.1" }, []string{"127.0.0.1", "--listen-client"}},
		"data in use":      {func(c *ServerConfig) { c.DataDir = server.config.DataDir }, []string{server.config.DataDir, "in use by another process", "--data-dir"}},
		"no data dir":      {func(c *ServerConfig) { c.DataDir = "" }, []string{"--data-dir"}},
		"no CA":            {func(c *ServerConfig) { c.CAFile = missing }, []string{missing, "authority"}},
		"no certificate":   {func(c *ServerConfig) { c.CertFile = missing }, []string{missing, "PEM"}},
		"key as a CA":      {func(c *ServerConfig) { c.CAFile = c.KeyFile }, []string{server.config.KeyFile, "no PEM certificate"}},
		"foreign key":      {func(c *ServerConfig) { c.KeyFile = server.client.KeyFile }, []string{server.client.KeyFile, "belongs to it"}},
		"no key":           {func(c *ServerConfig) { c.KeyFile = "" }, []string{"key file"}},
		"unknown loglevel": {func(c *ServerConfig) { c.LogLevel = "loud" }, []string{"loud", "debug"}},
	} {
		cfg := good
		c.change(&cfg)
		err := Serve(t.Context(), cfg)
		if err == nil {
			t.Fatalf("%s: started", name)
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error lacks %q: %v", name, want, err)
			}
		}
	}
}

func TestDialRefusesUnusableConfig(t *testing.T) {
	for name, c := range map[string]struct {
		config Config
		want   string
	}{
		"no endpoint":   {Config{}, "at least one"},
		"scheme":        {Config{Endpoints: []string{"ftp://a:1"}}, "https://host:port"},
		"mixed schemes": {Config{Endpoints: []string{"https://a:1", "http://b:1"}}, "https for all"},
		"no files":      {Config{Endpoints: []string{"a:1"}}, "CA certificate file"},
		"negative TTL":  {Config{Endpoints: []string{"a:1"}, LeaseTTL: -1}, "positive"},
	} {
		if _, err := Dial(t.Context(), c.config); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: want an error with %q, got %v", name, c.want, err)
		}
	}
}

func TestNewCertificateIsUsedForTheNextConnection(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	s := server.dial(t, nil)
	must(t, s.Put(t.Context(), "a", nil))
	valid, err := os.ReadFile(server.client.CertFile)
	must(t, err)
	must(t, os.WriteFile(server.client.CertFile, nil, 0o600))
	server.kill()
	server.start(t)
	eventually(t, 5*time.Second, "the bad file is told", func() bool {
		return strings.Contains(s.Status().LastError, server.client.CertFile)
	})
	must(t, os.WriteFile(server.client.CertFile, valid, 0o600))
	eventually(t, 5*time.Second, "the good file is used", func() bool { return s.Status().Connected })
}

// Example of what the command's help says: etcd's own listeners are the one for clients and no other.
func TestServerListensForClientsOnly(t *testing.T) {
	t.Parallel()
	server := startProcess(t)
	out, err := exec.Command("ss", "-Hltnp").Output()
	if err != nil {
		t.Skipf("ss: %v", err)
	}
	var mine []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, fmt.Sprintf("pid=%d,", server.cmd.Process.Pid)) {
			mine = append(mine, strings.Fields(line)[3])
		}
	}
	if len(mine) != 1 || mine[0] != server.config.ListenClient {
		t.Errorf("server listens at %v", mine)
	}
}

// TestExpiredCertificates: people and programs look for these words in LastError.
func TestExpiredCertificates(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	past := time.Now().Add(-time.Minute)
	client := p.client
	client.CertFile, client.KeyFile = p.ca.issueUntil(t, "late", past)
	late := p.dial(t, func(c *Config) { *c = client })
	eventually(t, 10*time.Second, "the client's certificate has expired", func() bool {
		return strings.Contains(late.Status().LastError, "late.crt expired at "+past.UTC().Format(time.RFC3339))
	})
	// A client that shows it all the same is refused by the server.
	pair, err := tls.LoadX509KeyPair(client.CertFile, client.KeyFile)
	must(t, err)
	ca, err := os.ReadFile(client.CAFile)
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	shown := p.dial(t, func(c *Config) {
		*c = client
		c.TLS = &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	})
	eventually(t, 10*time.Second, "the server was asked", func() bool { return shown.Status().LastError != "not reached yet" })
	// The server takes its new certificate for the next connection, like anybody.
	p.ca.issueUntil(t, "server", past)
	s := p.dial(t, nil)
	eventually(t, 10*time.Second, "the server's certificate has expired", func() bool {
		return strings.Contains(s.Status().LastError, "x509: certificate has expired or is not yet valid")
	})
	for _, status := range []Status{late.Status(), shown.Status(), s.Status()} {
		if status.Connected || status.Denied {
			t.Errorf("status %+v", status)
		}
	}
	p.ca.issue(t, "server")
	eventually(t, 10*time.Second, "the server's certificate was renewed", func() bool { return s.Status().Connected })
}
