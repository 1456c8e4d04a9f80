package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"causeway/identity"
)

// How the data path to a peer is tried: by echoes, since a UDP port that something drops does not answer by itself, and WireGuard none but who has
// a key.

// tunnelTries is how often an echo is sent before the tunnel counts as closed.
const tunnelTries = 3

// tunnelPorts are the UDP ports at a node by which its pods' packets come from other clusters, in words: "UDP port 51871 (WireGuard)".
func (a *agent) tunnelPorts(n identity.Node) string {
	if !a.cfg.Encryption.Mode.Covers(false) {
		return fmt.Sprintf("UDP port %d (VXLAN)", a.cfg.Node.VXLANPort)
	}
	var ports []string
	for _, k := range n.TunnelKeys {
		ports = append(ports, fmt.Sprint(k.Port))
	}
	slices.Sort(ports)
	switch len(ports) {
	case 0:
		return "the UDP ports of encryption.ports (WireGuard)"
	case 1:
		return "UDP port " + ports[0] + " (WireGuard)"
	}
	return "UDP ports " + strings.Join(ports, " and ") + " (WireGuard)"
}

// tunnelTarget is where packets for a node go on the underlay.
func (a *agent) tunnelTarget(n identity.Node) string {
	port := a.cfg.Node.VXLANPort
	if a.cfg.Encryption.Mode.Covers(false) {
		if len(n.TunnelKeys) == 0 {
			return n.Address.String()
		}
		port = n.TunnelKeys[0].Port
	}
	return netip.AddrPortFrom(n.Address, port).String() + "/udp"
}

// tunnel sends echoes from this node's address to another's, by the tunnel.
func (l *linkProbe) tunnel(ctx context.Context) tried {
	return l.echoes(ctx, func(n identity.Node, nonce uint64) error { return l.echo.Send(n.Address, nonce) }, func(n identity.Node) string {
		return l.tunnelPorts(n) + " is dropped between the clusters: open it between all nodes, in both directions"
	})
}

// wireGuard is the same where the tunnel is encrypted: an echo comes back only by a session.
func (l *linkProbe) wireGuard(ctx context.Context) tried {
	return l.echoes(ctx, func(n identity.Node, nonce uint64) error { return l.echo.Send(n.Address, nonce) }, l.whyNoSession)
}

// whyNoSession says what is likely in the way of encrypted packets to a node, from what has come of it until now.
func (l *linkProbe) whyNoSession(n identity.Node) string {
	row, _, ok := l.tables.Tunnels.Get(l.tables.DB.ReadTxn(), l.tables.Tunnels.ByKey(n.NodeName().String()))
	if ok && row.Object.Mode == identity.TunnelClosed {
		return row.Object.Why
	}
	if len(n.TunnelKeys) == 0 {
		return fmt.Sprintf("node %s has published no key: its agent cannot set WireGuard up, see there: clustermesh encryption status", n.NodeName())
	}
	are, open := " is dropped", "open it between all nodes, in both directions"
	if len(n.TunnelKeys) > 1 {
		are, open = " are dropped", "open them between all nodes, in both directions"
	}
	return l.sessionWith(n.NodeName()).text(n.NodeName(), l.tunnelPorts(n)+are, open)
}

// sessionWith says how this node's encrypted tunnel to another one is.
func (a *agent) sessionWith(node identity.NodeName) (s session) {
	if a.wireGuardStatus == nil {
		return s
	}
	status, err := a.wireGuardStatus()
	if err != nil {
		return s
	}
	s.known, s.problems = true, status.Problems
	for _, p := range status.Peers {
		if p.Node == node {
			s.heard = s.heard || p.Received > 0
			if p.Handshake.After(s.last) {
				s.last = p.Handshake
			}
		}
	}
	return s
}

// session is what WireGuard knows of another node.
type session struct {
	known    bool
	problems []string  // of this node's
	last     time.Time // handshake
	heard    bool      // something came from the node at all
}

// text says what keeps packets from getting there and back: that ports are dropped, and what to do then, are given.
func (s session) text(node identity.NodeName, dropped, open string) string {
	switch {
	case len(s.problems) > 0:
		return s.problems[0]
	case !s.known || !s.last.IsZero():
		return fmt.Sprintf("%s between the clusters: %s", dropped, open)
	case s.heard:
		return fmt.Sprintf("%s on the way to %s: packets of it get here, and no session comes of them; %s", dropped, node, open)
	}
	return fmt.Sprintf("%s between the clusters, since nothing of %s gets here: %s", dropped, node, open)
}

// pods sends echoes from a pod-side address to another.
func (l *linkProbe) pods(ctx context.Context) tried {
	return l.echoes(ctx, func(n identity.Node, nonce uint64) error { return l.echo.SendPods(n.PodSide(), nonce, 0) }, func(identity.Node) string {
		return "the tunnel carries packets of nodes and none of pods: their ranges may not be in force yet; see clustermesh bpf drops on both sides"
	})
}

func (l *linkProbe) echoes(ctx context.Context, send func(identity.Node, uint64) error, cause func(identity.Node) string) tried {
	nodes := l.nodes()
	if len(nodes) == 0 {
		return tried{err: errNoNode, cause: causeNoNode}
	}
	var t tried
	for try := range tunnelTries {
		n := nodes[try%len(nodes)]
		t = tried{target: l.tunnelTarget(n)}
		rtt, err := l.links.ask(ctx, checkTimeout/tunnelTries, func(nonce uint64) error { return send(n, nonce) })
		if err == nil {
			t.detail = fmt.Sprintf("echo of %s after %s", n.NodeName(), rtt.Round(10*time.Microsecond))
			return t
		}
		t.err, t.cause = fmt.Errorf("echo of %s: %w", n.NodeName(), err), cause(n)
	}
	return t
}

// mtu sends packets as large as those of pods. A way that takes smaller ones alone is well, since packets toward the peer are kept to that.
func (l *linkProbe) mtu(ctx context.Context) tried {
	nodes := l.nodes()
	if len(nodes) == 0 {
		return tried{err: errNoNode, cause: causeNoNode}
	}
	full := l.links.mtu
	t := tried{target: nodes[0].Address.String(), detail: fmt.Sprintf("%d bytes for pods", full)}
	for try := range tunnelTries {
		n := nodes[try%len(nodes)]
		if v := l.links.volley(ctx, n, []int{full}, checkTimeout/tunnelTries); v.err == nil && v.through[0] {
			return t
		}
	}
	mtu, err := l.links.search(ctx, nodes[0], smallestMTU-1, full, checkTimeout/tunnelTries)
	switch {
	case err != nil:
		t.err, t.cause = err, "packets are lost on the way, whatever their size"
	case mtu == 0:
		t.err = fmt.Errorf("packets of %d bytes do not get through, and small ones do", smallestMTU)
		t.cause = "a link between the clusters has too small an MTU, or drops what is not small: raise it"
	case mtu < full:
		t.detail = fmt.Sprintf("%d bytes for pods, and up to %d with a larger MTU between the clusters; packets toward %s are kept to that", mtu, full, l.peer.Name())
	}
	return t
}
