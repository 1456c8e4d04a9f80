package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestPeeringCallsSendWhatTheAgentExpects(t *testing.T) {
	for _, tc := range []struct {
		name   string
		call   func(context.Context, *Client) (any, error)
		asked  string // METHOD path?query body
		answer string
		want   string
	}{
		{"create token", func(ctx context.Context, c *Client) (any, error) {
			r, err := c.CreateToken(ctx, TokenRequest{TTL: 60, Isolated: true})
			return r.Text, err
		}, `POST /v1/tokens {"ttl":60,"isolated":true}`, `{"token":"cm1.x","id":"a"}`, "cm1.x"},
		{"tokens", func(ctx context.Context, c *Client) (any, error) {
			r, err := c.Tokens(ctx)
			return r[0].State, err
		}, `GET /v1/tokens `, `[{"id":"a","state":"open"}]`, "open"},
		{"delete token", func(ctx context.Context, c *Client) (any, error) {
			return "", c.DeleteToken(ctx, "a/b")
		}, `DELETE /v1/tokens/a%2Fb `, ``, ""},
		{"peers", func(ctx context.Context, c *Client) (any, error) {
			r, err := c.Peers(ctx)
			return r[0].Name, err
		}, `GET /v1/peers `, `[{"name":"west"}]`, "west"},
		{"disconnect", func(ctx context.Context, c *Client) (any, error) {
			r, err := c.Disconnect(ctx, "west", false)
			return r.Known, err
		}, `DELETE /v1/peers/west `, `{"cluster":"west","known":true}`, "true"},
		{"disconnect by force", func(ctx context.Context, c *Client) (any, error) {
			r, err := c.Disconnect(ctx, "west", true)
			return r.Known, err
		}, `DELETE /v1/peers/west?force=true `, `{"cluster":"west"}`, "false"},
		{"certs", func(ctx context.Context, c *Client) (any, error) {
			r, err := c.Certs(ctx)
			return r[0].Name, err
		}, `GET /v1/certs `, `[{"name":"authority"}]`, "authority"},
		{"rotate certs", func(ctx context.Context, c *Client) (any, error) {
			r, err := c.RotateCerts(ctx, CertsRequest{Name: "agent"})
			return r[0].State, err
		}, `POST /v1/certs {"name":"agent"}`, `[{"name":"agent","state":"valid"}]`, "valid"},
		{"troubleshoot", func(ctx context.Context, c *Client) (any, error) {
			return collect(t, c.Troubleshoot(ctx, TroubleshootRequest{Peer: "west"}), func(e TroubleshootEvent) string { return e.Verdict }), nil
		}, `POST /v1/troubleshoot {"peer":"west"}`, `{"peer":"west","check":{"name":"TCP"}}` + "\n" + `{"peer":"west","verdict":"all is well","ok":true}` + "\n", "[ all is well]"},
		{"bundle", func(ctx context.Context, c *Client) (any, error) {
			var b bytes.Buffer
			err := c.Bundle(ctx, &b)
			return b.String(), err
		}, `GET /v1/bundle `, "a tar", "a tar"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				asked := r.Method + " " + r.URL.EscapedPath()
				if r.URL.RawQuery != "" {
					asked += "?" + r.URL.RawQuery
				}
				if asked += " " + string(body); asked != tc.asked {
					t.Errorf("got %q, want %q", asked, tc.asked)
				}
				io.WriteString(w, tc.answer)
			}))
			got, err := tc.call(t.Context(), c)
			if err != nil || fmt.Sprint(got) != tc.want {
				t.Errorf("got %v, %v, want %s", got, err, tc.want)
			}
		})
	}
}

// collect returns what a stream yields, and fails the test if it ends with an error.
func collect[T any](t *testing.T, events func(func(T, error) bool), word func(T) string) (words []string) {
	t.Helper()
	for e, err := range events {
		if err != nil {
			t.Error(err)
			break
		}
		words = append(words, word(e))
	}
	return words
}

func TestConnectYieldsEventsAsTheyHappen(t *testing.T) {
	seen := make(chan struct{})
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"stage":"preflight","check":{"name":"TCP","outcome":"ok"},"atMs":1}`+"\n")
		w.(http.Flusher).Flush()
		<-seen // the second one comes after the first one has been read
		io.WriteString(w, `{"stage":"done","peer":"west","atMs":2100}`+"\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done() // that the client has left after the last one
	}))
	var stages []string
	for e, err := range c.Connect(t.Context(), ConnectRequest{Token: "cm1.x"}) {
		if err != nil {
			t.Fatal(err)
		}
		if stages = append(stages, e.Stage); len(stages) == 1 {
			close(seen)
		}
	}
	if fmt.Sprint(stages) != "[preflight done]" {
		t.Errorf("got %v", stages)
	}
}

func TestConnectEndsWithTheAgentsError(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"stage":"preflight"}`+"\n"+`{"stage":"preflight","error":"the token has expired"}`+"\n")
	}))
	got := collect(t, c.Connect(t.Context(), ConnectRequest{}), func(e ConnectEvent) string { return e.Error })
	if fmt.Sprint(got) != "[ the token has expired]" {
		t.Errorf("got %q", got)
	}
}

func TestStreamsThatAreCutOffSaySo(t *testing.T) {
	half := func(text string, abort bool) *Client {
		return serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, text)
			w.(http.Flusher).Flush()
			if abort {
				panic(http.ErrAbortHandler)
			}
		}))
	}
	last := func(events func(func(ConnectEvent, error) bool)) (last error) {
		for _, last = range events {
		}
		return last
	}
	req := ConnectRequest{Token: "cm1.secret"}
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"connect, killed":        {last(half(`{"stage":"join"}`+"\n", true).Connect(t.Context(), req)), "ended while it was answering"},
		"connect, no last event": {last(half(`{"stage":"join"}`+"\n", false).Connect(t.Context(), req)), "stopped in the middle of connecting"},
		"connect, half an event": {last(half(`{"stage":"jo`, false).Connect(t.Context(), req)), "ended while it was answering"},
		"bundle":                 {half("half a tar", true).Bundle(t.Context(), io.Discard), "ended while it was sending the bundle"},
		"bundle, disk full":      {half("a tar", false).Bundle(t.Context(), fullDisk{}), "writing the bundle: no space"},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) || strings.Contains(tc.err.Error(), "secret") {
			t.Errorf("%s: got %v, want %q", name, tc.err, tc.want)
		}
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, errors.New("no space") }

func TestLeavingAConnectEndsItsRequest(t *testing.T) {
	ended := make(chan struct{})
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		_, _ = io.Copy(io.Discard, r.Body)
		io.WriteString(w, `{"stage":"join"}`+"\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last error
	for _, last = range c.Connect(ctx, ConnectRequest{}) {
		cancel()
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("got %v", last)
	}
	<-ended
}

// What takes as long as another cluster takes is not given up when an ordinary answer would be.
func TestSlowStreamsOutliveTheAnswerTimeout(t *testing.T) {
	gaveUp := make(chan struct{})
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == PathStatus {
			<-r.Context().Done()
			return
		}
		<-gaveUp
		if r.URL.Path == PathConnect {
			io.WriteString(w, `{"stage":"done"}`)
		} else if r.URL.Path == PathCerts {
			io.WriteString(w, `[]`)
		}
	}))
	c.http = dialing(c.socket, 20*time.Millisecond)
	errs := make(chan error, 4)
	go func() {
		for e, err := range c.Connect(t.Context(), ConnectRequest{}) {
			if err == nil && e.Stage != StageDone {
				err = fmt.Errorf("got %+v", e)
			}
			errs <- err
		}
	}()
	go func() {
		var err error
		for _, err = range c.Troubleshoot(t.Context(), TroubleshootRequest{}) {
		}
		errs <- err
	}()
	go func() { _, err := c.RotateCerts(t.Context(), CertsRequest{}); errs <- err }()
	go func() { errs <- c.Bundle(t.Context(), io.Discard) }()
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("status: got %v", err)
	}
	close(gaveUp)
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
