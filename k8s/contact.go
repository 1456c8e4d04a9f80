package k8s

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/rest"
)

// Status of the connection with the API server.
type Status struct {
	// Connected: the API server answered the last request.
	Connected bool
	// Synced as Source.Synced.
	Synced  bool
	Server  string
	Version string // of Kubernetes; "" before the first answer
	// LastError is why it is not connected, or what it refuses; "" if all is well.
	LastError string
}

// awayAfter is how long the API server may not answer before that is a problem: a new one takes over in less.
const awayAfter = 5 * time.Second

// After so long without a byte of the API server it is asked for something, and every so often it is looked whether it is time for that. Where nothing changes,
// watches say something once a minute.
const (
	quietAfter = 10 * time.Second
	lookEvery  = 2 * time.Second
	askTimeout = 5 * time.Second
)

// contact knows whether the API server answers. Safe for concurrent use.
type contact struct {
	mu       sync.Mutex
	started  time.Time
	answered time.Time // when something of it was read last
	failed   error     // why the newest request got no answer; nil if it got one
	since    time.Time // when that began
	version  string
	refused  map[string]error // what it answers to lists and watches, by kind of object
}

// Status returns how the Source stands with the API server.
func (s *Source) Status() Status {
	c := &s.api
	c.mu.Lock()
	defer c.mu.Unlock()
	status := Status{Connected: c.failed == nil && !c.answered.IsZero(), Synced: closed(s.synced), Server: s.server, Version: c.version}
	if c.failed != nil {
		status.LastError = c.failed.Error()
	} else if kinds := slices.Sorted(maps.Keys(c.refused)); len(kinds) > 0 {
		status.LastError = c.refused[kinds[0]].Error()
	}
	return status
}

// Problems says in sentences what is wrong.
func (s *Source) Problems() (problems []string) {
	status := s.Status()
	c := &s.api
	c.mu.Lock()
	since, refused := cmp.Or(c.since, c.started), maps.Clone(c.refused)
	c.mu.Unlock()
	switch {
	case since.IsZero():
		return nil // Run has not begun
	case !status.Connected && time.Since(since) > awayAfter:
		return []string{fmt.Sprintf("Kubernetes: the API server %s does not answer since %s: %s; what was known stays in force",
			status.Server, since.UTC().Format(time.RFC3339), cmp.Or(status.LastError, "it has not been reached yet"))}
	case !status.Connected:
		return nil
	}
	for _, kind := range slices.Sorted(maps.Keys(refused)) {
		problems = append(problems, fmt.Sprintf("Kubernetes: %s cannot be read: %v", kind, refused[kind]))
	}
	s.mu.Lock()
	node, known := s.node, s.nodesListed
	s.mu.Unlock()
	if known && !node {
		problems = append(problems, fmt.Sprintf("Kubernetes has no Node %s: node.name must be that of this machine's Node, or its pods are not known", s.cfg.Node))
	}
	return problems
}

// transport notes what becomes of each request.
func (c *contact) transport(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		response, err := next.RoundTrip(r)
		if err != nil {
			if !errors.Is(err, context.Canceled) {
				c.noteFailure(err)
			}
			return response, err
		}
		c.noteAnswer()
		response.Body = body{response.Body, c}
		return response, nil
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// body notes that something is read: a watch is one answer that lasts.
type body struct {
	io.ReadCloser
	c *contact
}

func (b body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.c.noteAnswer()
	}
	return n, err
}

func (c *contact) noteAnswer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answered, c.failed, c.since = time.Now(), nil, time.Time{}
}

func (c *contact) noteFailure(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == nil {
		c.since = time.Now()
	}
	c.failed = err
}

// noteKind notes how a list or a watch of a kind of objects began. That a watch has expired is nothing to speak of: all is listed anew.
func (c *contact) noteKind(kind string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		delete(c.refused, kind)
	case errors.Is(err, context.Canceled), apierrors.IsResourceExpired(err), apierrors.IsGone(err):
	case c.refused == nil:
		c.refused = map[string]error{kind: err}
	default:
		c.refused[kind] = err
	}
}

// watch asks an API server that is silent whether it is there, and logs when it goes and comes, until ctx ends.
func (c *contact) watch(ctx context.Context, client rest.Interface, log *slog.Logger) error {
	c.mu.Lock()
	c.started = time.Now()
	c.mu.Unlock()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	away := false
	for {
		c.mu.Lock()
		ask := c.version == "" || c.failed != nil || time.Since(c.answered) > quietAfter
		c.mu.Unlock()
		if ask {
			c.ask(ctx, client)
		}
		c.mu.Lock()
		failed := c.failed
		c.mu.Unlock()
		if away != (failed != nil) && ctx.Err() == nil {
			if away = failed != nil; away {
				log.Warn("the Kubernetes API server does not answer; what was known stays in force", "error", failed)
			} else {
				log.Info("the Kubernetes API server answers again")
			}
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// ask asks for the version, which everybody may read.
func (c *contact) ask(ctx context.Context, client rest.Interface) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	data, err := client.Get().AbsPath("/version").MaxRetries(0).Do(ctx).Raw()
	var info version.Info
	if err != nil || json.Unmarshal(data, &info) != nil {
		return // how it went is noted by transport
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version = info.GitVersion
}

// quiet is a log handler for client-go: what it warns of, Status says, in fewer words. What is beyond debugging, as bodies of requests, is left out.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelDebug && q.Handler.Enabled(ctx, slog.LevelDebug)
}

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return q.Handler.Handle(ctx, r)
}

func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }
func (q quiet) WithGroup(name string) slog.Handler       { return quiet{q.Handler.WithGroup(name)} }
