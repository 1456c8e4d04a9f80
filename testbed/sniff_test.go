package testbed

import (
	"sync"

	"golang.org/x/sys/unix"
)

// sniffer collects what passes the underlay.
type sniffer struct {
	fd      int
	quit    chan struct{}
	done    sync.WaitGroup
	packets [][]byte
}

func newSniffer(b *Bed) (*sniffer, error) {
	s := &sniffer{quit: make(chan struct{})}
	const allProtocols = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // network byte order
	err := inNS(b.underlayNS(), func() (err error) {
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, allProtocols)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.done.Go(s.collect)
	return s, nil
}

func (s *sniffer) collect() {
	buf := make([]byte, 2048)
	for {
		select {
		case <-s.quit:
			return
		default:
		}
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, 20); n == 0 || err != nil {
			continue
		}
		if n, _, err := unix.Recvfrom(s.fd, buf, 0); err == nil {
			s.packets = append(s.packets, append([]byte(nil), buf[:min(n, 64)]...))
		}
	}
}

// stop returns the packets, each cut to its first 64 bytes.
func (s *sniffer) stop() [][]byte {
	close(s.quit)
	s.done.Wait()
	unix.Close(s.fd)
	return s.packets
}
