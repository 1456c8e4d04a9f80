package kvstore

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// startMembers starts the members of one store, and returns once all are ready.
func startMembers(t *testing.T, n int) (members []*process) {
	t.Helper()
	ca := newTestCA(t)
	cfg := MembersConfig{Initial: map[string]string{}, Token: t.Name()}
	for i := range n {
		cfg.Initial[fmt.Sprintf("member-%d", i)] = freeAddress(t)
	}
	certFile, keyFile := ca.issue(t, "server")
	for name, address := range cfg.Initial {
		p := &process{ca: ca, config: processConfig{
			Name: name, DataDir: t.TempDir(), ListenClient: freeAddress(t), CAFile: ca.file, Members: cfg, ListenHealth: freeAddress(t),
		}}
		p.config.Members.ListenPeer = address
		p.config.CertFile, p.config.KeyFile = certFile, keyFile
		p.client = Config{Endpoints: []string{p.config.ListenClient}, CAFile: ca.file}
		p.client.CertFile, p.client.KeyFile = ca.issue(t, "client")
		p.begin(t)
		t.Cleanup(p.kill)
		members = append(members, p)
	}
	for _, p := range members {
		p.waitReady(t)
	}
	return members
}

// TestMembers has a store live on with two of its three members, and the third one catch up.
func TestMembers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	m := startMembers(t, 3)
	must(t, m[0].dial(t, nil).Put(ctx, Prefix+"a", []byte("1")))
	if got, err := m[1].dial(t, nil).Get(ctx, Prefix+"a"); err != nil || string(got.Value) != "1" {
		t.Fatalf("another member has %v, %v", got, err)
	}
	for _, path := range []string{"/livez", "/readyz"} {
		resp, err := http.Get("http://" + m[0].config.ListenHealth + path)
		must(t, err)
		if resp.Body.Close(); resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}

	m[2].kill()
	all := m[0].dial(t, func(c *Config) {
		c.Endpoints = []string{m[0].config.ListenClient, m[1].config.ListenClient, m[2].config.ListenClient}
	})
	eventually(t, 20*time.Second, "a write without the third member", func() bool { return all.Put(ctx, Prefix+"b", []byte("2")) == nil })
	m[2].start(t)
	if got, err := m[2].dial(t, nil).Get(ctx, Prefix+"b"); err != nil || string(got.Value) != "2" {
		t.Errorf("the third member, back again, has %v, %v", got, err)
	}
}

// TestMembersRevoke: what one member is told ends watches at the others, and who keeps the right to watch goes on.
func TestMembersRevoke(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	m := startMembers(t, 3)
	a := m[0].access(t)
	must(t, a.Prepare(ctx, "agent"))
	must(t, a.GrantRead(ctx, "peer-west", Prefix))
	must(t, a.GrantRead(ctx, "peer-north", Prefix))

	west := m[1].dialAs(t, "peer-west").(*etcd).client.Watch(ctx, Prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if first := <-west; first.Err() != nil {
		t.Fatal(first.Err())
	}
	north := m[1].dialAs(t, "peer-north").(*etcd).client.Watch(ctx, Prefix, clientv3.WithPrefix())
	must(t, a.Revoke(ctx, "peer-west"))
	timeout := time.After(20 * time.Second)
	for ended := false; !ended; {
		select {
		case answer, open := <-west:
			ended = !open || answer.Err() != nil
		case <-timeout:
			t.Fatal("the watch of a user whose rights were taken at another member goes on")
		}
	}
	must(t, m[2].dialAs(t, "agent").Put(ctx, Prefix+"x", nil))
	select {
	case answer := <-north:
		if answer.Err() != nil || len(answer.Events) != 1 {
			t.Errorf("who has the right to watch got %v, %v", answer.Events, answer.Err())
		}
	case <-timeout:
		t.Error("who has the right to watch gets nothing")
	}
}

// TestMembersAreNoUsers: the authority's other certificates don't open what is for members.
func TestMembersAreNoUsers(t *testing.T) {
	t.Parallel()
	m := startMembers(t, 1)[0]
	get := func(name string) error {
		cert, key := m.ca.issue(t, name)
		pair, err := tls.LoadX509KeyPair(cert, key)
		must(t, err)
		pem, err := os.ReadFile(m.ca.file)
		must(t, err)
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}}
		defer client.CloseIdleConnections()
		resp, err := client.Get("https://" + m.config.Members.ListenPeer + "/members")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	must(t, get("server"))
	if err := get("peer-west-abcdefgh"); err == nil {
		t.Error("a peer's certificate was taken for a member's")
	}
}

func TestMembersConfig(t *testing.T) {
	good := map[string]string{"a": "h:1"}
	for want, m := range map[string]MembersConfig{
		"none is named":         {ListenPeer: "127.0.0.1:1"},
		"is not among":          {Initial: map[string]string{"b": "h:1"}, Token: "t", ListenPeer: "127.0.0.1:1"},
		"--initial-cluster-tok": {Initial: good, ListenPeer: "127.0.0.1:1"},
		"--listen-peer":         {Initial: good, Token: "t", ListenPeer: "127.0.0.1"},
	} {
		if err := m.check("a"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	for text, want := range map[string]string{"a": "NAME=host:port", "=h:1": "NAME=host:port", "a=h": "at \"h\"", "a=h:1,a=i:1": "twice", "": "NAME=host:port"} {
		if _, err := ParseMembers(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
	if got, err := ParseMembers("a=h:1, b=[::1]:2"); err != nil || len(got) != 2 || got["b"] != "[::1]:2" {
		t.Errorf("got %v, %v", got, err)
	}
}
