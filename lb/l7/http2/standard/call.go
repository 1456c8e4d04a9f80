package standard

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"causeway/lb/l7/balance"
	"causeway/lb/l7/exchange"
)

//lint:file-ignore SA1019 net/http serves no single connection, and its client has no hold on one.

// Reasons of answers that are the proxy's own.
const (
	localNoBackend = "no backend"
	localConnect   = "connect failed"
	localOverflow  = "overflow"
	localBroken    = "backend failed"
	localTimeout   = "timeout"
	localMethod    = "CONNECT refused"
	localGone      = "client gone"
)

// gRPC's statuses (https://github.com/grpc/grpc/blob/master/doc/statuscodes.md).
const (
	grpcNone             = -1
	grpcDeadlineExceeded = 4
	grpcUnimplemented    = 12
	grpcUnavailable      = 14
)

// call is one stream of a client.
type call struct {
	env    *exchange.Env
	client *exchange.Client
	w      http.ResponseWriter
	r      *http.Request

	grpc   bool
	body   *source // nil: there is none
	record exchange.Record
	query  balance.Query
	began  bool // something of the answer was passed on
}

func (c *call) serve() {
	port := c.client.Port
	c.grpc = strings.HasPrefix(c.r.Header.Get("Content-Type"), "application/grpc")
	c.record = exchange.Record{
		Protocol: exchange.HTTP2, Client: c.client, Began: time.Now(), GRPC: grpcNone,
		Method: []byte(c.r.Method), Path: []byte(c.r.URL.RequestURI()), Host: []byte(c.r.Host), TraceParent: []byte(c.r.Header.Get("Traceparent")),
	}
	if c.grpc {
		c.record.Protocol = exchange.GRPC
	}
	c.env.Observer.Begin(c.client, c.record.Protocol)
	defer c.end()
	if c.r.Method == http.MethodConnect {
		c.fail(http.StatusMethodNotAllowed, grpcUnimplemented, localMethod)
		return
	}
	if c.r.Body != nil && c.r.Body != http.NoBody {
		c.body = newSource(c.r.Body, c.env.Limits.Buffer)
	}
	c.hash()
	port.Arrived()
	ctx, cancel := c.deadline()
	defer cancel()
	for attempt := 1; ; attempt++ {
		endpoint, err := port.Pick(&c.query)
		if err != nil {
			if c.record.Local == "" {
				c.fail(http.StatusServiceUnavailable, grpcUnavailable, localNoBackend)
			} else {
				c.fail(statusOf(c.record.Local), grpcOf(c.record.Local), c.record.Local)
			}
			return
		}
		c.record.Endpoint = endpoint
		if !c.try(ctx, endpoint, attempt) {
			return
		}
		c.query.Tried = append(c.query.Tried, endpoint)
		c.record.Retries++
	}
}

func (c *call) end() {
	c.record.Took = time.Since(c.record.Began)
	if c.body != nil {
		c.record.In = c.body.count()
	}
	c.env.Observer.End(&c.record)
	if aborted := c.record.Local != "" && c.began && !c.grpc; aborted {
		panic(http.ErrAbortHandler) // The stream is reset: what was passed on of the answer must not look whole.
	}
}

// hash fills in what a hashing port goes by.
func (c *call) hash() {
	header, cookie := c.client.Port.HashKey()
	value := ""
	if header != "" {
		value = c.r.Header.Get(header)
	} else if cookie != "" {
		if found, err := c.r.Cookie(cookie); err == nil {
			value = found.Value
		}
	}
	if value != "" {
		c.query.Hash, c.query.Hashed = balance.Hash([]byte(value)), true
	}
}

// deadline bounds the request by the route's timeout and by gRPC's own.
func (c *call) deadline() (context.Context, context.CancelFunc) {
	limit := c.client.Port.Route().Options.Timeout
	if c.grpc {
		if d, ok := grpcTimeout(c.r.Header.Get("Grpc-Timeout")); ok && (limit == 0 || d < limit) {
			limit = d
		}
	}
	if limit == 0 {
		return context.WithCancel(c.r.Context())
	}
	return context.WithTimeoutCause(c.r.Context(), limit, errTimeout)
}

var errTimeout = errors.New("the time for the request is over")

// grpcTimeout reads up to 8 digits and a unit (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).
func grpcTimeout(s string) (time.Duration, bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	unit, ok := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond}[s[len(s)-1]]
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if !ok || err != nil || n > uint64(1<<62)/uint64(unit) {
		return 0, false
	}
	return time.Duration(n) * unit, true
}

// try sends the request to one backend, and tells whether it is to be sent to another.
func (c *call) try(overall context.Context, e *balance.Endpoint, attempt int) (again bool) {
	options := &c.client.Port.Route().Options
	e.Begin()
	outcome := balance.Neutral
	defer func() { e.End(outcome) }()
	ctx, cancel := context.WithCancelCause(overall)
	defer cancel(nil)
	began := func() {}
	if options.TryTimeout > 0 {
		timer := time.AfterFunc(options.TryTimeout, func() { cancel(errTimeout) })
		began = func() { timer.Stop() }
	}
	answer, err := c.roundTrip(ctx, e)
	began()
	return c.answered(overall, ctx, answer, err, attempt, &outcome)
}

// roundTrip sends the request and waits for the head of the answer.
func (c *call) roundTrip(ctx context.Context, e *balance.Endpoint) (*http.Response, error) {
	options, pools := &c.client.Port.Route().Options, poolsOf(e)
	conn, err := pools.take(ctx, c.env, c.client.Pod, options.MaxConnections, options.MaxPending)
	if err != nil {
		return nil, err
	}
	answer, err := conn.RoundTrip(c.request(ctx))
	if err != nil {
		pools.ended()
		return nil, err
	}
	answer.Body = &endingBody{answer.Body, pools.ended}
	return answer, nil
}

// endingBody tells when a stream has ended.
type endingBody struct {
	io.ReadCloser
	ended func()
}

func (b *endingBody) Close() error {
	defer b.ended()
	return b.ReadCloser.Close()
}

// request is what the backend gets.
func (c *call) request(ctx context.Context) *http.Request {
	in := c.r
	header := make(http.Header, len(in.Header)+2)
	for k, v := range in.Header {
		header[k] = v
	}
	if _, ok := header["User-Agent"]; !ok {
		header["User-Agent"] = []string{""} // or the transport would say that it is one
	}
	from := c.client.Address.Addr().Unmap().String()
	if before := in.Header["X-Forwarded-For"]; len(before) > 0 {
		from = strings.Join(before, ", ") + ", " + from
	}
	header["X-Forwarded-For"] = []string{from}
	if _, ok := header["X-Forwarded-Proto"]; !ok {
		header["X-Forwarded-Proto"] = []string{"http"}
	}
	target := &url.URL{Scheme: "http", Host: in.Host, Path: in.URL.Path, RawPath: in.URL.RawPath, RawQuery: in.URL.RawQuery, ForceQuery: in.URL.ForceQuery}
	out := &http.Request{
		Method: in.Method, URL: target, Host: in.Host, Header: header, Trailer: in.Trailer,
		Proto: "HTTP/2.0", ProtoMajor: 2, ContentLength: in.ContentLength,
	}
	if c.body != nil {
		out.Body = c.body.open()
	}
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		if code == http.StatusContinue {
			return nil // The server sends it by itself, when the body is read.
		}
		copyHeader(c.w.Header(), http.Header(header))
		c.w.WriteHeader(code)
		clear(c.w.Header())
		return nil
	}}
	return out.WithContext(httptrace.WithClientTrace(ctx, trace))
}

// answered passes an answer on, or decides what becomes of the lack of one.
func (c *call) answered(overall, ctx context.Context, answer *http.Response, err error, attempt int, outcome *balance.Outcome) (again bool) {
	port := c.client.Port
	if err != nil {
		local := c.judge(ctx, err)
		c.record.Local = local
		if local == localGone {
			return false
		}
		if local != localOverflow {
			*outcome = balance.Failure
		}
		if overall.Err() == nil && c.mayRepeat(err, local) {
			// What no backend has seen costs none of them anything, so it needs no budget.
			if unprocessed(err) && attempt <= len(port.Endpoints()) || port.Retry(attempt) {
				return true
			}
		}
		c.fail(statusOf(local), grpcOf(local), local)
		return false
	}
	defer answer.Body.Close()
	*outcome = balance.Success
	if unavailable := c.unavailable(answer); unavailable {
		*outcome = balance.Failure
		if c.mayAskAgain(answer) && port.Retry(attempt) {
			return true
		}
	}
	c.record.Local = ""
	if !c.pass(answer) {
		*outcome = balance.Failure
		if c.r.Context().Err() != nil {
			*outcome = balance.Neutral
		}
	}
	return false
}

// judge names why there is no answer.
func (c *call) judge(ctx context.Context, err error) string {
	var dial dialError
	switch {
	case c.r.Context().Err() != nil:
		return localGone
	case errors.Is(context.Cause(ctx), errTimeout), errors.Is(err, context.DeadlineExceeded):
		return localTimeout
	case errors.As(err, &dial):
		return localConnect
	case errors.Is(err, errOverflow):
		return localOverflow
	}
	return localBroken
}

// unprocessed tells errors after which the backend has surely not seen the request: it may be sent again whatever it does. The transport has no values for two of them.
func unprocessed(err error) bool {
	var dial dialError
	var stream http2.StreamError
	if errors.As(err, &dial) {
		return true
	}
	if errors.As(err, &stream) && stream.Code == http2.ErrCodeRefusedStream {
		return true
	}
	text := err.Error()
	return strings.Contains(text, "client conn not usable") || strings.Contains(text, "graceful shutdown GOAWAY")
}

// mayRepeat tells whether a request without an answer may be sent to another backend.
func (c *call) mayRepeat(err error, local string) bool {
	if c.body != nil && !c.body.repeatable() {
		return false
	}
	return unprocessed(err) || local == localOverflow || c.safe()
}

// safe: RFC 9110, 9.2.2.
func (c *call) safe() bool {
	switch c.r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// unavailable tells answers that say the backend can't serve now.
func (c *call) unavailable(answer *http.Response) bool {
	switch answer.StatusCode {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return c.grpc && answer.Header.Get("Grpc-Status") == strconv.Itoa(grpcUnavailable)
}

// mayAskAgain tells whether a request that was answered so may be sent to another backend: gRPC's clients may repeat what is UNAVAILABLE. What was read of the
// body must be at hand; its rest follows.
func (c *call) mayAskAgain(answer *http.Response) bool {
	if c.body != nil && !c.body.repeatable() {
		return false
	}
	if c.grpc {
		return answer.Header.Get("Grpc-Status") != ""
	}
	return c.safe()
}

var copyBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// pass gives the client the answer; false if it broke off.
func (c *call) pass(answer *http.Response) bool {
	if c.body != nil {
		c.body.commit()
	}
	copyHeader(c.w.Header(), answer.Header)
	if answer.ContentLength > 0 && answer.Header.Get("Content-Length") == "" {
		c.w.Header().Set("Content-Length", strconv.FormatInt(answer.ContentLength, 10))
	}
	c.began = true
	c.record.Status = answer.StatusCode
	c.w.WriteHeader(answer.StatusCode)
	out := http.NewResponseController(c.w)
	buffer := copyBuffers.Get().(*[32 << 10]byte)
	defer copyBuffers.Put(buffer)
	if answer.Body != http.NoBody && c.r.Method != http.MethodHead {
		// Before the body, since a stream's answer may begin long before its first message.
		if answer.ContentLength != 0 && answer.Header.Get("Grpc-Status") == "" {
			_ = out.Flush()
		}
	}
	for {
		n, err := answer.Body.Read(buffer[:])
		if n > 0 {
			if _, werr := c.w.Write(buffer[:n]); werr != nil {
				c.record.Local = localGone
				return false
			}
			c.record.Out += int64(n)
			if err == nil {
				_ = out.Flush()
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			c.broken()
			return false
		}
	}
	for k, v := range answer.Trailer {
		c.w.Header()[http.TrailerPrefix+k] = v
	}
	if c.grpc {
		status := answer.Trailer.Get("Grpc-Status")
		if status == "" {
			status = answer.Header.Get("Grpc-Status")
		}
		if n, err := strconv.Atoi(status); err == nil {
			c.record.GRPC = n
		}
	}
	return true
}

// broken ends an answer that has begun and can't be finished.
func (c *call) broken() {
	if c.r.Context().Err() != nil {
		c.record.Local = localGone
		return
	}
	c.record.Local = localBroken
	if c.grpc {
		c.record.GRPC = grpcUnavailable
		c.w.Header().Set(http.TrailerPrefix+"Grpc-Status", strconv.Itoa(grpcUnavailable))
		c.w.Header().Set(http.TrailerPrefix+"Grpc-Message", localBroken)
	}
}

// fail answers in the proxy's own name.
func (c *call) fail(status, grpc int, local string) {
	c.record.Local = local
	if c.grpc {
		c.record.Status, c.record.GRPC = http.StatusOK, grpc
		h := c.w.Header()
		h.Set("Content-Type", "application/grpc")
		h.Set("Grpc-Status", strconv.Itoa(grpc))
		h.Set("Grpc-Message", local)
		c.w.WriteHeader(http.StatusOK)
		return
	}
	c.record.Status = status
	c.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	c.w.WriteHeader(status)
	_, _ = io.WriteString(c.w, local+"\n")
}

func statusOf(local string) int {
	switch local {
	case localTimeout:
		return http.StatusGatewayTimeout
	case localBroken:
		return http.StatusBadGateway
	}
	return http.StatusServiceUnavailable
}

func grpcOf(local string) int {
	if local == localTimeout {
		return grpcDeadlineExceeded
	}
	return grpcUnavailable
}

// copyHeader leaves out what HTTP/2 does not have (RFC 9113, 8.2.2).
func copyHeader(to, from http.Header) {
	for k, v := range from {
		switch k {
		case "Connection", "Proxy-Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade":
		default:
			to[k] = v
		}
	}
}
