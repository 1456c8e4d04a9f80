package tun

import "testing"

func TestSum(t *testing.T) {
	b := make([]byte, 300)
	for i := range b {
		b[i] = byte(i*i + 251)
	}
	for length := range len(b) {
		want := uint32(0)
		for i, v := range b[:length] {
			if want += uint32(v) << (8 * (1 - i%2)); want > 0xffff {
				want -= 0xffff
			}
		}
		if got := sum(b[:length]); got != uint16(want) {
			t.Errorf("the sum of %d bytes is %#x, want %#x", length, got, want)
		}
	}
}

func BenchmarkSum(b *testing.B) {
	packet := make([]byte, wireGuardMTU)
	b.SetBytes(int64(len(packet)))
	for b.Loop() {
		sum(packet)
	}
}
