package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"
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
	// nodes asks from the node's address on the underlay, pods from that on the pods' side; nil without one.
	nodes, pods *echoSocket
	// podMTU is the largest packet that pods send, in bytes.
	podMTU  int
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
	e := &Echo{podMTU: d.podMTU, answers: make(chan EchoAnswer, answersBuffered), done: make(chan struct{}), log: d.log}
	if err := e.open(d); err != nil {
		return nil, errors.Join(fmt.Errorf("preparing to ask other nodes' data paths: %w", err), e.release())
	}
	go e.read()
	return e, nil
}

func (e *Echo) open(d *Datapath) (err error) {
	// A socket can be bound to the index of a device that is gone.
	if _, err := netlink.LinkByIndex(d.tunnel); err != nil {
		return fmt.Errorf("finding the tunnel device: %w", err)
	}
	if e.nodes, err = openEchoSocket(d.node, d.tunnel); err != nil {
		return err
	}
	if d.podSide.IsValid() {
		if e.pods, err = openEchoSocket(d.podSide, d.tunnel); err != nil {
			return fmt.Errorf("from the pod-side address: %w", err)
		}
	}
	// A map of its own: the data path may be closed first.
	if e.ring, err = d.echoAnswers.Clone(); err != nil {
		return err
	}
	if e.reader, err = ringbuf.NewReader(e.ring); err != nil {
		return err
	}
	return e.forget()
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
	if err := e.nodes.mayAsk(node); err != nil {
		return fmt.Errorf("asking the data path of %q: %w", node, err)
	}
	if err := e.nodes.send(node, nonce, e.nodes.smallest()); err != nil {
		return fmt.Errorf("asking the data path of %s: %w", node, err)
	}
	return nil
}

// SendPods is Send on the way of pods' packets: from this node's pod-side address (Config.PodSide) to another node's, through the address
// map and the tunnel, and back in the same way. Size is that of the packet in bytes, up to the pods' MTU, 0 the smallest possible; it is never
// fragmented, so a path with a smaller MTU loses it. The answer is of the same size, and names the other node's underlay address. A
// size that is not possible is an error, and so is a data path without Config.PodSide.
func (e *Echo) SendPods(podSide netip.Addr, nonce uint64, size int) error {
	podSide = podSide.Unmap()
	if e.pods != nil && size == 0 {
		size = e.pods.smallest()
	}
	if err := e.maySendPods(podSide, size); err != nil {
		return fmt.Errorf("asking the data path behind pod-side address %q: %w", podSide, err)
	}
	if err := e.pods.send(podSide, nonce, size); err != nil {
		return fmt.Errorf("asking the data path behind pod-side address %s with %d bytes: %w", podSide, size, err)
	}
	return nil
}

func (e *Echo) maySendPods(podSide netip.Addr, size int) error {
	if e.pods == nil {
		return errors.New("this node has no pod-side address to ask from: the data path was loaded without one")
	}
	if smallest := e.pods.smallest(); size < smallest || size > e.podMTU {
		return fmt.Errorf("a packet of %d bytes is not possible: give 0, or %d to %d, the pods' MTU", size, smallest, e.podMTU)
	}
	return e.pods.mayAsk(podSide)
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
	errs := []error{e.nodes.close(), e.pods.close()}
	if e.reader != nil {
		errs = append(errs, e.reader.Close())
	}
	return errors.Join(append(errs, e.ring.Close())...)
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
