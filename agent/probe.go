package agent

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"causeway/clustermesh/peering"
	"causeway/identity"
	"causeway/identity/pki"
	"causeway/kvstore"
)

// linkProbe tries one link.
type linkProbe struct {
	*agent
	peer  peering.Peer
	ahead time.Duration // its clock, as api has found
}

// stores are the host:ports of the peer's etcd.
func (l *linkProbe) stores() (hosts []string) {
	for _, e := range l.peer.StoreEndpoints {
		if u, err := url.Parse(e); err == nil && u.Host != "" {
			e = u.Host
		}
		hosts = append(hosts, e)
	}
	return hosts
}

func (l *linkProbe) names(ctx context.Context) tried {
	var t tried
	for _, e := range append(l.stores(), l.peer.Endpoints...) {
		host, _, err := net.SplitHostPort(e)
		if err != nil {
			return tried{target: e, err: err, cause: "the peer has named an endpoint that is none: give it peering.storeEndpoints or peering.endpoints, and join again"}
		}
		if _, err := netip.ParseAddr(host); err == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, checkTimeout)
		defer cancel()
		addresses, err := net.DefaultResolver.LookupHost(ctx, host)
		if err != nil {
			return tried{target: host, err: err, cause: "DNS does not know the name here, or cannot be asked: see /etc/resolv.conf"}
		}
		t.target, t.detail = host, strings.Join(addresses, ", ")
	}
	if t.target == "" {
		t.skipped, t.detail = true, "addresses need none"
	}
	return t
}

// tcp connects to an endpoint of the peer's etcd.
func (l *linkProbe) tcp(ctx context.Context) tried {
	var last tried
	for _, e := range l.stores() {
		last = dialTCP(ctx, e)
		if last.err == nil {
			return last
		}
	}
	return last
}

func dialTCP(ctx context.Context, address string) tried {
	t := tried{target: address + "/tcp"}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	conn, err := kvstore.NewDialer().DialContext(ctx, "tcp", address)
	if err == nil {
		conn.Close()
		return t
	}
	t.err = err
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		t.cause = "the way is open and nothing listens there: it was stopped, or listens at another address"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		t.cause = "there is no way to that address from here: routing, or the machine is down"
	default:
		t.err, t.cause = fmt.Errorf("no answer within %s", checkTimeout), "a firewall drops it, or the machine is down: open this port between the clusters"
	}
	return t
}

// tls shakes hands with the peer's etcd, with this cluster's certificate there.
func (l *linkProbe) tls(ctx context.Context) tried {
	var last tried
	for _, e := range l.stores() {
		last = l.handshake(ctx, e)
		if last.err == nil {
			return last
		}
	}
	return last
}

func (l *linkProbe) handshake(ctx context.Context, endpoint string) tried {
	t := tried{target: endpoint}
	cert, err := pki.Pair{Cert: []byte(l.peer.Cert), Key: []byte(l.peer.Key)}.TLS()
	if err != nil {
		return tried{target: endpoint, err: err, cause: "this cluster's certificate for it is damaged: join again with a token"}
	}
	leaf, err := pki.ParseCert([]byte(l.peer.Cert))
	if err != nil {
		return tried{target: endpoint, err: err}
	}
	if problem := expired(leaf, l.agent.clock.Now()); problem != "" {
		return tried{target: endpoint, err: fmt.Errorf("this cluster's certificate for %s %s", l.peer.Name(), problem),
			cause: "it was not renewed in time, or a clock is wrong; join again with a token of " + l.peer.Name()}
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(l.peer.Authority))
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	dialer := tls.Dialer{NetDialer: kvstore.NewDialer(), Config: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}, Time: l.agent.clock.Now}}
	conn, err := dialer.DialContext(ctx, "tcp", endpoint)
	if err != nil {
		t.err, t.cause = err, tlsCause(err)
		return t
	}
	defer conn.Close()
	state := conn.(*tls.Conn).ConnectionState()
	t.detail = fmt.Sprintf("%s, server's certificate valid until %s", tls.VersionName(state.Version), state.PeerCertificates[0].NotAfter.UTC().Format(time.DateOnly))
	return t
}

func tlsCause(err error) string {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var name x509.HostnameError
	switch {
	case errors.As(err, &unknown):
		return "it shows a certificate of another authority than the one that was joined: somebody is in between, or the cluster has a new authority; join again"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "its server's certificate has expired, or a clock is wrong: renew it there (clustermesh kvstore does it by itself)"
	case errors.As(err, &name):
		return "its server's certificate is for other names: issue one for the address that peers use"
	case errors.Is(err, context.DeadlineExceeded):
		return "TCP is open and nothing answers: the process hangs, or packets of full size are lost (path MTU)"
	}
	return ""
}

// store reads from the peer's etcd, as the follower does.
func (l *linkProbe) store(ctx context.Context) tried {
	t := tried{target: strings.Join(l.stores(), ",")}
	c := l.channels.get(l.peer.Name())
	if c == nil || c.local {
		t.err, t.cause = errors.New("this node does not follow it yet"), "the record of the peer has not reached this node: see the agent's log"
		return t
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	begun := time.Now()
	if _, err := c.store.Get(ctx, identity.HeartbeatKey); err != nil {
		t.err = errors.New(cmp.Or(c.store.Status().LastError, err.Error()))
		if c.store.Status().Denied {
			t.cause = fmt.Sprintf("cluster %s has disconnected this one, or revoked its user: join again with a token", l.peer.Name())
		} else {
			t.cause = "its etcd is stopped, overloaded or has no leader: look there"
		}
		return t
	}
	state, store := c.follower.State(), c.store.Status()
	if !state.Synced || state.Info == nil {
		t.err, t.cause, t.going = errors.New("it answers, but has not been read in full yet"), "many entries, or a slow way", store.Connected && !store.Denied
		return t
	}
	t.detail = fmt.Sprintf("%d entries, read in %s", state.Accepted, time.Since(begun).Round(10*time.Microsecond))
	return t
}

// api asks the peer's agents how they see the link.
func (l *linkProbe) api(ctx context.Context) tried {
	t := tried{target: strings.Join(l.peer.Endpoints, ",")}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	begun := l.agent.clock.Now()
	word, err := l.peering.Ask(ctx, l.peer)
	took := l.agent.clock.Now().Sub(begun)
	switch {
	case errors.Is(err, peering.ErrLeft):
		t.err, t.cause = err, fmt.Sprintf("cluster %s has disconnected this one; forget it with: clustermesh disconnect %s", l.peer.Name(), l.peer.Name())
	case err != nil:
		t.err, t.cause = err, "no agent of it can be reached at these TCP ports, or a certificate is not valid"
	default:
		l.ahead = word.At.Sub(begun.Add(took / 2))
		t.detail = "answer after " + took.Round(10*time.Microsecond).String()
	}
	return t
}

// clock compares the peer's clock, which api has asked for, with this node's.
func (l *linkProbe) clock(context.Context) tried {
	skew := l.ahead.Abs()
	if skew > maxSkew {
		return tried{err: fmt.Errorf("the clocks differ by %s", skew.Round(time.Second)), cause: "one of them is wrong: set it, for instance by NTP; certificates and tokens are judged by it"}
	}
	return tried{detail: "differs by " + skew.Round(time.Millisecond).String()}
}

// speakers are the nodes of the peer that are in the mesh's pool as far as is known, or any.
func (l *linkProbe) speakers() (nodes []identity.Node) {
	names := l.life.gossip.Overview().Speakers[l.peer.Name()]
	for _, n := range l.nodes() {
		if slices.Contains(names, n.NodeName().String()) || slices.Contains(names, n.Name) {
			nodes = append(nodes, n)
		}
	}
	if len(nodes) == 0 {
		return l.nodes()
	}
	return nodes
}

// nodes of the peer that are known, those first that this node asks anyway.
func (l *linkProbe) nodes() []identity.Node { return l.links.nodesToAsk(l.peer.Name()) }

var errNoNode = errors.New("no node of it is known")

const causeNoNode = "its store has not been read, or none of its agents has ever written to it"

func (l *linkProbe) gossipTCP(ctx context.Context) tried {
	nodes := l.speakers()
	if len(nodes) == 0 {
		return tried{err: errNoNode, cause: causeNoNode}
	}
	var last tried
	for _, n := range nodes {
		if last = dialTCP(ctx, netip.AddrPortFrom(n.Address, l.cfg.Gossip.MeshPort).String()); last.err == nil {
			return last
		}
	}
	return last
}

func (l *linkProbe) gossipUDP(ctx context.Context) tried {
	nodes := l.speakers()
	if len(nodes) == 0 {
		return tried{err: errNoNode, cause: causeNoNode}
	}
	var last tried
	for _, n := range nodes {
		to := netip.AddrPortFrom(n.Address, l.cfg.Gossip.MeshPort)
		last = tried{target: to.String() + "/udp"}
		ctx, cancel := context.WithTimeout(ctx, checkTimeout)
		rtt, err := l.life.gossip.Probe(ctx, to)
		cancel()
		if err == nil {
			last.detail = "round trip " + rtt.Round(10*time.Microsecond).String()
			return last
		}
		last.err, last.cause = err, fmt.Sprintf("UDP port %d is dropped between the clusters, or the agent there does not run", l.cfg.Gossip.MeshPort)
	}
	return last
}
