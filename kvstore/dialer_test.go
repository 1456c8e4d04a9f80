package kvstore

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDialerMakesBothSidesSendSmallSegments, in both families.
func TestDialerMakesBothSidesSendSmallSegments(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		conn, err := NewDialer().DialContext(t.Context(), "tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		for _, c := range []net.Conn{conn, accepted} {
			if size := maxSegment(t, c); size > segmentSize {
				t.Errorf("%s sends segments of %d bytes to %s", c.LocalAddr(), size, c.RemoteAddr())
			}
		}
	}
}

func maxSegment(t *testing.T, c net.Conn) (size int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { size, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return size
}
