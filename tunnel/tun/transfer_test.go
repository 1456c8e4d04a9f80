package tun

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTransfer sends through WireGuard with this device at both ends, and VXLAN inside. All must arrive as it was sent, and the kernel must find
// no checksum wrong.
func TestTransfer(t *testing.T) {
	for _, outer := range []int{4, 6} {
		for _, loss := range []float64{0, 0.01} {
			p := newPair(t, outer == 6, nil)
			for i := range p {
				p[i].bind.lose(loss)
			}
			bursts := uint32(200)
			if loss > 0 {
				bursts = 15 // Each loss costs the wait for what does not come.
			}
			for family, inner := range []int{4, 6} {
				t.Run(fmt.Sprintf("outer%d/loss%.0f%%/tcp%d", outer, loss*100, inner), func(t *testing.T) { p.transferTCP(t, family, 8<<20) })
				t.Run(fmt.Sprintf("outer%d/loss%.0f%%/udp%d", outer, loss*100, inner), func(t *testing.T) { p.transferUDP(t, family, bursts) })
			}
			p.expectSound(t)
			p.expectLarge(t, loss)
			if lost := p[0].bind.lostPackets(); (loss > 0) != (lost > 0) {
				t.Errorf("%d packets were lost on the way, at a loss of %g", lost, loss)
			}
		}
	}
}

// TestTransferWithoutTunnels has a kernel that does not know of packets of tunnels, at one end or at both.
func TestTransferWithoutTunnels(t *testing.T) {
	for _, c := range []struct {
		name string
		less []func(d *Device)
	}{
		{"both", []func(*Device){withoutTunnels, withoutTunnels}},
		{"the sender", []func(*Device){withoutTunnels, nil}},
		{"the receiver", []func(*Device){nil, withoutTunnels}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, false, func(i int, d *Device) {
				if c.less[i] != nil {
					c.less[i](d)
				}
			})
			for family := range 2 {
				p.transferTCP(t, family, 2<<20)
				p.transferUDP(t, family, 20)
			}
			p.expectSound(t)
		})
	}
}

// withoutTunnels has the kernel leave checksums alone to the device, as one before 6.17 would that knows no large packets.
func withoutTunnels(d *Device) {
	d.offload = offload{}
	d.raw.Control(func(fd uintptr) { unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM) })
}

// TestRefusedIsWrittenOneByOne has a kernel that does not take packets put together, though it said that it would.
func TestRefusedIsWrittenOneByOne(t *testing.T) {
	p := newPair(t, false, func(i int, d *Device) {
		if d.Tunnels() {
			d.offload.beyond = 0xf000 // an offset that no kernel takes
		}
	})
	p.transferTCP(t, 0, 2<<20)
	if got := p[1].device.Counts(); p[1].device.Tunnels() && (got.Refused == 0 || got != Counts{Refused: got.Refused}) {
		t.Errorf("the device counts %+v, want some that were refused", got)
	}
}

// expectSound reports what the kernel or the devices found wrong.
func (p *pair) expectSound(t *testing.T) {
	t.Helper()
	for i, n := range p {
		for _, counter := range []string{"Tcp.InCsumErrors", "Udp.InCsumErrors", "Udp6.InCsumErrors", "Ip.InHdrErrors", "Ip6.InHdrErrors", "Ip.ReasmReqds", "Ip6.ReasmReqds"} {
			if got := n.counter(t, counter); got != 0 {
				t.Errorf("node %d: %s is %d", i, counter, got)
			}
		}
		if got := n.device.Counts(); got != (Counts{}) {
			t.Errorf("node %d: the device counts %+v", i, got)
		}
	}
}

// expectLarge reports if packets crossed one by one where the kernel takes large ones.
func (p *pair) expectLarge(t *testing.T, loss float64) {
	t.Helper()
	if !p[0].device.Tunnels() || loss > 0 {
		return
	}
	sent, _ := p[0].perPacket(t)
	if _, received := p[1].perPacket(t); sent < 4*wireGuardMTU || received < 4*wireGuardMTU {
		t.Errorf("a packet into the device has %d bytes on average, and one out of the other %d; they were not large ones", sent, received)
	}
}

func (p *pair) transferTCP(t *testing.T, family int, length int64) {
	at := netip.AddrPortFrom(p[1].inside[family], 7000)
	var listener net.Listener
	p[1].ns.do(t, func() {
		var err error
		listener, err = net.Listen("tcp", at.String())
		must(t, err)
	})
	defer listener.Close()
	var c net.Conn
	p[0].ns.do(t, func() {
		var err error
		c, err = net.DialTimeout("tcp", at.String(), 20*time.Second)
		must(t, err)
	})
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(time.Minute)))

	received := make(chan hash.Hash, 1)
	go func() {
		h := sha256.New()
		if accepted, err := listener.Accept(); err == nil {
			io.Copy(h, accepted)
			accepted.Close()
		}
		received <- h
	}()
	sent := sha256.New()
	_, err := io.Copy(io.MultiWriter(c, sent), io.LimitReader(mathrand.NewChaCha8([32]byte{byte(family)}), length))
	must(t, err)
	c.Close()
	if got := (<-received).Sum(nil); !bytes.Equal(got, sent.Sum(nil)) {
		t.Errorf("the %d bytes did not arrive as they were sent", length)
	}
}

const datagram = 1200

// transferUDP sends bursts that the kernel passes on as one packet, until so many have arrived in full; what is lost of a burst is sent anew.
func (p *pair) transferUDP(t *testing.T, family int, bursts uint32) {
	const burst = 20
	at := netip.AddrPortFrom(p[1].inside[family], 7001)
	var to, from net.Conn
	p[1].ns.do(t, func() {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		must(t, err)
		to = c
	})
	defer to.Close()
	p[0].ns.do(t, func() {
		c, err := net.Dial("udp", at.String())
		must(t, err)
		must(t, setSegmentSize(c.(*net.UDPConn), datagram))
		from = c
	})
	defer from.Close()
	deadline, buffer := time.Now().Add(time.Minute), make([]byte, 1<<16)
	for n := range bursts {
		message := make([]byte, burst*datagram-300) // The last one is shorter.
		for i := range burst {
			binary.BigEndian.PutUint32(message[i*datagram:], n)
			binary.BigEndian.PutUint32(message[i*datagram+4:], uint32(i))
			mathrand.NewChaCha8([32]byte{byte(n), byte(i)}).Read(message[i*datagram+8 : min((i+1)*datagram, len(message))])
		}
		missing := map[uint32]bool{}
		for i := range uint32(burst) {
			missing[i] = true
		}
		for len(missing) > 0 && time.Now().Before(deadline) {
			_, err := from.Write(message)
			must(t, err)
			receiveBurst(t, to, buffer, message, missing)
		}
		if len(missing) > 0 {
			t.Fatalf("of burst %d, %d datagrams did not arrive", n, len(missing))
		}
	}
}

// receiveBurst reads until all of the burst is there, or nothing comes for a while.
func receiveBurst(t *testing.T, c net.Conn, buffer, message []byte, missing map[uint32]bool) {
	for len(missing) > 0 {
		must(t, c.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
		n, err := c.Read(buffer)
		if err != nil {
			return
		}
		if !bytes.Equal(buffer[:4], message[:4]) {
			continue // of an earlier burst, that came twice
		}
		i := binary.BigEndian.Uint32(buffer[4:])
		if from := int(i) * datagram; !bytes.Equal(buffer[:n], message[from:min(from+datagram, len(message))]) {
			t.Fatalf("datagram %d arrived as something else", i)
		}
		delete(missing, i)
	}
}

func setSegmentSize(c *net.UDPConn, size int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = syscall.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size) })
	if err == nil {
		err = failed
	}
	return err
}
