package gossip

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/memberlist"
)

// A probe is a packet of 32 bytes to a gossip port: the magic, a byte that says whether it is a question or the answer, and 23 that whoever asks has chosen.
// It is not encrypted, and says nothing. The answer is as long as the question and goes only to nodes, so nobody gains by asking in another's name.
// memberlist's own packets begin with the byte 244, since they have a label.
const (
	probeMagic    = "cwprobe\x01"
	probeSize     = 32
	probeQuestion = 'q'
	probeAnswer   = 'a'
)

// ErrNobodyListens says that a node refused a probe: packets come through to it, but no agent of it has that port open.
var ErrNobodyListens = errors.New("nobody listens there, but the way is open")

// How often a probe is sent, and how long an answer to the last is waited for at most.
const (
	probeAttempts = 3
	probePause    = 200 * time.Millisecond
	probePatience = 5 * time.Second
)

// Probe asks over UDP whether a node's gossip port answers, without being a member of its pool, and returns the round trip. Only nodes that are known from
// a store are answered. ErrNobodyListens says that only the node's agent is missing, or is no speaker and to is its mesh port.
func (g *Gossip) Probe(ctx context.Context, to netip.AddrPort) (time.Duration, error) {
	dialer := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(g.Address, 0))}
	conn, err := dialer.DialContext(ctx, "udp", to.String())
	if err != nil {
		return 0, fmt.Errorf("gossip probe of %s: %w", to, err)
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	nonce := make([]byte, probeSize-len(probeMagic)-2)
	_, _ = rand.Read(nonce) // never fails
	var sent [probeAttempts]time.Time
	for n := range sent {
		sent[n] = time.Now()
		if _, err := conn.Write(probePacket(probeQuestion, byte(n), nonce)); err != nil {
			return 0, probeFailed(to, err)
		}
		wait := probePause
		if n == len(sent)-1 {
			wait = probePatience
		}
		at, answered, err := g.awaitAnswer(ctx, conn, nonce, sent[n].Add(wait))
		switch {
		case err == nil && int(answered) <= n:
			return max(at.Sub(sent[answered]), 1), nil
		case ctx.Err() != nil:
			return 0, fmt.Errorf("gossip probe of %s: none of %d packets was answered: %w; UDP does not get there or back, or no store tells that node of %s", to, n+1, ctx.Err(), g.Address)
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			return 0, probeFailed(to, err)
		}
	}
	return 0, fmt.Errorf("gossip probe of %s: none of %d packets was answered; UDP does not get there or back, or no store tells that node of %s", to, len(sent), g.Address)
}

func probePacket(kind, attempt byte, nonce []byte) []byte {
	return append(append([]byte(probeMagic), kind, attempt), nonce...)
}

func probeFailed(to netip.AddrPort, err error) error {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("gossip probe of %s: %w (%w)", to, ErrNobodyListens, err)
	}
	return fmt.Errorf("gossip probe of %s: %w", to, err)
}

// awaitAnswer reads until an answer comes, and returns which of the questions it is to.
func (g *Gossip) awaitAnswer(ctx context.Context, conn net.Conn, nonce []byte, until time.Time) (time.Time, byte, error) {
	if err := conn.SetReadDeadline(until); err != nil {
		return time.Time{}, 0, err
	}
	buf := make([]byte, probeSize+1)
	for ctx.Err() == nil {
		n, err := conn.Read(buf)
		if err != nil {
			return time.Time{}, 0, err
		}
		attempt := buf[len(probeMagic)+1]
		if attempt < probeAttempts && bytes.Equal(buf[:n], probePacket(probeAnswer, attempt, nonce)) {
			return time.Now(), attempt, nil
		}
	}
	return time.Time{}, 0, ctx.Err()
}

// answers bounds the answers to probes, over all ports of this node together.
type answers struct {
	mu   sync.Mutex
	last [maxAnswers]time.Time
	next int
}

// maxAnswers is how many probes are answered in any second.
const maxAnswers = 100

func (a *answers) allow(now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now.Sub(a.last[a.next]) < time.Second {
		return false
	}
	a.last[a.next] = now
	a.next = (a.next + 1) % maxAnswers
	return true
}

// transport is memberlist's, but for probes, which it answers itself.
type transport struct {
	memberlist.NodeAwareTransport
	known   func(netip.Addr) bool
	answers *answers
	packets chan *memberlist.Packet
	done    chan struct{}
	ended   sync.WaitGroup
	once    sync.Once
	err     error
}

func newTransport(inner memberlist.NodeAwareTransport, known func(netip.Addr) bool, answers *answers) *transport {
	t := &transport{NodeAwareTransport: inner, known: known, answers: answers, packets: make(chan *memberlist.Packet), done: make(chan struct{})}
	t.ended.Go(t.sort)
	return t
}

// sort hands on what is not a probe.
func (t *transport) sort() {
	for {
		select {
		case p := <-t.NodeAwareTransport.PacketCh():
			if t.probe(p) {
				continue
			}
			select {
			case t.packets <- p:
			case <-t.done:
				return
			}
		case <-t.done:
			return
		}
	}
}

// probe tells whether a packet is one, and answers it if it is to be.
func (t *transport) probe(p *memberlist.Packet) bool {
	if len(p.Buf) != probeSize || !bytes.HasPrefix(p.Buf, []byte(probeMagic)) {
		return false
	}
	from, err := netip.ParseAddrPort(p.From.String())
	if err == nil && p.Buf[len(probeMagic)] == probeQuestion && t.known(from.Addr().Unmap()) && t.answers.allow(time.Now()) {
		p.Buf[len(probeMagic)] = probeAnswer
		// It may get lost on the way as well as here.
		_, _ = t.WriteToAddress(p.Buf, memberlist.Address{Addr: from.String()})
	}
	return true
}

// PacketCh has what is memberlist's.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// Shutdown closes the ports. Packets are handed on until the inner transport has ended, which may have one to get rid of.
func (t *transport) Shutdown() error {
	t.once.Do(func() {
		t.err = t.NodeAwareTransport.Shutdown()
		close(t.done)
		t.ended.Wait()
	})
	return t.err
}
