package health

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"

	"causeway/lb/l7/balance"
)

// maxAnswer bounds what is read of an answer, in bytes.
const maxAnswer = 64 << 10

// checkHTTP is well with a status of 200 to 399.
func checkHTTP(ctx context.Context, conn net.Conn, e *balance.Endpoint, path string) error {
	transport := &http.Transport{
		DialContext:            func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: maxAnswer,
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host(e)+path, nil)
	if err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	request.Header.Set("User-Agent", userAgent)
	answer, err := transport.RoundTrip(request) // redirects are answers too
	if err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	defer answer.Body.Close()
	_, _ = io.CopyN(io.Discard, answer.Body, maxAnswer)
	if answer.StatusCode < 200 || answer.StatusCode >= 400 {
		return fmt.Errorf("GET %s: status %d", path, answer.StatusCode)
	}
	return nil
}

const userAgent = "causeway-health"

// host is what a client of the service would write.
func host(e *balance.Endpoint) string {
	name := e.Port().Key().Service
	return name.Name + "." + name.Namespace
}

// checkGRPC is well if grpc.health.v1.Health/Check answers SERVING
// (https://github.com/grpc/grpc/blob/master/doc/health-checking.md). The message has one field each way, so that no stub is needed for it.
func checkGRPC(ctx context.Context, conn net.Conn, e *balance.Endpoint, service string) error {
	transport := &http.Transport{
		Protocols:              new(http.Protocols),
		DialContext:            func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		MaxResponseHeaderBytes: maxAnswer,
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+host(e)+"/grpc.health.v1.Health/Check", bytes.NewReader(healthRequest(service)))
	if err != nil {
		return fmt.Errorf("gRPC health: %w", err)
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("Te", "trailers")
	request.Header.Set("User-Agent", userAgent)
	answer, err := transport.RoundTrip(request)
	if err != nil {
		return fmt.Errorf("gRPC health: %w", err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("gRPC health: %w", err)
	}
	status := answer.Trailer.Get("Grpc-Status")
	if status == "" {
		status = answer.Header.Get("Grpc-Status") // trailers only
	}
	if answer.StatusCode != http.StatusOK || status != "0" {
		return fmt.Errorf("gRPC health of service %q: HTTP status %d, gRPC status %q", service, answer.StatusCode, status)
	}
	if serving := healthAnswer(body); serving != 1 {
		return fmt.Errorf("gRPC health of service %q: %s", service, servingNames[min(serving, uint64(len(servingNames)-1))])
	}
	return nil
}

var servingNames = []string{"UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN", "an unknown status"}

// healthRequest is a length-prefixed HealthCheckRequest{service = 1}.
func healthRequest(service string) []byte {
	var message []byte
	if service != "" {
		message = binary.AppendUvarint(append(message, 1<<3|2), uint64(len(service)))
		message = append(message, service...)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

// healthAnswer reads the status of a length-prefixed HealthCheckResponse{status = 1}; 0 is UNKNOWN, also of what is no such message.
func healthAnswer(body []byte) uint64 {
	if len(body) < 7 || body[0] != 0 || binary.BigEndian.Uint32(body[1:]) != uint32(len(body)-5) || body[5] != 1<<3 {
		return 0
	}
	status, n := binary.Uvarint(body[6:])
	if n <= 0 {
		return 0
	}
	return status
}
