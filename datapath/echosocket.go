package datapath

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// echoSocket sends requests from an address of the node, which need not be one of a device. It makes the packets itself and hands them to the
// tunnel device, so that both address families take the same way, and no route, fragmentation or path MTU of the kernel's has a say.
// Nothing is received by it: programs take the answers before the stack sees them.
type echoSocket struct {
	from   netip.Addr
	port   uint16 // that requests are from
	device int
	file   *os.File
	raw    syscall.RawConn
}

// openEchoSocket opens a packet socket that sends by the device of the calling thread's network namespace.
func openEchoSocket(from netip.Addr, device int) (*echoSocket, error) {
	// Of protocol 0, it receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a packet socket: %w", err)
	}
	// A port of those that kernels give to clients: it chooses among the ways that the underlay may have.
	s := &echoSocket{from: from, port: uint16(32768 + rand.IntN(28232)), device: device, file: os.NewFile(uintptr(fd), "echo socket")}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// mayAsk tells why requests can't go to the address.
func (s *echoSocket) mayAsk(to netip.Addr) error {
	if !to.IsValid() || to.Is4() != s.from.Is4() {
		return fmt.Errorf("it is no %s address, as %s is, which would ask", echoFamily(s.from).name, s.from)
	}
	if to == s.from {
		return errors.New("that is this node, whose packets to itself go through no tunnel")
	}
	return nil
}

// smallest is the size of a request's IP packet that has nothing but the message, in bytes.
func (s *echoSocket) smallest() int { return echoFamily(s.from).headers + echoMessageSize }

// send sends a request whose IP packet has so many bytes, and doesn't wait.
func (s *echoSocket) send(to netip.Addr, nonce uint64, size int) error {
	packet, err := echoRequest(netip.AddrPortFrom(s.from, s.port), to, nonce, size)
	if err != nil {
		return err
	}
	at := &unix.SockaddrLinklayer{Protocol: toBE16(echoFamily(s.from).etherType), Ifindex: s.device}
	var sent error
	err = s.raw.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), packet, unix.MSG_DONTWAIT, at)
		return true // Also if the buffer is full: a late request would be of no use.
	})
	if errors.Is(sent, unix.ENOBUFS) {
		sent = nil // The device's program or queue has dropped it, and counted that: as lost as anywhere on the way.
	}
	return errors.Join(err, sent)
}

func (s *echoSocket) close() error {
	if s == nil {
		return nil
	}
	if err := s.file.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
