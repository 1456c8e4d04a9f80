package gossip

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"causeway/identity"
)

// TestProbeAnswers: nodes that are known get answers of the same size, at both ports, 100 a second; others none.
func TestProbeAnswers(t *testing.T) {
	inFakeTime(t, func(t *testing.T) {
		m := newMesh(t)
		n := m.add("east/n1")
		m.add("west/n1")
		m.start()
		stranger := netip.MustParseAddr("203.0.113.9")
		friend := netip.MustParseAddr("198.51.100.7") // of a cluster that is no peer
		n.SetNodes(append(m.rows(), identity.Node{Cluster: "south", Name: "n1", Address: friend}))
		ask := func(from netip.Addr, port uint16, packets int, packet []byte) (answers int) {
			socket := m.net.open(netip.AddrPortFrom(from, 4711))
			for range packets {
				_, _ = socket.WriteToAddress(packet, memberlist.Address{Addr: netip.AddrPortFrom(n.row.Address, port).String()})
			}
			time.Sleep(100 * time.Millisecond)
			for {
				select {
				case p := <-socket.packets:
					if string(p.Buf) != string(probePacket(probeAnswer, packet[9], packet[10:])) {
						t.Errorf("answer %q", p.Buf)
					}
					answers++
				default:
					return answers
				}
			}
		}
		nonce := []byte("0123456789012345678901")
		question := probePacket(probeQuestion, 1, nonce)
		for _, c := range []struct {
			what    string
			from    netip.Addr
			port    uint16
			packet  []byte
			sent    int
			answers int
		}{
			{"a node", friend, 7956, question, 1, 1},
			{"the mesh's port", friend, 7957, question, 1, 1},
			{"a stranger", stranger, 7956, question, 3, 0},
			{"an answer", friend, 7956, probePacket(probeAnswer, 1, nonce), 1, 0},
			{"too long", friend, 7956, append(question, 0), 1, 0},
			{"too short", friend, 7956, question[:31], 1, 0},
			{"many", friend, 7956, question, 500, 98}, // two have been answered in this second
		} {
			if got := ask(c.from, c.port, c.sent, c.packet); got != c.answers {
				t.Errorf("%s: %d answers, want %d", c.what, got, c.answers)
			}
		}
		time.Sleep(time.Second)
		if ask(friend, 7957, 1, question) != 1 {
			t.Error("no answer a second later")
		}
		m.quiet()
	})
}

// TestProbe over the kernel's UDP, of either address family.
func TestProbe(t *testing.T) {
	t.Run("IPv4", func(t *testing.T) { testProbe(t, "127.0.0.2", "127.0.0.3") })
	t.Run("IPv6", func(t *testing.T) { testProbe(t, "::1", "::1") })
}

func testProbe(t *testing.T, from, to string) {
	m := newMesh(t)
	asks, answers := m.add("east/n1"), m.add("west/n1")
	asks.Address, answers.Address = netip.MustParseAddr(from), netip.MustParseAddr(to)
	answers.Port = freePort(t, answers.Address)
	closed := netip.AddrPortFrom(answers.Address, freePort(t, answers.Address))
	answers.Gossip.transport = nil
	answers.run()
	m.eventually("the port is open", func() string {
		if len(answers.Overview().Pools) == 0 {
			return "no pool"
		}
		return ""
	})
	open := netip.AddrPortFrom(answers.Address, answers.Port)

	silent, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := asks.Probe(silent, open); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), from) {
		t.Errorf("a stranger: %v", err)
	}
	answers.SetNodes([]identity.Node{{Cluster: "east", Name: "n1", Address: asks.Address}})
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	rtt, err := asks.Probe(ctx, open)
	if err != nil || rtt <= 0 || rtt > 5*time.Second {
		t.Errorf("%v, %v", rtt, err)
	}
	t.Logf("round trip %v", rtt)
	if _, err := asks.Probe(ctx, closed); !errors.Is(err, ErrNobodyListens) {
		t.Errorf("a closed port: %v", err)
	}
}

// freePort is one that nobody listened on a moment ago.
func freePort(t *testing.T, at netip.Addr) uint16 {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}
