package http1

import (
	"io"
	"net"
	"os"
	"syscall"
)

// link is a connection that is waited for without holding a buffer.
type link struct {
	conn net.Conn
	raw  syscall.RawConn // nil: it is no socket, as in tests, and reads block
}

func newLink(c net.Conn) link {
	l := link{conn: c}
	if s, ok := c.(syscall.Conn); ok {
		l.raw, _ = s.SyscallConn()
	}
	return l
}

const noFD = ^uintptr(0)

// loop calls f when there may be something to read, at first at once, until that returns true. It may return false only
// when a read has found nothing (the poller tells of a connection's end once only, maybe together with the data before it), or before anything can have come.
func (l *link) loop(f func(fd uintptr) bool) error {
	if l.raw != nil {
		return l.raw.Read(f)
	}
	for !f(noFD) {
	}
	return nil
}

// errAgain: there is nothing to read now.
var errAgain error = syscall.EAGAIN

// tryRead reads what is there, in loop's f.
func (l *link) tryRead(fd uintptr, p []byte) (int, error) {
	if fd == noFD {
		return l.conn.Read(p)
	}
	for {
		n, err := syscall.Read(int(fd), p)
		switch {
		case n > 0:
			return n, nil
		case err == nil:
			return 0, io.EOF
		case err == syscall.EAGAIN:
			return 0, errAgain
		case err != syscall.EINTR:
			return 0, os.NewSyscallError("read", err)
		}
	}
}

// quiet: the other side has neither sent anything nor closed, as far as that can be seen without waiting.
func quiet(fd uintptr) bool {
	if fd == noFD {
		return true
	}
	var one [1]byte
	for {
		_, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err != syscall.EINTR {
			return err == syscall.EAGAIN
		}
	}
}

// hard makes the connection end by a reset when it is closed, so that the other side can't take what it has got for the whole.
func (l *link) hard() {
	if c, ok := l.conn.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
}
