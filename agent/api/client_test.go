package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"causeway/identity"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve answers on a fresh unix socket with h and returns a client for it.
func serve(t *testing.T, h http.Handler) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	c := NewClient(socket)
	t.Cleanup(func() { c.Close(); _ = srv.Close(); <-done })
	return c
}

func TestListDecodesRows(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != PathNodes || r.URL.RawQuery != "" {
			t.Errorf("got %s %s", r.Method, r.URL)
		}
		io.WriteString(w, `[{"cluster":"west","name":"node2","address":"172.29.2.12","status":{"kind":"done"}}]`)
	}))
	nodes, err := c.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(nodes) != 1 || nodes[0].Cluster != "west" || nodes[0].Name != "node2" || nodes[0].Status.Kind != "done" {
		t.Errorf("got %+v", nodes)
	}
}

func TestMembersAreWhatTheAgentSays(t *testing.T) {
	const answer = `{"enabled":true,"nodes":[{"cluster":"west","node":"node2","state":"dead","quarantined":true,"member":false}],
		"clusters":[{"cluster":"west","state":"reachable"}],"transitions":[{"subject":"west/node2","from":"suspect","to":"dead"}]}`
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/v1/members" {
			t.Errorf("got %s %s", r.Method, r.URL)
		}
		io.WriteString(w, answer)
	}))
	asked, err := c.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var watched *Members
	for watched, err = range c.WatchMembers(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	for _, m := range []*Members{asked, watched} {
		if !m.Enabled || len(m.Nodes) != 1 || m.Nodes[0].NodeName().String() != "west/node2" || m.Nodes[0].State != identity.NodeDead ||
			!m.Nodes[0].Quarantined || m.Clusters[0].State != identity.Reachable || m.Transitions[0].To != "dead" {
			t.Errorf("got %+v", m)
		}
	}
}

func TestRequestsAsTheAgentSeesThem(t *testing.T) {
	for _, tc := range []struct {
		name               string
		call               func(context.Context, *Client) error
		method, path, body string
		answer             string
	}{
		{"add endpoint", func(ctx context.Context, c *Client) error {
			_, err := c.AddEndpoint(ctx, EndpointRequest{Namespace: "default", Name: "shop-1", NetNS: "/run/netns/x"})
			return err
		}, "POST", "/v1/endpoints", `{"namespace":"default","name":"shop-1","labels":null,"netns":"/run/netns/x"}`, `{"name":"shop-1"}`},
		{"patch endpoint", func(ctx context.Context, c *Client) error {
			return c.PatchEndpoint(ctx, "default", "shop-1", EndpointPatch{State: identity.EndpointTerminating})
		}, "PATCH", "/v1/endpoints/default/shop-1", `{"state":"terminating"}`, ``},
		{"delete endpoint", func(ctx context.Context, c *Client) error {
			return c.DeleteEndpoint(ctx, "default", "a/b")
		}, "DELETE", "/v1/endpoints/default/a%2Fb", ``, ``},
		{"apply services", func(ctx context.Context, c *Client) error {
			results, err := c.ApplyServices(ctx, []byte("kind: Service\n"))
			if len(results) != 1 || results[0].Action != "created" {
				t.Errorf("got results %+v", results)
			}
			return err
		}, "POST", "/v1/services", "kind: Service\n", `[{"action":"created"}]`},
		{"delete service", func(ctx context.Context, c *Client) error {
			return c.DeleteService(ctx, "default", "shop")
		}, "DELETE", "/v1/services/default/shop", ``, ``},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				if r.Method != tc.method || r.URL.EscapedPath() != tc.path || string(body) != tc.body {
					t.Errorf("got %s %s %q, want %s %s %q", r.Method, r.URL.EscapedPath(), body, tc.method, tc.path, tc.body)
				}
				io.WriteString(w, tc.answer)
			}))
			if err := tc.call(t.Context(), c); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestWatchYieldsWholeListsUntilTheAgentEnds(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") != "true" {
			t.Errorf("got %s", r.URL)
		}
		for n := range 3 {
			_ = json.NewEncoder(w).Encode(make([]Node, n))
			w.(http.Flusher).Flush()
		}
	}))
	var sizes []int
	var last error
	for nodes, err := range c.WatchNodes(t.Context()) {
		if err != nil {
			last = err
			break
		}
		sizes = append(sizes, len(nodes))
	}
	if fmt.Sprint(sizes) != "[0 1 2]" {
		t.Errorf("got lists of %v nodes", sizes)
	}
	if last == nil || !strings.Contains(last.Error(), "ended the watch") {
		t.Errorf("got error %v", last)
	}
}

func TestWatchEndsWithItsContext(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "[]\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var last error
	for _, err := range c.WatchServices(ctx) {
		cancel()
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", last)
	}
}

func TestRefusalIsAnError(t *testing.T) {
	for body, want := range map[string]string{
		`{"error":"the name is taken"}`: "the name is taken",
		"not found\n":                   "404 Not Found not found",
	} {
		c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, body)
		}))
		err := c.DeleteService(t.Context(), "default", "shop")
		var e *Error
		if !errors.As(err, &e) || e.Message != want || e.Status != http.StatusNotFound {
			t.Errorf("body %q: got %#v", body, err)
		}
	}
}

func TestNoAgentSaysWhere(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "agent.sock")
	left := filepath.Join(t.TempDir(), "left.sock") // what a killed agent leaves
	l, err := net.Listen("unix", left)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	for _, socket := range []string{missing, left} {
		_, err := NewClient(socket).Status(t.Context())
		if !errors.Is(err, ErrNoAgent) || !strings.Contains(err.Error(), socket) {
			t.Errorf("%s: got %v", socket, err)
		}
	}
}

func TestAgentThatEndsBeforeItAnswers(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }))
	_, err := c.AddEndpoint(t.Context(), EndpointRequest{Name: "shop-1"})
	if err == nil || errors.Is(err, ErrNoAgent) || !strings.Contains(err.Error(), "ended before it answered") {
		t.Errorf("got %v", err)
	}
}
