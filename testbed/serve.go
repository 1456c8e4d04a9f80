package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"
)

// ServedByHeader names who answered, in every answer of [Serve].
const ServedByHeader = "X-Served-By"

// drainTime is what requests in flight get when a server is told to end.
const drainTime = 2 * time.Second

// Served is the body of an answer of [Serve].
type Served struct {
	ServedBy string      `json:"servedBy"`
	Hostname string      `json:"hostname"`
	Address  string      `json:"address"` // that the request came to, after translation
	Client   string      `json:"client"`  // that it came from
	Method   string      `json:"method"`
	Path     string      `json:"path"`
	Host     string      `json:"host"`
	Headers  http.Header `json:"headers"`
}

// Serve answers HTTP/1.1, HTTP/2 with prior knowledge, and gRPC on listen with who it is and what it saw, and sends back what comes to the same port over UDP, until ctx
// ends; then it takes no more and finishes those that it has. ready, if set, is told the address.
func Serve(ctx context.Context, name, listen string, ready func(net.Addr)) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("port %s is taken by another program here: choose another with --listen, or end that program (%w)", listen, err)
	}
	if err != nil {
		return fmt.Errorf("listening on %s: %w", listen, err)
	}
	packets, err := new(net.ListenConfig).ListenPacket(ctx, "udp", ln.Addr().String())
	if err != nil {
		return errors.Join(fmt.Errorf("listening on %s over UDP: %w", ln.Addr(), err), ln.Close())
	}
	var returning sync.WaitGroup
	returning.Go(func() { sendBack(packets) })
	defer returning.Wait()
	defer packets.Close()
	server := &http.Server{Handler: (&pod{name: name}).handler(), ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ln) }()
	if ready != nil {
		ready(ln.Addr())
	}
	select {
	case err := <-ended:
		return fmt.Errorf("serving on %s: %w", listen, err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	err = server.Shutdown(drain)
	if err != nil {
		server.Close() // requests that take longer than drainTime
	}
	<-ended
	return err
}

// sendBack returns every packet to its sender until packets is closed.
func sendBack(packets net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := packets.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = packets.WriteTo(buf[:n], from) // who sends over UDP expects losses
		}
	}
}

// served is what the server saw of a request.
func (p *pod) served(r *http.Request) Served {
	hostname, _ := os.Hostname()
	served := Served{
		ServedBy: p.name, Hostname: hostname, Client: r.RemoteAddr,
		Method: r.Method, Path: r.URL.Path, Host: r.Host, Headers: r.Header,
	}
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		served.Address = a.String()
	}
	return served
}
