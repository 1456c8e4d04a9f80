package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// answersBuffered is how many answers wait for a slow reader; a mesh's nodes are asked a few at a time.
const answersBuffered = 256

// EchoAnswer says that a node's data path is alive.
type EchoAnswer struct {
	Node  netip.Addr
	Nonce uint64
	// At is when the answer was read, which may be later than it came.
	At time.Time
}

// Echo asks the data paths of other nodes, by packets that their overlay programs answer without any process: see
// bpf/lib/echo.h. Its methods are safe for concurrent use.
type Echo struct {
	node    netip.Addr
	conn    *net.UDPConn
	raw     syscall.RawConn
	ring    *ebpf.Map
	reader  *ringbuf.Reader
	answers chan EchoAnswer
	done    chan struct{}
	log     *slog.Logger
}

// OpenEcho lets the node ask others, on the tunnel device of the calling thread's network namespace. What came before is
// forgotten. One may be open at a time: two would share the answers. Close it when done.
//
// It is bound to the device that the data path was loaded with. If that is removed, every Send fails, also when
// another one of the name is made: load the data path again then.
func (d *Datapath) OpenEcho() (*Echo, error) {
	e := &Echo{node: d.node, answers: make(chan EchoAnswer, answersBuffered), done: make(chan struct{}), log: d.log}
	if err := e.open(d.tunnel, d.echoAnswers); err != nil {
		return nil, errors.Join(fmt.Errorf("preparing to ask other nodes' data paths: %w", err), e.release())
	}
	go e.read()
	return e, nil
}

func (e *Echo) open(device int, answers *ebpf.Map) (err error) {
	// A socket can be bound to the index of a device that is gone.
	if _, err := netlink.LinkByIndex(device); err != nil {
		return fmt.Errorf("finding the tunnel device: %w", err)
	}
	if e.conn, err = listenEcho(e.node, device); err != nil {
		return err
	}
	if e.raw, err = e.conn.SyscallConn(); err != nil {
		return err
	}
	// A map of its own: the data path may be closed first.
	if e.ring, err = answers.Clone(); err != nil {
		return err
	}
	if e.reader, err = ringbuf.NewReader(e.ring); err != nil {
		return err
	}
	return e.forget()
}

// listenEcho returns a socket from whose address requests are sent. Nothing is received by it: programs take the
// answers before the stack sees them.
func listenEcho(node netip.Addr, device int) (*net.UDPConn, error) {
	options := []struct {
		name          string
		option, value int
	}{
		// The route to the other node is by the underlay; this one is by the tunnel.
		{"binding to the tunnel device", unix.SO_BINDTOIFINDEX, device},
		{"leaving out checksums", unix.SO_NO_CHECK, 1},
		{"receiving as little as possible", unix.SO_RCVBUF, 0},
	}
	cfg := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var errs []error
		err := raw.Control(func(fd uintptr) {
			for _, o := range options {
				if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, o.option, o.value); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", o.name, err))
				}
			}
		})
		return errors.Join(append(errs, err)...)
	}}
	conn, err := cfg.ListenPacket(context.Background(), "udp4", netip.AddrPortFrom(node, 0).String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

// forget takes out of the ring what was sent to an agent that is gone.
func (e *Echo) forget() error {
	e.reader.SetDeadline(time.Now())
	// As often as records fit, in case that they come faster than they are taken.
	for range e.reader.BufferSize() / binary.Size(bpfEchoAnswer{}) {
		_, err := e.reader.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return fmt.Errorf("emptying the ring of answers: %w", err)
		}
	}
	e.reader.SetDeadline(time.Time{})
	return nil
}

// Send asks the node at the underlay address, and doesn't wait. The nonce comes back in the answer. An
// error means that the kernel refused to send, as it does (EAGAIN) while too many requests wait for the device; none doesn't
// mean that the packet left the node.
func (e *Echo) Send(node netip.Addr, nonce uint64) error {
	node = node.Unmap()
	if !node.Is4() {
		return fmt.Errorf("asking the data path of %q: it is no IPv4 address", node)
	}
	if node == e.node {
		return fmt.Errorf("asking the data path of %s: that is this node, whose packets to itself go through no tunnel", node)
	}
	message, err := binary.Append(nil, binary.NativeEndian, bpfEchoMessage{
		Magic: [8]uint8([]byte("causeway")), Type: uint8(bpfEchoTypeECHO_REQUEST), Nonce: nonce,
	})
	if err != nil {
		return err
	}
	to := &unix.SockaddrInet4{Port: int(bpfEchoPortECHO_PORT), Addr: node.As4()}
	var sent error
	err = e.raw.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), message, unix.MSG_DONTWAIT, to)
		return true // Also if the buffer is full: a late request would be of no use.
	})
	if err := errors.Join(err, sent); err != nil {
		return fmt.Errorf("asking the data path of %s: %w", node, err)
	}
	return nil
}

// SendPods is Send on the way of pods' packets: from this node's pod-side address (Config.PodSide) to another node's, through the address
// map and the tunnel, and back in the same way. Size is that of the packet in bytes, up to the pods' MTU, 0 the smallest possible; it is never
// fragmented, so a path with a smaller MTU loses it. The answer is of the same size.
func (e *Echo) SendPods(podSide netip.Addr, nonce uint64, size int) error {
	return errors.New("not implemented")
}

// Answers returns the channel of answers, which Close closes. A reader that is too slow loses answers; nobody waits for it.
func (e *Echo) Answers() <-chan EchoAnswer { return e.answers }

// Close ends the asking. The data path goes on answering others.
func (e *Echo) Close() error {
	err := e.reader.Close()
	<-e.done
	return errors.Join(err, e.release())
}

func (e *Echo) release() error {
	var errs []error
	if e.conn != nil {
		errs = append(errs, ignoreClosed(e.conn.Close()))
	}
	if e.reader != nil {
		errs = append(errs, e.reader.Close())
	}
	return errors.Join(append(errs, e.ring.Close())...)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// read passes answers on until the reader is closed.
func (e *Echo) read() {
	defer close(e.done)
	defer close(e.answers)
	var record ringbuf.Record
	for {
		if err := e.reader.ReadInto(&record); err != nil {
			if !errors.Is(err, ringbuf.ErrClosed) {
				e.log.Error("answers of other nodes' data paths can't be read any more", "error", err)
			}
			return
		}
		var answer bpfEchoAnswer
		if _, err := binary.Decode(record.RawSample, binary.NativeEndian, &answer); err != nil {
			continue // Shorter than this version's: from a program that is about to be replaced.
		}
		select {
		case e.answers <- EchoAnswer{Node: netip.AddrFrom16(answer.Node.Bytes).Unmap(), Nonce: answer.Nonce, At: time.Now()}:
		default:
		}
	}
}
