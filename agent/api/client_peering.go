package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// CreateToken makes a token, with which one other cluster can join this one, once.
func (c *Client) CreateToken(ctx context.Context, req TokenRequest) (*Token, error) {
	out := new(Token)
	return out, c.send(ctx, http.MethodPost, PathTokens, req, out)
}

// Tokens lists the tokens that were made, without their texts.
func (c *Client) Tokens(ctx context.Context) ([]TokenInfo, error) {
	return get[[]TokenInfo](ctx, c, PathTokens)
}

// DeleteToken makes a token worthless.
func (c *Client) DeleteToken(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, named(PathTokens, id), "", nil, nil)
}

// Connect joins the cluster that a token is of, and yields what happens, when it happens. The last event has the stage done, or has
// Error; an error instead of it says that the agent could not be asked, or was lost in the middle. That ctx ends, or that the
// caller stops reading, has the agent take back what it has begun.
//
// If the cluster has to take another ID first (StageRenumber), the agent begins anew with it; Connect waits for that and goes on with the same token.
func (c *Client) Connect(ctx context.Context, req ConnectRequest) iter.Seq2[ConnectEvent, error] {
	return func(yield func(ConnectEvent, error) bool) {
		for renumbered := (time.Time{}); ; {
			again := time.Time{}
			for event, err := range stream[ConnectEvent](ctx, c, PathConnect, req) {
				if err != nil && !again.IsZero() && ctx.Err() == nil {
					break // it begins anew, as it has said
				}
				if err == nil && event.Stage == StageRenumber && event.Error == "" {
					again = time.Now()
				}
				last := err == nil && (event.Stage == StageDone || event.Error != "")
				if !yield(event, err) || last || err != nil {
					return
				}
			}
			if again.IsZero() || !renumbered.IsZero() {
				yield(ConnectEvent{}, fmt.Errorf("the agent at %s stopped in the middle of connecting: look at what has become of it in its peers, and connect again", c.socket))
				return
			}
			if err := c.waitAnew(ctx, again); err != nil {
				yield(ConnectEvent{}, err)
				return
			}
			renumbered = again
		}
	}
}

// How long an agent is waited for that begins anew, and how often it is asked.
const (
	anewTimeout = 20 * time.Second
	anewPause   = 50 * time.Millisecond
)

// waitAnew waits until the agent has begun anew after a time, and is in step with its store.
func (c *Client) waitAnew(ctx context.Context, after time.Time) error {
	ctx, cancel := context.WithTimeoutCause(ctx, anewTimeout, fmt.Errorf("the agent at %s was to begin anew with another cluster ID, and was not ready within %s; see its log, and connect again", c.socket, anewTimeout))
	defer cancel()
	for {
		status, err := c.Status(ctx)
		if err == nil && status.Started.After(after) && len(status.Stores) > 0 && status.Stores[0].Synced {
			return nil
		}
		select {
		case <-time.After(anewPause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Peers lists the clusters that this one is connected with, or was.
func (c *Client) Peers(ctx context.Context) ([]Peer, error) { return get[[]Peer](ctx, c, PathPeers) }

// WatchPeers yields Peers at once and the whole list again whenever it changed.
func (c *Client) WatchPeers(ctx context.Context) iter.Seq2[[]Peer, error] {
	return watch[[]Peer](ctx, c, PathPeers)
}

// Disconnect ends the connection with a cluster. That there is none is no error, see DisconnectResult. With force the other cluster
// isn't even told.
func (c *Client) Disconnect(ctx context.Context, name string, force bool) (*DisconnectResult, error) {
	path := named(PathPeers, name)
	if force {
		path += "?force=true"
	}
	out := new(DisconnectResult)
	return out, c.do(ctx, http.MethodDelete, path, "", nil, out)
}

// Certs lists the certificates that matter to the node.
func (c *Client) Certs(ctx context.Context) ([]Cert, error) { return get[[]Cert](ctx, c, PathCerts) }

// RotateCerts renews certificates now, and returns all as they are then. Each peer has to sign its own, so it takes as long as they
// take: bound it by ctx.
func (c *Client) RotateCerts(ctx context.Context, req CertsRequest) ([]Cert, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encoding the request for %s: %w", PathCerts, err)
	}
	resp, err := c.openWith(ctx, c.patient, http.MethodPost, PathCerts, "application/json", body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var certs []Cert
	if err := json.NewDecoder(resp.Body).Decode(&certs); err != nil {
		return nil, c.cutOff(ctx, err, "renewing certificates")
	}
	return certs, nil
}

// XDSCertificate has a client of xDS signed for.
func (c *Client) XDSCertificate(ctx context.Context, req XDSCertificateRequest) (*XDSCertificate, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encoding the request for %s: %w", PathXDSCert, err)
	}
	out := new(XDSCertificate)
	return out, c.do(ctx, http.MethodPost, PathXDSCert, "application/json", body, out)
}

// Troubleshoot walks the connections to one peer, or to all, and yields each check when it ends, and a verdict after the last one of a
// peer. It ends after the last verdict, or with the error that it yields last.
func (c *Client) Troubleshoot(ctx context.Context, req TroubleshootRequest) iter.Seq2[TroubleshootEvent, error] {
	return stream[TroubleshootEvent](ctx, c, PathTroubleshoot, req)
}

// Bundle writes a gzipped tar for a bug report to w. After an error w holds a part of it at most.
func (c *Client) Bundle(ctx context.Context, w io.Writer) error {
	resp, err := c.openWith(ctx, c.patient, http.MethodGet, PathBundle, "", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	from := &failing{Reader: resp.Body}
	if _, err := io.Copy(w, from); err != nil && from.err != nil {
		return c.cutOff(ctx, err, "sending the bundle")
	} else if err != nil {
		return fmt.Errorf("writing the bundle: %w", err)
	}
	return nil
}

// failing remembers the error of a reader, so that it can be told from the writer's.
type failing struct {
	io.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}

// named returns the path of an object that has no namespace.
func named(collection, name string) string { return collection + "/" + url.PathEscape(name) }

// stream sends in, and yields each document of the answer until that ends. Unlike a watch it ends by itself.
func stream[T any](ctx context.Context, c *Client, path string, in any) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		body, err := json.Marshal(in)
		if err != nil {
			yield(zero, fmt.Errorf("encoding the request for %s: %w", path, err))
			return
		}
		resp, err := c.openWith(ctx, c.patient, http.MethodPost, path, "application/json", body)
		if err != nil {
			yield(zero, err)
			return
		}
		defer resp.Body.Close()
		for lines := json.NewDecoder(resp.Body); ; {
			var doc T
			switch err := lines.Decode(&doc); {
			case errors.Is(err, io.EOF):
				return
			case err != nil:
				yield(zero, c.cutOff(ctx, err, "answering"))
				return
			}
			if !yield(doc, nil) {
				return
			}
		}
	}
}

// cutOff says why an answer ended in the middle.
func (c *Client) cutOff(ctx context.Context, err error, doing string) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case hungUp(err):
		return fmt.Errorf("the agent at %s ended while it was %s: it was stopped or killed; ask again", c.socket, doing)
	}
	return fmt.Errorf("reading from the agent at %s: %w", c.socket, err)
}
