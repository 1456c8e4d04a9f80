package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// maxInFlight bounds the requests that wait for an answer; beyond it the load is less than asked for.
	maxInFlight = 2000
	// defaultLoadTimeout of one request, connecting included.
	defaultLoadTimeout = 5 * time.Second
	// maxFailures that are told one by one.
	maxFailures = 10_000
)

// LoadOptions say what to ask and how often.
type LoadOptions struct {
	URL string
	// Rate in requests per second; they are sent at this pace whether or not earlier ones have been answered.
	Rate float64
	// Requests to send; zero: as many as Duration allows.
	Requests int
	// Duration to send for; zero: until Requests are sent.
	Duration time.Duration
	// NewConnections makes every request open a connection of its own, so that each is balanced anew.
	NewConnections bool
	// Protocol is http1 (the default), http2 with prior knowledge, or grpc: unary calls, whatever the URL's path.
	Protocol string
	// Connections of gRPC, which last; zero: one.
	Connections int
	// Timeout of one request; zero: 5 s.
	Timeout time.Duration
}

// LoadResult is what came back.
type LoadResult struct {
	Requests int `json:"requests"`
	Failed   int `json:"failed"`
	// Errors counts the failed requests by reason.
	Errors map[string]int `json:"errors"`
	// By counts the answers by who gave them: their X-Served-By up to the first "/".
	By map[string]int `json:"by"`
	// Servers counts them by the whole X-Served-By.
	Servers map[string]int `json:"servers"`
	// Failures are the failed requests in the order of their ends, the first 10,000 of them.
	Failures []LoadFailure `json:"failures,omitempty"`
	Latency  Latency       `json:"latencyMs"`
	// ElapsedMS is the time from the first request to the last answer, in milliseconds.
	ElapsedMS int64 `json:"elapsedMs"`
}

// LoadFailure is a request that was not answered.
type LoadFailure struct {
	// Sent is when it began, before connecting.
	Sent  time.Time `json:"sent"`
	Error string    `json:"error"`
}

// Latency of the answered requests, in milliseconds.
type Latency struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// Load sends HTTP requests at a steady pace and counts the answers. When ctx ends it sends no more, and returns what it has.
func Load(ctx context.Context, o LoadOptions) (*LoadResult, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	ask, closeAll, err := o.asker()
	if err != nil {
		return nil, err
	}
	defer closeAll()
	began := time.Now()
	tally := &tally{result: LoadResult{Errors: map[string]int{}, By: map[string]int{}, Servers: map[string]int{}}}
	slots := make(chan struct{}, maxInFlight)
	var wg sync.WaitGroup
	for i := 0; o.due(ctx, began, i); i++ {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			sent := time.Now()
			by, err := ask(i)
			tally.add(by, err, sent, time.Since(sent))
		})
	}
	wg.Wait()
	return tally.finish(time.Since(began)), nil
}

func (o *LoadOptions) validate() error {
	u, err := url.Parse(o.URL)
	if err != nil || u.Scheme != "http" || u.Host == "" {
		return fmt.Errorf("%q is no URL to ask; write it like http://10.1.1.5:8080/", o.URL)
	}
	if !(o.Rate > 0) {
		return errors.New("the rate must be above 0 requests per second")
	}
	if o.Requests <= 0 && o.Duration <= 0 {
		return errors.New("say how many requests to send, or for how long")
	}
	switch o.Protocol {
	case "", ProtocolHTTP1, ProtocolHTTP2, ProtocolGRPC:
	default:
		return fmt.Errorf("the protocol %q is none of http1, http2 and grpc", o.Protocol)
	}
	if o.Connections < 0 {
		return errors.New("the number of connections can't be below 0")
	}
	o.Connections = max(o.Connections, 1)
	if o.Timeout == 0 {
		o.Timeout = defaultLoadTimeout
	}
	return nil
}

// due waits until request i is to be sent; false if there is none.
func (o *LoadOptions) due(ctx context.Context, began time.Time, i int) bool {
	at := time.Duration(float64(i) / o.Rate * float64(time.Second))
	if o.Requests > 0 && i >= o.Requests || o.Duration > 0 && at >= o.Duration {
		return false
	}
	if wait := at - time.Since(began); wait > 0 {
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return ctx.Err() == nil
}

func (o *LoadOptions) client() (*http.Client, func()) {
	dialer := &net.Dialer{Timeout: o.Timeout}
	t := &http.Transport{
		DisableKeepAlives:   o.NewConnections,
		MaxIdleConnsPerHost: maxInFlight,
		DisableCompression:  true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if tcp, ok := conn.(*net.TCPConn); ok {
				// Ports must not pile up in TIME_WAIT: a minute of them is more than there are.
				_ = tcp.SetLinger(0)
			}
			return conn, err
		},
	}
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(o.Protocol != ProtocolHTTP2)
	t.Protocols.SetUnencryptedHTTP2(o.Protocol == ProtocolHTTP2)
	return &http.Client{Transport: t, Timeout: o.Timeout}, t.CloseIdleConnections
}

// ask sends one request and returns who answered.
func ask(client *http.Client, url string) (string, error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("status %d", resp.StatusCode)
	}
	return resp.Header.Get(ServedByHeader), nil
}

// tally counts answers as they come.
type tally struct {
	mu        sync.Mutex
	result    LoadResult
	latencies []time.Duration
}

func (t *tally) add(server string, err error, sent time.Time, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.result.Requests++
	if err != nil {
		t.result.Failed++
		t.result.Errors[loadError(err)]++
		if len(t.result.Failures) < maxFailures {
			t.result.Failures = append(t.result.Failures, LoadFailure{sent, loadError(err)})
		}
		return
	}
	by, _, _ := strings.Cut(server, "/")
	t.result.By[by]++
	t.result.Servers[server]++
	t.latencies = append(t.latencies, took)
}

func (t *tally) finish(elapsed time.Duration) *LoadResult {
	slices.Sort(t.latencies)
	at := func(q float64) float64 {
		if len(t.latencies) == 0 {
			return 0
		}
		d := t.latencies[int(q*float64(len(t.latencies)-1))]
		return float64(d.Microseconds()) / 1000
	}
	t.result.Latency = Latency{P50: at(0.5), P99: at(0.99), Max: at(1)}
	t.result.ElapsedMS = elapsed.Milliseconds()
	return &t.result
}

// loadError names an error without what differs from request to request, so that equal ones are counted together.
func loadError(err error) string {
	var errno syscall.Errno
	var netErr net.Error
	switch {
	case errors.As(err, &errno):
		return errno.Error()
	case errors.As(err, &netErr) && netErr.Timeout(), errors.Is(err, os.ErrDeadlineExceeded):
		return "timeout"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed without an answer"
	}
	var urlErr *url.Error
	if errors.As(err, &urlErr) {
		return urlErr.Err.Error()
	}
	return err.Error()
}
