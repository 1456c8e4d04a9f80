package sim

import (
	"math"
	"math/rand/v2"
	"time"

	"causeway/clustermesh/gossip"
)

// Sizes in bytes on the wire with IPv4 and UDP headers, encrypted and labelled, as members of the real engine send them;
// TestModelAgreesWithRealMembers holds them.
const (
	pingBytes     = 164                           // also the request of an indirect one
	ackBytes      = 195                           // with a network coordinate
	stateBytes    = 123                           // of one member in an exchange of states
	exchangeBytes = 40                            // of each side of an exchange besides
	newsBytes     = 100                           // one verdict or delta, signed by nobody: who sends it in whose name is checked by name
	packetBytes   = headerBytes + 1 + 12 + 16 + 6 // around news that travels alone: version, nonce, tag, label
	tcpPingBytes  = 300
	echoBytes     = 50 + 20 + 8 + 24 // in the tunnel, with its headers
)

// traffic is what a member sends in a second while nothing changes.
type traffic struct{ packets, bytes float64 }

// idle returns a member's traffic in one pool.
func (m medium) idle() traffic {
	probes := 1 / m.ProbeInterval.Seconds()
	got := 1 - m.loss
	indirect := probes * (1 - got*got) // a direct one failed
	helpers := float64(min(indirectChecks, max(0, m.members-2)))
	// To each helper a request; what of these arrives becomes a ping, and what of the answers arrives is passed on. A
	// helper without an answer says so.
	pings := probes + indirect*helpers*(1+got)
	acks := probes*got + indirect*helpers*got*(got+1)
	exchanges := 1 / m.pushPull().Seconds() // one of its own and, in the mean, one of another's
	state := 2 * exchanges * (exchangeBytes + stateBytes*float64(m.members))
	return traffic{
		packets: pings + acks,
		bytes:   pings*pingBytes + acks*ackBytes + indirect*tcpPingBytes + state,
	}
}

// perChange returns how many bytes a member sends for one change that reaches everyone.
func (m medium) perChange() float64 {
	alone := float64(m.fan()) / m.perTick() // of the copies; the others ride on probes and answers
	return float64(m.copies()) * (newsBytes + alone*packetBytes)
}

// suspicions returns how often a live member is suspected, per second: all that probe it together send as many probes as one
// member does. A probe fails when the direct one, each indirect one and TCP do.
func (m medium) suspicions() float64 {
	got := 1 - m.loss
	direct := 1 - math.Pow(got, 2)
	helped := math.Pow(1-math.Pow(got, 4), float64(min(indirectChecks, max(0, m.members-2))))
	tcp := 1 - math.Pow(got, 4) // SYN, its answer, ping, ack: what is sent again comes too late
	return direct * helped * tcp / m.ProbeInterval.Seconds()
}

// wronged returns the probability that a live member which is suspected is declared dead by anyone before that one hears
// the refutation.
func (m medium) wronged(r *rand.Rand) float64 {
	heard := spread(r, m, []seed{{0, 1}})
	victim := 1
	if m.live > 2 {
		victim += r.IntN(m.live - 1)
	}
	at := heard.at(min(victim, m.live-1))
	m.exhaust = true
	refuted := spread(r, m, []seed{{at, 1}})
	right := 1.0
	for _, s := range heard.later(steps(m.suspicion())) {
		right *= math.Pow(1-refuted.unaware(s.at, m.live), float64(s.members))
	}
	return 1 - right
}

// unanswered is the probability that all echoes of a live node get lost that a verdict takes at least: two watchers' round
// trips, each lost for itself.
func (m medium) unanswered(t gossip.Timing) float64 {
	echoes := t.Echoes
	if m.live > 2 {
		echoes += t.OtherEchoes
	}
	return math.Pow(1-(1-m.loss)*(1-m.loss), float64(echoes))
}

const (
	hour = float64(time.Hour / time.Second)
	day  = 24 * hour
)
