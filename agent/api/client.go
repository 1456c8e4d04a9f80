package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

// ErrNoAgent says that nothing answers on the socket: it does not exist, or nobody listens on it.
var ErrNoAgent = errors.New("no agent is running")

const (
	dialTimeout = 2 * time.Second
	// answerTimeout bounds the wait for an answer to begin. Connecting an endpoint waits for
	// the store and for the kernel, so it is well above the agent's own limits.
	answerTimeout = 30 * time.Second
	// maxErrorBody is as much of a failed answer as is read, in bytes.
	maxErrorBody = 64 << 10
)

// Client asks one node's agent. It is safe for concurrent use and holds no
// resources but idle connections; Close drops those.
//
// Methods return an *Error if the agent refused, an error wrapping ErrNoAgent if there is no agent,
// and the context's error if that ended first.
type Client struct {
	socket string
	http   *http.Client
	// patient is http without answerTimeout, for what takes as long as other clusters take: only its caller's context bounds it.
	patient *http.Client
}

// NewClient returns a client for the agent that listens on the unix socket. It does not connect yet.
func NewClient(socket string) *Client {
	return &Client{socket: socket, http: dialing(socket, answerTimeout), patient: dialing(socket, 0)}
}

// dialing returns an HTTP client that connects to a unix socket, whatever the address, and waits so long for an answer to begin; 0 is
// for ever.
func dialing(socket string, timeout time.Duration) *http.Client {
	dialer := net.Dialer{Timeout: dialTimeout}
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
		ResponseHeaderTimeout: timeout,
		IdleConnTimeout:       10 * time.Second,
	}}
}

// Socket returns the path that the client was made with.
func (c *Client) Socket() string { return c.socket }

// Close drops idle connections.
func (c *Client) Close() {
	c.http.CloseIdleConnections()
	c.patient.CloseIdleConnections()
}

// Status returns the agent's account of itself.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	return get[*Status](ctx, c, PathStatus)
}

// Nodes returns all nodes that this node knows, of all clusters.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) { return get[[]Node](ctx, c, PathNodes) }

// Endpoints returns the pods of this node.
func (c *Client) Endpoints(ctx context.Context) ([]Endpoint, error) {
	return get[[]Endpoint](ctx, c, PathEndpoints)
}

// Identities returns the identities of all clusters.
func (c *Client) Identities(ctx context.Context) ([]Identity, error) {
	return get[[]Identity](ctx, c, PathIdentities)
}

// Addresses returns the addresses of all clusters.
func (c *Client) Addresses(ctx context.Context) ([]Address, error) {
	return get[[]Address](ctx, c, PathAddresses)
}

// Services returns the services as this node sees them, merged over clusters.
func (c *Client) Services(ctx context.Context) ([]Service, error) {
	return get[[]Service](ctx, c, PathServices)
}

// BPFLB returns the frontends and backends that are in the kernel.
func (c *Client) BPFLB(ctx context.Context) ([]BPFFrontend, error) {
	return get[[]BPFFrontend](ctx, c, PathBPFLB)
}

// BPFAddresses returns the addresses that are in the kernel.
func (c *Client) BPFAddresses(ctx context.Context) ([]BPFAddress, error) {
	return get[[]BPFAddress](ctx, c, PathBPFAddr)
}

// BPFDrops returns the kernel's drop counters.
func (c *Client) BPFDrops(ctx context.Context) ([]BPFDrop, error) {
	return get[[]BPFDrop](ctx, c, PathBPFDrops)
}

// Members returns what the node knows of the life of all others.
func (c *Client) Members(ctx context.Context) (*Members, error) {
	return get[*Members](ctx, c, PathMembers)
}

// Drain takes the node's backends out of service in the whole mesh, until Undrain; also over restarts of the agent.
func (c *Client) Drain(ctx context.Context) (*DrainResult, error) {
	out := new(DrainResult)
	return out, c.do(ctx, http.MethodPost, PathDrain, "", nil, out)
}

// Undrain takes them back into service.
func (c *Client) Undrain(ctx context.Context) (*DrainResult, error) {
	out := new(DrainResult)
	return out, c.do(ctx, http.MethodDelete, PathDrain, "", nil, out)
}

// Keyring lists or changes the mesh's gossip keys, and returns them as they are then.
func (c *Client) Keyring(ctx context.Context, req KeyringRequest) (*Keyring, error) {
	out := new(Keyring)
	return out, c.send(ctx, http.MethodPost, PathKeyring, req, out)
}

// WatchStatus yields Status at once and again whenever it changed. Like every watch, it
// ends when ctx does, or with the error that it yields last.
func (c *Client) WatchStatus(ctx context.Context) iter.Seq2[*Status, error] {
	return watch[*Status](ctx, c, PathStatus)
}

// WatchMembers yields Members at once and again whenever a node's or a cluster's state changed.
func (c *Client) WatchMembers(ctx context.Context) iter.Seq2[*Members, error] {
	return watch[*Members](ctx, c, PathMembers)
}

// WatchNodes yields Nodes at once and the whole list again whenever it changed.
func (c *Client) WatchNodes(ctx context.Context) iter.Seq2[[]Node, error] {
	return watch[[]Node](ctx, c, PathNodes)
}

// WatchEndpoints yields Endpoints at once and the whole list again whenever it changed.
func (c *Client) WatchEndpoints(ctx context.Context) iter.Seq2[[]Endpoint, error] {
	return watch[[]Endpoint](ctx, c, PathEndpoints)
}

// WatchIdentities yields Identities at once and the whole list again whenever it changed.
func (c *Client) WatchIdentities(ctx context.Context) iter.Seq2[[]Identity, error] {
	return watch[[]Identity](ctx, c, PathIdentities)
}

// WatchAddresses yields Addresses at once and the whole list again whenever it changed.
func (c *Client) WatchAddresses(ctx context.Context) iter.Seq2[[]Address, error] {
	return watch[[]Address](ctx, c, PathAddresses)
}

// WatchServices yields Services at once and the whole list again whenever it changed.
func (c *Client) WatchServices(ctx context.Context) iter.Seq2[[]Service, error] {
	return watch[[]Service](ctx, c, PathServices)
}

// AddEndpoint connects a network namespace as a pod. It returns once the pod can send and receive
// on this node; other nodes learn of it after that.
func (c *Client) AddEndpoint(ctx context.Context, req EndpointRequest) (*Endpoint, error) {
	var e Endpoint
	if err := c.send(ctx, http.MethodPost, PathEndpoints, req, &e); err != nil {
		return nil, err
	}
	return &e, nil
}

// PatchEndpoint changes an endpoint's state.
func (c *Client) PatchEndpoint(ctx context.Context, namespace, name string, patch EndpointPatch) error {
	return c.send(ctx, http.MethodPatch, object(PathEndpoints, namespace, name), patch, nil)
}

// DeleteEndpoint takes a pod off the network; its namespace stays.
func (c *Client) DeleteEndpoint(ctx context.Context, namespace, name string) error {
	return c.do(ctx, http.MethodDelete, object(PathEndpoints, namespace, name), "", nil, nil)
}

// CNI tells whether a CNI plugin can add pods now.
func (c *Client) CNI(ctx context.Context) (*CNI, error) { return get[*CNI](ctx, c, PathCNI) }

// DeleteSandbox is DeleteEndpoint for a CNI plugin: it changes nothing, and succeeds, unless the pod is there and of that sandbox.
func (c *Client) DeleteSandbox(ctx context.Context, namespace, name, sandbox string) error {
	return c.do(ctx, http.MethodDelete, object(PathEndpoints, namespace, name)+"?"+url.Values{"sandbox": {sandbox}}.Encode(), "", nil, nil)
}

// ApplyServices declares the Services of a YAML stream of Kubernetes manifests in this
// node's cluster. Either all are declared or, with an *Error, none.
func (c *Client) ApplyServices(ctx context.Context, manifests []byte) ([]ServiceResult, error) {
	var results []ServiceResult
	err := c.do(ctx, http.MethodPost, PathServices, "application/yaml", manifests, &results)
	return results, err
}

// DeleteService withdraws this node's cluster's declaration of a service.
func (c *Client) DeleteService(ctx context.Context, namespace, name string) error {
	return c.do(ctx, http.MethodDelete, object(PathServices, namespace, name), "", nil, nil)
}

// object returns the path of one object of a collection.
func object(collection, namespace, name string) string {
	return collection + "/" + url.PathEscape(namespace) + "/" + url.PathEscape(name)
}

func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	var out T
	err := c.do(ctx, http.MethodGet, path, "", nil, &out)
	return out, err
}

// send sends in as JSON, and decodes the answer into out unless that is nil.
func (c *Client) send(ctx context.Context, method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encoding the request for %s: %w", path, err)
	}
	return c.do(ctx, method, path, "application/json", body, out)
}

// watch yields each document of the stream at path.
func watch[T any](ctx context.Context, c *Client, path string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		resp, err := c.open(ctx, http.MethodGet, path+"?watch=true", "", nil)
		if err != nil {
			yield(zero, err)
			return
		}
		defer resp.Body.Close()
		for lines := json.NewDecoder(resp.Body); ; {
			var doc T
			if err := lines.Decode(&doc); err != nil {
				yield(zero, c.streamError(ctx, err))
				return
			}
			if !yield(doc, nil) {
				return
			}
		}
	}
}

// streamError says why a watch ended.
func (c *Client) streamError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case hungUp(err):
		return fmt.Errorf("the agent at %s ended the watch: it was stopped or restarted; ask again", c.socket)
	}
	return fmt.Errorf("reading from the agent at %s: %w", c.socket, err)
}

// hungUp tells whether the agent has closed the connection.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// do sends a request and decodes the answer into out, unless that is nil.
func (c *Client) do(ctx context.Context, method, path, contentType string, body []byte, out any) error {
	resp, err := c.open(ctx, method, path, contentType, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("reading the answer of the agent at %s to %s %s: %w", c.socket, method, path, err)
	}
	return nil
}

// open sends a request and returns the answer if it is 2xx; the caller closes its body.
func (c *Client) open(ctx context.Context, method, path, contentType string, body []byte) (*http.Response, error) {
	return c.openWith(ctx, c.http, method, path, contentType, body)
}

// openWith is open with one of the two HTTP clients.
func (c *Client) openWith(ctx context.Context, with *http.Client, method, path, contentType string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("request to the agent at %s: %w", c.socket, err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := with.Do(req)
	if err != nil {
		return nil, c.sendError(ctx, err)
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, refusal(resp)
	}
	return resp, nil
}

// sendError says what a failed exchange means, and what to do about it.
func (c *Client) sendError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s: start it, or name the socket of one that is", ErrNoAgent, c.socket)
	case hungUp(err):
		return fmt.Errorf("the agent at %s ended before it answered: it was stopped or killed; ask again", c.socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("may not open the agent's socket %s: run as root: %w", c.socket, syscall.EACCES)
	}
	var urlErr *url.Error // its text repeats method and made-up host
	if errors.As(err, &urlErr) {
		err = urlErr.Err
	}
	return fmt.Errorf("asking the agent at %s: %w", c.socket, err)
}

// refusal reads the *Error out of an answer that isn't 2xx.
func refusal(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	e := &Error{Status: resp.StatusCode}
	if json.Unmarshal(body, e) != nil || e.Message == "" {
		e.Message = strings.TrimSpace(fmt.Sprintf("%s %s", resp.Status, body))
	}
	return e
}
