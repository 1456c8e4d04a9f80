package testbed

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// tap looks at every packet that enters any device of a network namespace, from its IP header on. What a port of the underlay's bridge
// sends was received by another one, so the taps of the underlay see each packet of every link once.
type tap struct {
	fd   int
	quit chan struct{}
	done sync.WaitGroup
}

// tapBuffer holds what comes while nobody looks, in bytes.
const tapBuffer = 64 << 20

// newTap hands each packet to see, one at a time, until it is stopped; see must not keep it.
func newTap(ns string, see func(packet []byte)) (*tap, error) {
	s := &tap{quit: make(chan struct{})}
	const allProtocols = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // network byte order
	err := inNS(ns, func() (err error) {
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, allProtocols)
		return err
	})
	if err != nil {
		return nil, err
	}
	for option, value := range map[[2]int]int{
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE}:         tapBuffer,
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING}: 1,
	} {
		if err := unix.SetsockoptInt(s.fd, option[0], option[1], value); err != nil {
			unix.Close(s.fd)
			return nil, err
		}
	}
	s.done.Go(func() { s.collect(see) })
	return s, nil
}

func (s *tap) collect(see func([]byte)) {
	buf := make([]byte, 1<<17) // what is still to be cut into segments comes whole
	for {
		n, _, err := unix.Recvfrom(s.fd, buf, unix.MSG_TRUNC)
		if err == nil {
			see(buf[:min(n, len(buf))])
			continue
		}
		select {
		case <-s.quit:
			return
		default:
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}, 20)
	}
}

// stop ends it when all that has come was looked at, and returns how many packets found no room.
func (s *tap) stop() (missed uint32, err error) {
	close(s.quit)
	s.done.Wait()
	stats, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err == nil {
		missed = stats.Drops
	}
	unix.Close(s.fd)
	return missed, err
}

// wiretap counts what can be read on the underlay.
type wiretap struct {
	tap    *tap
	marker []byte
	seen   sighting
}

// wiretap begins to look at the whole underlay. What it returns ends that, and says what was seen.
func (m *mesh) wiretap(marker string) (end func() sighting) {
	m.Helper()
	w := &wiretap{marker: []byte(marker), seen: sighting{examples: map[string]string{}}}
	var err error
	if w.tap, err = newTap(m.bed.underlayNS(), func(p []byte) { w.seen.see(p, w.marker) }); err != nil {
		m.Fatal(err)
	}
	end = sync.OnceValue(func() sighting {
		missed, err := w.tap.stop()
		if err != nil {
			m.Error(err)
		}
		w.seen.missed = missed
		return w.seen
	})
	m.Cleanup(func() { end() })
	return end
}

// sighting is what a wiretap has seen.
type sighting struct {
	packets, marked, vxlan, fragments int
	missed                            uint32
	// examples of what should not be there, one of a kind.
	examples map[string]string
}

func (s sighting) String() string {
	text := fmt.Sprintf("%d packets (and %d missed): %d with the marker, %d with a VXLAN header, %d fragments", s.packets, s.missed, s.marked, s.vxlan, s.fragments)
	for kind, example := range s.examples {
		text += fmt.Sprintf("\n%s: %s", kind, example)
	}
	return text
}

func (s *sighting) see(packet, marker []byte) {
	s.packets++
	note := func(count *int, kind string, there bool) {
		if !there {
			return
		}
		*count++
		if _, ok := s.examples[kind]; !ok {
			s.examples[kind] = fmt.Sprintf("%x", packet[:min(len(packet), 160)])
		}
	}
	note(&s.marked, "marker", bytes.Contains(packet, marker))
	note(&s.vxlan, "VXLAN", hasVXLAN(packet))
	note(&s.fragments, "fragment", isFragment(packet))
}

// hasVXLAN tells whether a VXLAN header (RFC 7348) follows a UDP header to its port, at any place of a packet: flags with the I bit alone,
// and zeros where they are reserved.
func hasVXLAN(p []byte) bool {
	for at := 0; ; at += 2 {
		i := bytes.Index(p[at:], []byte{4789 >> 8, 4789 & 0xff})
		if i < 0 {
			return false
		}
		// Destination port, length and checksum of UDP, then flags, 24 bits of zeros, VNI, 8 bits of zeros.
		if at += i; at+14 <= len(p) && bytes.Equal(p[at+6:at+10], []byte{0x08, 0, 0, 0}) && p[at+13] == 0 {
			return true
		}
	}
}

// isFragment tells whether an IP packet is a part of one, by RFC 791 or the header of RFC 8200.
func isFragment(p []byte) bool {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		const moreOrOffset = 0x3fff
		return binary.BigEndian.Uint16(p[6:])&moreOrOffset != 0
	case len(p) >= 40 && p[0]>>4 == 6:
		return p[6] == unix.IPPROTO_FRAGMENT
	}
	return false
}
