package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// forwardFile is the descriptor that the forwarder's listener is handed over as: the first after those of standard input and output.
const forwardFile = 3

// acceptRetry is how long the forwarder waits when it cannot take connections.
const acceptRetry = 100 * time.Millisecond

// Forward copies connections that come in at a listener of this process's namespace, given as file descriptor 3, to an address in another network
// namespace, until ctx ends.
func Forward(ctx context.Context, netns, to string) error {
	f := os.NewFile(forwardFile, "listener")
	ln, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("descriptor %d is no listener: %w; the test-bed starts this command by itself", forwardFile, err)
	}
	f.Close()
	b := new(Bed)
	return forward(ctx, ln, func(ctx context.Context) (net.Conn, error) { return b.dialIn(ctx, netns, "tcp", to) })
}

// forward copies each connection of a listener to one that dial makes, until ctx ends and all of them have.
func forward(ctx context.Context, ln net.Listener, dial func(context.Context) (net.Conn, error)) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	var all sync.WaitGroup
	defer all.Wait()
	for {
		in, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				in.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // too many open files: those connections that are there go on, and will end
			fmt.Fprintln(os.Stderr, err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptRetry):
			}
			continue
		}
		all.Go(func() {
			defer in.Close()
			out, err := dial(ctx)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return
			}
			defer out.Close()
			defer context.AfterFunc(ctx, func() { in.Close(); out.Close() })()
			join(in, out)
		})
	}
}

// join copies both ways until both are at their end; one direction may end before the other.
func join(a, b net.Conn) {
	var both sync.WaitGroup
	for _, way := range [2][2]net.Conn{{a, b}, {b, a}} {
		both.Go(func() {
			if _, err := io.Copy(way[1], way[0]); err != nil {
				a.Close()
				b.Close()
				return
			}
			if w, ok := way[1].(interface{ CloseWrite() error }); ok {
				_ = w.CloseWrite()
			}
		})
	}
	both.Wait()
}

// startForward starts the process that makes a cluster's API server reachable at 127.0.0.1 of the machine, at the port that it had before if it
// had one.
func (b *Bed) startForward(ctx context.Context, s *State, c *ClusterState) error {
	cgroup := s.cgroup(cgroupPart(c.Name, partForward))
	if err := makeCgroup(cgroup); err != nil {
		return err
	}
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(loopback, c.Kubernetes.Port)))
	if err != nil {
		return fmt.Errorf("making the API server of cluster %s reachable: %w", c.Name, err)
	}
	defer ln.Close()
	f, err := ln.File()
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := spawn(spec{
		argv: []string{b.binary(), "testbed", "forward", b.kvstoreNS(c.Name), netip.AddrPortFrom(c.KVStore.Address, apiServerPort).String()},
		env:  b.environ(""), cgroup: cgroup, log: b.partLog(c.Name, partForward), files: []*os.File{f},
	})
	if err != nil {
		return err
	}
	c.Kubernetes.Port = ln.Addr().(*net.TCPAddr).AddrPort().Port()
	err = b.update(ctx, func(s *State) error {
		stored, err := s.cluster(c.Name)
		if err == nil {
			stored.Kubernetes.Port = c.Kubernetes.Port
		}
		return err
	})
	if err != nil {
		return err
	}
	return b.recordPart(ctx, c.Name, partForward, p)
}
