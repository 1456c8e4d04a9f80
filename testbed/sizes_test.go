package testbed

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// wantPodMTU is the largest that an underlay of 1500 bytes and IPv4 has room for: 60 bytes are WireGuard's, which leaves a multiple of 16, and 50 are VXLAN's.
	wantPodMTU = 1390
	// sizesBeyond the MTU are cut into fragments by the pod that sends them.
	sizesBeyond = 200
	// sizeTimeout is how long one answer may take.
	sizeTimeout = 5 * time.Second
)

// pattern is n bytes that differ from those of other sizes.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + n)
	}
	return b
}

// eachSize calls ask for 1 … MTU+200 bytes, until it fails.
func eachSize(t *testing.T, ask func(sent []byte) (got []byte, err error)) {
	t.Helper()
	for n := 1; n <= wantPodMTU+sizesBeyond; n++ {
		sent := pattern(n)
		got, err := ask(sent)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%d bytes: %d came back, equal: %v, %v", n, len(got), bytes.Equal(got, sent), err)
		}
	}
}

// TestAllSizes sends packets of all sizes from pod to pod across clusters. Each arrives and comes back, and none is cut on the underlay.
func TestAllSizes(t *testing.T) {
	m := newMeshOf(t, Options{Nodes: 1})
	from := m.bed.podNS("east", "client")
	to := m.pod(PodSpec{Cluster: "west", Node: "node1", Name: "mirror", Command: []string{"sleep", "infinity"}})
	for _, pod := range []string{from, m.bed.podNS("west", "mirror")} {
		if mtu := linkMTU(t, pod, "eth0"); mtu != wantPodMTU {
			t.Errorf("the MTU of %s is %d, want %d", pod, mtu, wantPodMTU)
		}
	}
	seen := m.wiretap("nothing of that kind")
	for _, a := range []netip.Addr{to.Address, to.Address6} {
		at := netip.AddrPortFrom(a, 7000)
		m.mirror(m.bed.podNS("west", "mirror"), at)
		t.Run(fmt.Sprintf("UDP to %v", a), func(t *testing.T) {
			conn := dialPod(t, m.bed, from, "udp", at)
			eachSize(t, func(sent []byte) ([]byte, error) {
				conn.SetDeadline(time.Now().Add(sizeTimeout))
				if _, err := conn.Write(sent); err != nil {
					return nil, err
				}
				got := make([]byte, 1<<16)
				n, err := conn.Read(got)
				return got[:n], err
			})
		})
		t.Run(fmt.Sprintf("TCP to %v", a), func(t *testing.T) {
			conn := dialPod(t, m.bed, from, "tcp", at)
			eachSize(t, func(sent []byte) ([]byte, error) {
				conn.SetDeadline(time.Now().Add(sizeTimeout))
				if _, err := conn.Write(sent); err != nil {
					return nil, err
				}
				got := make([]byte, len(sent))
				_, err := io.ReadFull(conn, got)
				return got, err
			})
		})
		t.Run(fmt.Sprintf("ICMP to %v", a), func(t *testing.T) { pingSizes(t, from, a) })
	}
	if s := seen(); s.fragments > 0 || s.packets < 1000 {
		t.Errorf("on the underlay: %v", s)
	}
}

func dialPod(t *testing.T, b *Bed, ns, network string, at netip.AddrPort) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), sizeTimeout)
	defer cancel()
	conn, err := b.dialIn(ctx, ns, network, at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func linkMTU(t *testing.T, ns, name string) (mtu int) {
	t.Helper()
	err := withHandle(ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err == nil {
			mtu = link.Attrs().MTU
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return mtu
}

// mirror sends back, in a pod, what comes to an address over TCP and UDP, until the test ends.
func (m *mesh) mirror(ns string, at netip.AddrPort) {
	m.Helper()
	var ln net.Listener
	var packets net.PacketConn
	err := inNS(ns, func() (err error) {
		if ln, err = net.Listen("tcp", at.String()); err != nil {
			return err
		}
		packets, err = net.ListenPacket("udp", at.String())
		return err
	})
	if err != nil {
		m.Fatal(err)
	}
	done := make(chan struct{}, 2)
	go func() {
		sendBack(packets)
		done <- struct{}{}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}
	}()
	m.Cleanup(func() {
		ln.Close()
		packets.Close()
		<-done
		<-done
	})
}

// pingSizes sends echo requests (RFC 792, RFC 4443) with all sizes of the IP packet but those that have no room for the headers.
func pingSizes(t *testing.T, ns string, to netip.Addr) {
	t.Helper()
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	var conn *net.IPConn
	err := inNS(ns, func() (err error) {
		conn, err = net.DialIP(network, nil, &net.IPAddr{IP: to.AsSlice()})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sequence := uint16(0)
	eachSize(t, func(sent []byte) ([]byte, error) {
		sequence++
		packet := make([]byte, 8, 8+len(sent))
		packet[0] = request
		binary.BigEndian.PutUint16(packet[4:], uint16(unix.Getpid()))
		binary.BigEndian.PutUint16(packet[6:], sequence)
		packet = append(packet, sent...)
		if to.Is4() { // of ICMPv6 the kernel makes it, which knows the addresses
			binary.BigEndian.PutUint16(packet[2:], checksum(packet))
		}
		conn.SetDeadline(time.Now().Add(sizeTimeout))
		if _, err := conn.Write(packet); err != nil {
			return nil, err
		}
		buf := make([]byte, 1<<16)
		for {
			n, _, err := conn.ReadFromIP(buf) // it takes the IPv4 header off
			if err != nil {
				return nil, err
			}
			got := buf[:n]
			if n >= 8 && got[0] == reply && bytes.Equal(got[4:8], packet[4:8]) {
				return got[8:], nil
			}
			if n < 8 {
				return got, errors.New("too short for an answer")
			}
		}
	})
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
