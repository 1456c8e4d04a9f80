package testbed

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// transfer is a stream of bytes from one pod to another.
type transfer struct {
	mu sync.Mutex
	// bytes that have come, the longest time in which none came, and when the last ones did.
	bytes int64
	pause time.Duration
	last  time.Time
	err   error
	end   func()
}

// transferRate is as many bytes as are sent every transferTick: enough to fill packets, and to leave the machine to others.
const (
	transferTick  = 5 * time.Millisecond
	transferChunk = 8 << 10
)

// transfer begins to send from one pod to an address of another over one TCP connection, until the test ends.
func (m *mesh) transfer(fromNS, toNS string, at netip.AddrPort) *transfer {
	m.Helper()
	var ln net.Listener
	if err := inNS(toNS, func() (err error) {
		ln, err = net.Listen("tcp", at.String())
		return err
	}); err != nil {
		m.Fatal(err)
	}
	ctx, cancel := context.WithCancel(m.Context())
	conn, err := m.bed.dialIn(ctx, fromNS, "tcp", at.String())
	if err != nil {
		m.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		m.Fatal(err)
	}
	t := &transfer{last: time.Now()}
	var wg sync.WaitGroup
	t.end = sync.OnceFunc(func() {
		cancel()
		conn.Close()
		far.Close()
		ln.Close()
		wg.Wait()
	})
	m.Cleanup(t.end)
	wg.Go(func() {
		for chunk := make([]byte, transferChunk); pause(ctx, transferTick) == nil; {
			if _, err := conn.Write(chunk); err != nil {
				return // the other end tells
			}
		}
	})
	wg.Go(func() {
		for buf := make([]byte, 64<<10); ; {
			n, err := far.Read(buf)
			if ctx.Err() == nil {
				t.came(n, err)
			}
			if err != nil {
				return
			}
		}
	})
	return t
}

func (t *transfer) came(n int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.bytes += int64(n)
	t.pause, t.last = max(t.pause, now.Sub(t.last)), now
	if err != nil && err != io.EOF {
		t.err = err
	}
}

// look returns how many bytes have come since it last was asked, and the longest pause since then.
func (t *transfer) look() (n int64, longest time.Duration, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, longest = t.bytes, max(t.pause, time.Since(t.last))
	t.bytes, t.pause = 0, 0
	return n, longest, t.err
}

// TestPathNarrowsUnderTransfer cuts the path between two clusters to 1400 bytes while pods send each other full packets. Nobody is
// told by the path, and they go on all the same; status says it, and all is as before when the path is wide again.
func TestPathNarrowsUnderTransfer(t *testing.T) {
	m := newMeshOf(t, Options{Nodes: 1})
	ctx := t.Context()
	far := m.pod(PodSpec{Cluster: "west", Node: "node1", Name: "far", Command: []string{"sleep", "infinity"}})
	fromNS, toNS := m.bed.podNS("east", "client"), m.bed.podNS("west", "far")
	m.waitPathMTU(wantPodMTU)
	transfers := map[string]*transfer{
		"IPv4": m.transfer(fromNS, toNS, netip.AddrPortFrom(far.Address, 7000)),
		"IPv6": m.transfer(fromNS, toNS, netip.AddrPortFrom(far.Address6, 7001)),
	}
	const second = 1 << 20 // bytes that come within a second at the least, of 1.6 MB that are sent
	wantFlow := func(when string) {
		t.Helper()
		for name, tr := range transfers {
			_, _, _ = tr.look()
			m.eventually(name+" "+when, func() string {
				tr.mu.Lock()
				defer tr.mu.Unlock()
				if tr.bytes < second {
					return fmt.Sprintf("%d bytes came", tr.bytes)
				}
				return ""
			})
			if _, longest, err := tr.look(); err != nil || longest >= 2*time.Second {
				t.Errorf("%s: %s nothing came for %v, %v", name, when, longest, err)
			} else {
				t.Logf("%s: %s the longest pause was %v", name, when, longest.Round(time.Millisecond))
			}
		}
	}
	wantFlow("before")
	if err := m.bed.SetMTU(ctx, "east", "west", 1400); err != nil {
		t.Fatal(err)
	}
	wantFlow("after the cut")
	m.eventually("status names it", func() string {
		if text := m.statusText("east/node1"); !strings.Contains(text, "narrowed") {
			return text
		}
		return ""
	})
	wantFlow("on the narrow path")
	if err := m.bed.HealAll(ctx); err != nil {
		t.Fatal(err)
	}
	m.waitPathMTU(wantPodMTU)
	wantFlow("on the wide path")
	m.eventually("status names it no more", func() string {
		if text := m.statusText("east/node1"); strings.Contains(text, "narrowed") {
			return text
		}
		return ""
	})
}

// waitPathMTU waits until both sides say that the path between them is of so many bytes.
func (m *mesh) waitPathMTU(want int) {
	m.Helper()
	for _, pair := range [][2]string{{"east", "west"}, {"west", "east"}} {
		m.eventually("MTU from "+pair[0]+" to "+pair[1], func() string {
			if p := m.peerOf(pair[0], pair[1]); p == nil || p.Out.MTU != want {
				return fmt.Sprintf("%+v", p)
			}
			return ""
		})
	}
}

// statusText is what "clustermesh status" prints on a node, whatever it ends with.
func (m *mesh) statusText(node string) string {
	m.Helper()
	out, _ := run(m.T, m.bed, node, "clustermesh", "status")
	return out
}
