package tun

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
)

// smallPackets are large ones that are small, since fuzzers spend much time with what is long.
func smallPackets() (all []large) {
	for _, family := range []int{4, 6} {
		all = append(all, tcpPacket(family, 100, 30, tcpACK|tcpPSH, nil), tcpPacket(family, 20, 7, tcpACK|tcpFIN, []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}),
			tcpPacket(family, 5, 30, tcpACK, nil), udpPacket(family, 100, 33), udpPacket(family, 3, 33))
	}
	return all
}

// FuzzSegments gives the device what a kernel that is out of its mind would: nothing may panic, no packet may be larger than the
// MTU, and what is sound comes out sound.
func FuzzSegments(f *testing.F) {
	for _, outer := range []int{4, 6} {
		for _, l := range smallPackets() {
			h, packet := encapsulate(outer, l)
			var b [headerSize]byte
			h.encode(b[:])
			f.Add(append(b[:], packet...), uint16(wireGuardMTU))
		}
	}
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, mtu uint16) {
		if len(b) < headerSize {
			return
		}
		var s segments
		if err := s.load(decodeHeader(b), bytes.Clone(b[headerSize:]), int(mtu)); err != nil {
			if s.more() {
				t.Fatalf("%v, and there are segments all the same", err)
			}
			return
		}
		total := 0
		for s.more() {
			length := s.length()
			if length > int(mtu) || length <= 0 {
				t.Fatalf("a segment has %d bytes, and the MTU is %d", length, mtu)
			}
			p := make([]byte, length)
			s.take(p)
			total += length
		}
		if total < len(b)-headerSize {
			t.Fatalf("of %d bytes came out %d", len(b)-headerSize, total)
		}
	})
}

// FuzzCoalesce gives a batch of packets from the wire, made from sound ones with bytes changed. None may get lost, be doubled or overtake another of
// its flow, and groups that are split again are the packets that they were made of.
func FuzzCoalesce(f *testing.F) {
	f.Add(uint8(0), uint8(0), []byte{})
	f.Add(uint8(3), uint8(12), []byte{1, 0, 20, 7, 2, 0, 63, 1, 0, 1, 0, 0})
	f.Add(uint8(17), uint8(6), []byte{0, 0, 2, 9, 0, 0, 3, 200})
	all := smallPackets()
	f.Fuzz(func(t *testing.T, kind, version uint8, changes []byte) {
		outer := 4 + int(version&1)*2
		l := all[int(kind)%len(all)]
		packets := wirePackets(t, outer, l)[:min(l.segments, 20)]
		packets = append(packets, wirePackets(t, outer, all[int(version)%len(all)])[:1]...)
		for ; len(changes) >= 4; changes = changes[4:] {
			p := packets[int(changes[0])%len(packets)]
			p[int(binary.BigEndian.Uint16(changes[1:]))%len(p)] ^= changes[3]
		}
		before := slices.Clone(packets)
		for i := range before {
			before[i] = bytes.Clone(before[i])
		}
		groups := gathered(packets)
		expectOrder(t, l.name, groups, packets)
		if !slices.EqualFunc(packets, before, bytes.Equal) {
			t.Fatal("packets were changed")
		}
		for i := range groups {
			if !slices.EqualFunc(groups[i].split(t), groups[i].packets, sameButForIdentification) {
				t.Fatalf("group %d is not what it was made of", i)
			}
		}
	})
}

// sameButForIdentification compares packets, but for IPv4's identifications: nobody reads those of the outer header, nor of a packet that must not be
// fragmented.
func sameButForIdentification(a, b []byte) bool {
	x, y := bytes.Clone(a), bytes.Clone(b)
	for _, p := range [][]byte{x, y} {
		if w, ok := parse(p, vxlanPort); ok {
			for _, ip := range [][]byte{p, p[w.network:]} {
				if ip[0]>>4 == 4 {
					clear(ip[4:6])
					clear(ip[10:12])
				}
			}
			clear(p[w.outer+udpChecksum : w.outer+udpChecksum+2])
		}
	}
	return bytes.Equal(x, y)
}

// FuzzParse gives anything for a packet from the wire.
func FuzzParse(f *testing.F) {
	for _, outer := range []int{4, 6} {
		for _, l := range smallPackets() {
			f.Add(wirePackets(f, outer, l)[0])
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		groups := gathered([][]byte{b, b, bytes.Clone(b)})
		n := 0
		for i := range groups {
			n += len(groups[i].split(t))
		}
		if n != 3 {
			t.Fatalf("of 3 packets came out %d", n)
		}
	})
}
