package tunnel

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"
)

// stream sends numbered packets from one machine to another, one a millisecond, and counts those that arrive.
type stream struct {
	t        *testing.T
	from, to *machine
	in       map[uint8]*net.UDPConn // of the receiver, by slot
	out      map[uint8]*net.UDPConn

	mu       sync.Mutex
	local    uint8 // the pair of slots that is sent with
	remote   uint8
	sent     uint32
	arrived  map[uint32]time.Time
	when     []time.Time
	stopping chan struct{}
	sending  sync.WaitGroup
	done     sync.WaitGroup
}

func newStream(t *testing.T, from, to *machine) *stream {
	s := &stream{
		t: t, from: from, to: to, in: map[uint8]*net.UDPConn{}, out: map[uint8]*net.UDPConn{}, arrived: map[uint32]time.Time{}, stopping: make(chan struct{}),
	}
	s.use(0, 0)
	s.sending.Add(1)
	go s.send()
	return s
}

// use makes the packets from now on go from a slot to a slot.
func (s *stream) use(local, remote uint8) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out[local] == nil {
		s.out[local] = s.from.socketAt(s.from.tunnel(local))
	}
	if s.in[remote] == nil {
		s.in[remote] = s.to.socketAt(s.to.tunnel(remote))
		s.done.Add(1)
		go s.receive(s.in[remote])
	}
	s.local, s.remote = local, remote
}

func (s *stream) send() {
	defer s.sending.Done()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-s.stopping:
			return
		case <-tick.C:
		}
		s.mu.Lock()
		n := s.sent
		s.sent++
		s.when = append(s.when, time.Now())
		out, to := s.out[s.local], netip.AddrPortFrom(s.to.tunnel(s.remote), 4789)
		s.mu.Unlock()
		// What cannot be sent is lost, and counted as such.
		_, _ = out.WriteToUDPAddrPort(binary.BigEndian.AppendUint32(nil, n), to)
	}
}

func (s *stream) receive(in *net.UDPConn) {
	defer s.done.Done()
	buffer := make([]byte, 100)
	for {
		n, err := in.Read(buffer)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil || n != 4 {
			continue // the kernel's word on one that was sent earlier
		}
		s.mu.Lock()
		s.arrived[binary.BigEndian.Uint32(buffer)] = time.Now()
		s.mu.Unlock()
	}
}

// count returns how many packets were sent and have arrived.
func (s *stream) count() (sent uint32, arrived int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent, len(s.arrived)
}

// next waits for so many packets more to arrive.
func (s *stream) next(n int, within time.Duration) {
	s.t.Helper()
	_, from := s.count()
	for deadline := time.Now().Add(within); ; time.Sleep(2 * time.Millisecond) {
		if _, arrived := s.count(); arrived >= from+n {
			return
		}
		if time.Now().After(deadline) {
			sent, arrived := s.count()
			s.t.Fatalf("nothing arrives for %s: %d sent, %d arrived", within, sent, arrived)
		}
	}
}

// end stops sending, and returns how many packets were sent and how many were lost, and the longest time without any arriving.
func (s *stream) end() (sent uint32, lost int, gap time.Duration) {
	close(s.stopping)
	s.sending.Wait()
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if sent, arrived := s.count(); arrived == int(sent) {
			break
		}
	}
	for _, c := range s.in {
		c.SetReadDeadline(time.Now())
	}
	s.done.Wait()
	for _, c := range s.in {
		c.Close()
	}
	for _, c := range s.out {
		c.Close()
	}
	var since time.Time
	for n, at := range s.when {
		_, ok := s.arrived[uint32(n)]
		switch {
		case !ok && since.IsZero():
			since = at
		case ok && !since.IsZero():
			gap, since = max(gap, at.Sub(since)), time.Time{}
		}
	}
	return s.sent, int(s.sent) - len(s.arrived), gap
}
