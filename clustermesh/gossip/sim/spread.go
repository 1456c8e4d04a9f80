package sim

import (
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"time"

	"causeway/clustermesh/gossip"
)

// step is the model's resolution. All that happens within one happens at once.
const step = 5 * time.Millisecond

// steps returns how many steps last at least d.
func steps(d time.Duration) int { return int((d + step - 1) / step) }

// What memberlist.DefaultLANConfig sets and no profile changes.
const (
	indirectChecks    = 3
	pushPullThreshold = 32 // members, above which memberlist exchanges states less often
)

// medium is a pool as news sees it.
type medium struct {
	gossip.Profile
	members int     // as memberlist counts them: also those that died lately
	live    int     // who can learn something and tell it
	loss    float64 // of a packet, each for itself
	delay   int     // one way, in steps; at least one
	urgent  int     // members that a seed tells at once
	// exhaust has a spreading go on after everyone knows, until nobody tells any more: how unlikely it was that somebody
	// would be left out shows only then.
	exhaust bool
}

// copies is how often a member sends one piece of news: memberlist's retransmitLimit.
func (m medium) copies() int {
	return m.RetransmitMult * int(math.Ceil(math.Log10(float64(m.members+1))))
}

// suspicion is how long a suspect has to refute: memberlist's suspicionTimeout, the minimum of which applies from the start
// while SuspicionMult is 2 or less.
func (m medium) suspicion() time.Duration {
	scale := math.Max(1, math.Log10(math.Max(1, float64(m.members))))
	return time.Duration(float64(m.SuspicionMult) * scale * float64(m.ProbeInterval))
}

// pushPull is the time between two of a member's exchanges of states: memberlist's pushPullScale.
func (m medium) pushPull() time.Duration {
	if m.members <= pushPullThreshold {
		return m.PushPullInterval
	}
	scale := math.Ceil(math.Log2(float64(m.members))-math.Log2(pushPullThreshold)) + 1
	return time.Duration(scale) * m.PushPullInterval
}

// seed is members that learn the news by themselves, not by gossip.
type seed struct{ at, members int }

// curve says how many members know, step by step. Members are alike, so that the order in which they learn is any order:
// of the one that learns as the r-th, curve.at(r) is when.
type curve struct {
	first int   // step of known[0]
	known []int // how many know at the end of each step
	// missing is the logarithm of the probability that a given member has not been sent the news by the end of each step, by the
	// packets that there were.
	missing []float64
	late    []int // steps at which those whom gossip missed learn by an exchange of states, ascending
}

// at returns when the member of that rank learns, from 0 on.
func (c *curve) at(rank int) int {
	i := sort.SearchInts(c.known, rank+1)
	if i < len(c.known) {
		return c.first + i
	}
	by := 0
	if len(c.known) > 0 {
		by = c.known[len(c.known)-1]
	}
	return c.late[rank-by]
}

// unaware is the probability that a given member has not heard by gossip at the end of a step. It is known also where nobody of so
// many was left out.
func (c *curve) unaware(at, members int) float64 {
	i := min(at-c.first, len(c.missing)-1)
	if i < 0 {
		return 1
	}
	// One of the senders was the member itself, if it has heard.
	return math.Exp(c.missing[i] * float64(members-1) / float64(members))
}

// last returns when everyone knows.
func (c *curve) last() int {
	if len(c.late) > 0 {
		return c.late[len(c.late)-1]
	}
	return c.first + len(c.known) - 1
}

// sends is the packets of one step: [b] is how many members sent to b different ones.
type sends [maxFan + 1]int

// maxFan is the most members that one member sends to at once.
const maxFan = 16

func (s *sends) add(o sends) {
	for b := range s {
		s[b] += o[b]
	}
}

func (s *sends) total() (packets int) {
	for b, n := range s {
		packets += b * n
	}
	return packets
}

// spreading is one piece of news on its way through a pool, step by step. It counts members instead of following each, so
// that a million cost what a hundred do. memberlist's rules: every GossipInterval, each at a moment of its own, a member
// that has news sends it to GossipNodes members; its probes and answers carry it as well; after copies() it stops.
type spreading struct {
	m        medium
	r        *rand.Rand
	unknown  int
	cohorts  [][]int // [phase of the gossip tick][ticks since it was learnt] members
	active   int     // members in cohorts
	flying   []sends // by step of arrival, a ring
	inFlight int
	hit      []uint64 // a bit for each that did not know before this step, if there are few
	missing  float64  // logarithm of the probability that a given member has not been hit
}

// spread returns how news goes round that its seeds learn at their times; these must be ascending. A seed that has heard
// it by then changes nothing.
func spread(r *rand.Rand, m medium, seeds []seed) *curve {
	s := newSpreading(r, m)
	c := &curve{first: seeds[0].at, known: make([]int, 0, 128)}
	due := 0 // seeds whose time has come, in members
	for at := c.first; (s.unknown > 0 || m.exhaust) && (s.busy() || len(seeds) > 0 && seeds[0].at <= at+patience); at++ {
		learnt := s.arrive(at)
		for len(seeds) > 0 && seeds[0].at <= at {
			// Those that were due earlier know; of the others, any may have heard.
			fresh := s.still(seeds[0].members, due)
			s.unknown -= fresh
			due += seeds[0].members
			learnt += fresh
			s.push(at, fresh)
			seeds = seeds[1:]
		}
		s.send(at)
		s.begin(learnt)
		c.known = append(c.known, m.live-s.unknown)
		c.missing = append(c.missing, s.missing)
	}
	c.late = s.exchange(c.first + len(c.known))
	return c
}

// patience is for how many steps a spreading that has come to rest waits for its next seed. One that comes later is
// late because an exchange of states told it, which reaches all others as soon.
const patience = 200

// bitmapped is up to how many members it is noted who was hit in a step; among more, hardly anybody is hit twice.
const bitmapped = 4096

func newSpreading(r *rand.Rand, m medium) *spreading {
	s := &spreading{m: m, r: r, unknown: m.live, cohorts: make([][]int, m.phases()), flying: make([]sends, m.delay+1)}
	ticks := m.ticks()
	counts := make([]int, ticks*len(s.cohorts))
	for i := range s.cohorts {
		s.cohorts[i] = counts[i*ticks : (i+1)*ticks]
	}
	if m.members <= bitmapped {
		s.hit = make([]uint64, (m.members+63)/64)
	}
	return s
}

// busy tells whether the news is still on its way.
func (s *spreading) busy() bool { return s.active > 0 || s.inFlight > 0 }

// phases is how many moments there are for a gossip tick.
func (m medium) phases() int { return max(1, int(m.GossipInterval/step)) }

// perTick is how many copies leave a member in one GossipInterval: by its tick, and with its probes and answers.
func (m medium) perTick() float64 {
	return float64(m.fan()) + 2*float64(m.GossipInterval)/float64(m.ProbeInterval)
}

func (m medium) fan() int { return min(m.GossipNodes, m.members-1, maxFan) }

// ticks is how many ticks a member tells news for.
func (m medium) ticks() int { return int(math.Ceil(float64(m.copies()) / m.perTick())) }

// still returns how many of some members that were not due before do not know yet.
func (s *spreading) still(members, due int) int {
	others := s.m.live - due
	if others <= 0 {
		return 0
	}
	return min(s.unknown, binomial(s.r, members, float64(s.unknown)/float64(others)))
}

// arrive has the packets of this step received, and returns how many learn by them.
func (s *spreading) arrive(at int) (learnt int) {
	slot := at % len(s.flying)
	packets := s.flying[slot]
	s.flying[slot] = sends{}
	total := packets.total()
	if total == 0 {
		return 0
	}
	s.inFlight -= total
	missed := s.missed(packets)
	switch {
	case total <= 64 && s.hit != nil:
		learnt = s.hits(packets)
	default:
		learnt = binomial(s.r, s.unknown, -math.Expm1(missed))
	}
	s.missing += missed
	s.unknown -= learnt
	return learnt
}

// missed is the logarithm of the probability that none of the packets reaches a given member.
func (s *spreading) missed(packets sends) (log float64) {
	for b, n := range packets {
		if n > 0 {
			log += float64(n) * math.Log1p(-min(1-1e-12, float64(b)*(1-s.m.loss)/float64(s.m.members-1)))
		}
	}
	return log
}

// hits draws the packets' targets, and returns how many different members of those that did not know were hit.
func (s *spreading) hits(packets sends) (learnt int) {
	clear(s.hit)
	for b, n := range packets {
		for range n {
			learnt += s.sendTo(b)
		}
	}
	return learnt
}

// sendTo draws different targets for the packets of one member, and returns how many of them are hit for the first time.
func (s *spreading) sendTo(packets int) (learnt int) {
	var targets [maxFan]int
	for i := 0; i < packets; {
		target := s.r.IntN(s.m.members - 1)
		if slices.Contains(targets[:i], target) {
			continue
		}
		targets[i] = target
		i++
		if target >= s.unknown || s.m.loss > 0 && s.r.Float64() < s.m.loss {
			continue // it knows, or is dead, or hears nothing
		}
		if bit := uint64(1) << (target % 64); s.hit[target/64]&bit == 0 {
			s.hit[target/64] |= bit
			learnt++
		}
	}
	return learnt
}

// send has the members gossip whose tick it is, and some of the others probe or answer.
func (s *spreading) send(at int) {
	var out sends
	out[1] = binomial(s.r, s.active, 2*float64(step)/float64(s.m.ProbeInterval))
	cohort := s.cohorts[at%len(s.cohorts)]
	s.active -= cohort[len(cohort)-1]
	for k := len(cohort) - 1; k >= 0; k-- {
		out.add(s.tick(k, cohort[k]))
		if k > 0 {
			cohort[k] = cohort[k-1]
		}
	}
	cohort[0] = 0
	// The oldest have now sent their last copies; all others have moved on by one tick.
	s.fly(at, out)
}

// push has members tell at once what is urgent.
func (s *spreading) push(at, members int) {
	if s.m.urgent > 0 {
		var out sends
		out[min(s.m.urgent, s.m.members-1, maxFan)] = members
		s.fly(at, out)
	}
}

func (s *spreading) fly(at int, out sends) {
	s.inFlight += out.total()
	s.flying[(at+s.m.delay)%len(s.flying)].add(out)
}

// tick returns what members send at their tick after k others.
func (s *spreading) tick(k, members int) (out sends) {
	if members == 0 {
		return out
	}
	left := float64(s.m.copies()) - float64(k)*s.m.perTick()
	whole := min(int(left), s.m.fan())
	more := 0
	if whole < s.m.fan() {
		more = binomial(s.r, members, left-float64(int(left)))
		out[whole+1] += more
	}
	out[whole] += members - more
	return out
}

// begin spreads those who have just learnt the news over the phases of their ticks, which nobody has agreed upon.
func (s *spreading) begin(members int) {
	s.active += members
	left := len(s.cohorts) // phases
	for ; left > 1 && members > 20*left; left-- {
		here := binomial(s.r, members, 1/float64(left))
		s.cohorts[left-1][0] += here
		members -= here
	}
	for range members {
		s.cohorts[s.r.IntN(left)][0]++
	}
}

// exchange returns when those that gossip has missed learn by an exchange of states: at their own next one, or when
// somebody chooses them for one.
func (s *spreading) exchange(from int) (late []int) {
	interval := float64(s.m.pushPull()) / float64(step)
	for range s.unknown {
		own, chosen := s.r.Float64()*interval, s.r.ExpFloat64()*interval
		late = append(late, from+int(min(own, chosen)))
	}
	sort.Ints(late)
	return late
}
