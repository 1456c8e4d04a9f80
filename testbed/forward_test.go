package testbed

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
)

func listenLoopback(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func TestForwardCopiesBothWaysAndEndsEachByItself(t *testing.T) {
	server, ln := listenLoopback(t), listenLoopback(t)
	go func() {
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			// It answers when it has heard all: the end of one direction must come through while the other is open.
			all, _ := io.ReadAll(c)
			_, _ = c.Write(append([]byte("heard "), all...))
			c.Close()
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		ended <- forward(ctx, ln, func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", server.Addr().String())
		})
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Write([]byte("a question"))
	_ = c.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "heard a question" {
		t.Errorf("answered %q, %v", got, err)
	}

	open, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("ended with %v", err)
	}
	// A connection that is open ends with it.
	if got, _ := io.ReadAll(open); len(got) > 0 {
		t.Errorf("answered %q", got)
	}
}

func TestForwardWithNobodyThere(t *testing.T) {
	ln := listenLoopback(t)
	ended := make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		ended <- forward(ctx, ln, func(context.Context) (net.Conn, error) { return nil, errors.New("connection refused") })
	}()
	for range 2 { // the first one that fails does not end it
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := io.ReadAll(c); len(got) > 0 {
			t.Errorf("answered %q", got)
		}
		c.Close()
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
