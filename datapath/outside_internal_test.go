package datapath

import "testing"

// TestPortsBeside: connections from outside get none that a socket gets, and as many as there are.
func TestPortsBeside(t *testing.T) {
	for _, c := range []struct {
		low, high uint16
		want      portRange
	}{
		{32768, 60999, portRange{first: 1024, count: 31744}},
		{1024, 32767, portRange{first: 32768, count: 32768}},
		{10000, 20000, portRange{first: 20001, count: 45535}},
		{1024, 64511, portRange{first: 64512, count: 1024}},
		{2048, 65535, portRange{first: 1024, count: 1024}},
		{1024, 65535, portRange{first: 64512, count: 1024, overlap: true}},
		{1, 65000, portRange{first: 64512, count: 1024, overlap: true}},
		{60000, 60001, portRange{first: 1024, count: 58976}},
	} {
		if got := portsBeside(c.low, c.high); got != c.want {
			t.Errorf("beside %d to %d: %+v, want %+v", c.low, c.high, got, c.want)
		}
	}
}
