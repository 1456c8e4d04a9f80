package kvstore

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// segmentSize is the largest TCP segment of connections between clusters, in bytes: it fits into what IPv6 needs of every path, 1280 bytes (RFC 8200), with
// all headers.
const segmentSize = 1200

// NewDialer returns one for connections to other clusters' servers. Both sides send small segments on them, so a path with a small MTU which loses what is larger
// without a word, as those with tunnels of their own do, is no obstacle.
func NewDialer() *net.Dialer {
	return &net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		// It is a help: whatever takes no segment size does without.
		return raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, segmentSize) })
	}}
}
