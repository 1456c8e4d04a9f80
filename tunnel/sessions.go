package tunnel

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"causeway/identity"
)

// Times of WireGuard ("WireGuard: Next Generation Kernel Network Tunnel", section 6.1): how old a session may get before packets are no longer sent with
// it, and how long after an attempt to make a session the next one follows.
const (
	rejectAfter  = 180 * time.Second
	rekeyTimeout = 5 * time.Second
)

// Asking for sessions. Two initiations that cross destroy each other, and the next ones follow after rekeyTimeout; so does the next after one that
// was lost. So the side with the larger key lets the other one go first, and a peer that does not get a session is
// removed and added again, which lets it be asked at once.
const (
	letGoFirst   = 500 * time.Millisecond
	firstWait    = time.Second
	longestWait  = 10 * time.Second
	asksAtOnce   = 200 // peers that are asked in one go, so that answers don't all come at once
	betweenAsks  = 20 * time.Millisecond
	mostAsks     = 2000             // after a look that took long
	askKeepalive = 25 * time.Second // any: what counts is that it begins
)

// session is what is known of a peer at a slot's device.
type session struct {
	shaken    bool
	handshake time.Time // of the last one
	received  int64     // bytes
	sent      int64     // bytes
	// failing is since when packets have been sent that found the session too old; zero: none.
	failing time.Time
	// asked counts how often there has been no session; due is when to ask next, zero if not.
	asked int
	due   time.Time
}

// see notes what the device says, and returns whether there is a session.
func (x *session) see(have *wgtypes.Peer, now time.Time) bool {
	if have.LastHandshakeTime.Unix() <= 0 {
		return false
	}
	if !have.LastHandshakeTime.Equal(x.handshake) || now.Sub(have.LastHandshakeTime) < rejectAfter {
		x.failing = time.Time{}
		return true
	}
	// An idle session is renewed by its first packet. If it isn't, it is none.
	if have.TransmitBytes > x.sent && x.failing.IsZero() {
		x.failing = now
	}
	return x.shaken && (x.failing.IsZero() || now.Sub(x.failing) < rekeyTimeout)
}

// observe notes what the device says of a wanted peer.
func (w *WireGuard) observe(s *slot, p *peer, have *wgtypes.Peer, now time.Time) {
	x, known := s.sessions[p.key]
	if !known {
		x = &session{}
		s.sessions[p.key] = x
	}
	shaken := x.see(have, now)
	x.handshake, x.received, x.sent = have.LastHandshakeTime, have.ReceiveBytes, have.TransmitBytes
	if have.Endpoint != nil && shaken {
		w.learn(p, have.Endpoint.AddrPort(), now)
	}
	switch {
	case shaken:
		x.asked, x.due = 0, time.Time{}
	case x.shaken || !known:
		x.asked, x.due = 0, s.firstAsk(p, now)
		s.pace.hurry()
	}
	x.shaken = shaken
	w.view.set(pair{p.node, s.number, p.remote}, shaken)
}

// learn notes where a peer's packets come from.
func (w *WireGuard) learn(p *peer, from netip.AddrPort, now time.Time) {
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if from == p.endpoint {
		from = netip.AddrPort{}
	}
	if p.learned != from {
		p.learned = from
		w.saved.change(now)
	}
}

// expect begins to wait for the session of a peer that was just added; asked tells whether it has been asked for with it.
func (w *WireGuard) expect(s *slot, p *peer, now time.Time, asked bool) {
	x := &session{}
	if asked {
		x.asked, x.due = 1, s.nextAsk(p, 1, now)
	} else {
		x.due = s.firstAsk(p, now)
	}
	s.sessions[p.key] = x
	s.pace.hurry()
	w.view.set(pair{p.node, s.number, p.remote}, false)
}

// goesFirst tells whether this side asks first.
func (s *slot) goesFirst(p *peer) bool { return bytes.Compare(s.public[:], p.key[:]) < 0 }

// firstAsk returns when to ask for a session. Peers of a device that was lost likely hold a session that this node has not, so they will not ask.
func (s *slot) firstAsk(p *peer, now time.Time) time.Time {
	if !p.goesTo().IsValid() {
		return time.Time{}
	}
	if s.goesFirst(p) || s.fresh && !s.young {
		return now
	}
	return now.Add(letGoFirst)
}

// nextAsk returns when to ask again for a session that was asked for some times.
func (s *slot) nextAsk(p *peer, asked int, now time.Time) time.Time {
	if !p.goesTo().IsValid() {
		return time.Time{}
	}
	wait := min(firstWait<<max(min(asked-2, 10), 0), longestWait)
	if !s.goesFirst(p) {
		wait += letGoFirst
	}
	return now.Add(wait + rand.N(wait/10))
}

// forget drops what is known of the peers of a device that is gone.
func (w *WireGuard) forget(s *slot) {
	for key := range s.sessions {
		if p := w.peers.byKey[key]; p != nil {
			w.view.set(pair{p.node, s.number, p.remote}, false)
		}
	}
	s.sessions = map[identity.WireGuardKey]*session{}
	s.pace = pace{}
}

// ask asks the peers whose time has come. Those that are removed and added again must have been looked at just before.
func (w *WireGuard) ask(s *slot, again bool, now time.Time) error {
	var list []wgtypes.PeerConfig
	asked, limit := 0, asksAtOnce
	if again {
		// Where looks are rare because they take long, more is done at each.
		limit = min(asksAtOnce*max(1, int(lookShare*s.pace.cost/betweenAsks)), mostAsks)
	}
	for key, x := range s.sessions {
		if x.due.IsZero() || x.due.After(now) || x.asked > 0 && !again {
			continue
		}
		p := w.peers.byKey[key]
		if p == nil {
			continue
		}
		if asked == limit {
			x.due = later(x.due, now.Add(betweenAsks))
			continue
		}
		asked++
		if x.asked == 0 {
			list = append(list, w.askFor(p)...)
		} else {
			list = append(list, w.addAgain(p, x.asked)...)
			x.handshake, x.sent, x.received = time.Time{}, 0, 0
		}
		x.asked++
		x.due = s.nextAsk(p, x.asked, now)
	}
	if asked > 0 {
		s.pace.hurry()
	}
	return s.set(wgtypes.Config{Peers: list})
}

// askFor makes WireGuard send something to the peer, for which it needs a session: it does where persistent keepalive begins.
func (w *WireGuard) askFor(p *peer) []wgtypes.PeerConfig {
	on, usual := askKeepalive, w.cfg.Keepalive
	change := func(d *time.Duration) wgtypes.PeerConfig {
		return wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.key), UpdateOnly: true, PersistentKeepaliveInterval: d}
	}
	if usual > 0 {
		off := time.Duration(0)
		return []wgtypes.PeerConfig{change(&off), change(&usual)}
	}
	return []wgtypes.PeerConfig{change(&on), change(&usual)}
}

// addAgain removes the peer and adds it, asking for a session. Where packets last came from and the address in the node's row are tried in turn.
func (w *WireGuard) addAgain(p *peer, asked int) []wgtypes.PeerConfig {
	endpoint := p.goesTo()
	if asked%2 == 0 && p.endpoint.IsValid() {
		endpoint = p.endpoint
	}
	list := []wgtypes.PeerConfig{{PublicKey: wgtypes.Key(p.key), Remove: true}, w.peerConfig(p, endpoint)}
	return append(list, w.askFor(p)...)
}
