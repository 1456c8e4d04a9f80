package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// echoHeaders is what precedes an echo's message in its IP packet, in bytes: IPv4 without options, and UDP.
const echoHeaders = 20 + 8

// smallestEcho is the size of an echo's IP packet that has nothing but the message, in bytes.
var smallestEcho = echoHeaders + binary.Size(bpfEchoMessage{})

// echoSocket sends requests from an address of the node. Nothing is received by it: programs take the answers before the stack
// sees them.
type echoSocket struct {
	from netip.Addr
	conn *net.UDPConn
	raw  syscall.RawConn
}

// socketOption is one that holds a number.
type socketOption struct {
	name                 string
	level, option, value int
}

// podSideOptions let a socket send from an address that no device of the node has, packets as large as the device carries. These are
// never fragmented, whatever the kernel has learned of the path: that it carries a size is what is asked.
var podSideOptions = []socketOption{
	{"sending from an address of no device", unix.SOL_IP, unix.IP_TRANSPARENT, 1},
	{"not fragmenting", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE},
}

// openEchoSocket binds a socket to the address, and to the device: the route to the other node may be by another one.
func openEchoSocket(from netip.Addr, device int, more ...socketOption) (*echoSocket, error) {
	options := append([]socketOption{
		{"binding to the tunnel device", unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, device},
		{"leaving out checksums", unix.SOL_SOCKET, unix.SO_NO_CHECK, 1},
		{"receiving as little as possible", unix.SOL_SOCKET, unix.SO_RCVBUF, 0},
	}, more...)
	cfg := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var errs []error
		err := raw.Control(func(fd uintptr) {
			for _, o := range options {
				if err := unix.SetsockoptInt(int(fd), o.level, o.option, o.value); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", o.name, err))
				}
			}
		})
		return errors.Join(append(errs, err)...)
	}}
	conn, err := cfg.ListenPacket(context.Background(), "udp4", netip.AddrPortFrom(from, 0).String())
	if err != nil {
		return nil, err
	}
	s := &echoSocket{from: from, conn: conn.(*net.UDPConn)}
	if s.raw, err = s.conn.SyscallConn(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// mayAsk tells why requests can't go to the address.
func (s *echoSocket) mayAsk(to netip.Addr) error {
	if !to.Is4() {
		return errors.New("it is no IPv4 address")
	}
	if to == s.from {
		return errors.New("that is this node, whose packets to itself go through no tunnel")
	}
	return nil
}

// send sends a request whose IP packet has so many bytes, and doesn't wait.
func (s *echoSocket) send(to netip.Addr, nonce uint64, size int) error {
	message, err := binary.Append(make([]byte, 0, size), binary.NativeEndian, bpfEchoMessage{
		Magic: [8]uint8([]byte("causeway")), Type: uint8(bpfEchoTypeECHO_REQUEST), Nonce: nonce,
	})
	if err != nil {
		return err
	}
	message = message[:size-echoHeaders] // The rest is zeros.
	at := &unix.SockaddrInet4{Port: int(bpfEchoPortECHO_PORT), Addr: to.As4()}
	var sent error
	err = s.raw.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), message, unix.MSG_DONTWAIT, at)
		return true // Also if the buffer is full: a late request would be of no use.
	})
	return errors.Join(err, sent)
}

func (s *echoSocket) close() error {
	if s == nil {
		return nil
	}
	if err := s.conn.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
