package main

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"time"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

// States of a peer.
const (
	peerConnected    = "connected"
	peerNotConnected = "not connected"
	peerJoining      = "joining"
	peerLeft         = "left"
)

func newPeersCommand(e *env) *cobra.Command {
	f := formatTable
	var watching bool
	cmd := &cobra.Command{
		Use:   "peers [NAME]",
		Short: "The clusters that this one is connected with, and how well",
		Long: `The clusters that this one is connected with, as this node sees them now; with a NAME, all there is to say of that one.

States of a peer:
  connected      its store is read, gossip passes, and packets from pods' side to pods' side have made the round trip lately, both ways
  not connected  one of that is not so; why is said below
  joining        it is being connected
  left           it has disconnected this cluster; to forget it: clustermesh disconnect NAME

OUT is what this node sends to it, IN what it sends here, as it says itself: the last round trip, and how many of the last echoes were lost.
MTU is the largest packet of pods that gets through ("narrowed" if packets are kept to less than pods could send), SYNC LAG how old the newest is that its store has said.

Exit codes:
  0  they are listed, however they are; see "clustermesh status" for a verdict
  1  there is no peer NAME, or the agent could not answer
  2  wrong usage, or no agent there`,
		Example: `  clustermesh peers
  clustermesh peers west --node east/node1
  clustermesh peers --watch
  clustermesh peers -o json | jq '.[] | select(.state != "connected") | .why'`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: e.completePeers(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			if len(args) == 1 {
				return onePeer(args[0]).run(cmd.Context(), e, c, f, watching)
			}
			return allPeers.run(cmd.Context(), e, c, f, watching)
		},
	}
	outputFlag(cmd, &f)
	watchFlag(cmd, &watching)
	return cmd
}

var allPeers = query[[]api.Peer]{get: (*api.Client).Peers, watch: (*api.Client).WatchPeers, print: printPeers}

// onePeer asks for all, and is about one of them.
func onePeer(name string) query[*api.Peer] {
	return query[*api.Peer]{
		get: func(c *api.Client, ctx context.Context) (*api.Peer, error) {
			peers, err := c.Peers(ctx)
			if err != nil {
				return nil, err
			}
			return findPeer(peers, name)
		},
		watch: func(c *api.Client, ctx context.Context) iter.Seq2[*api.Peer, error] {
			return func(yield func(*api.Peer, error) bool) {
				for peers, err := range c.WatchPeers(ctx) {
					var peer *api.Peer
					if err == nil {
						peer, err = findPeer(peers, name)
					}
					if !yield(peer, err) || err != nil {
						return
					}
				}
			}
		},
		print: func(p *printer, peer *api.Peer) {
			printPeer(p, peer)
			if peer.State != peerLeft {
				printPeerMore(p, peer)
			}
		},
	}
}

func findPeer(peers []api.Peer, name string) (*api.Peer, error) {
	var names []string
	for i := range peers {
		if peers[i].Name == name {
			return &peers[i], nil
		}
		names = append(names, peers[i].Name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("there is no peer %s: this cluster is connected with none", name)
	}
	return nil, fmt.Errorf("there is no peer %s: there are %s", name, strings.Join(names, ", "))
}

// printPeers prints a row for each, and below why one is not connected.
func printPeers(p *printer, peers []api.Peer) {
	if len(peers) == 0 {
		p.printf("no peers; to join another cluster, type there: clustermesh token create, and here: clustermesh connect TOKEN\n")
		return
	}
	t := newTable("PEER", "ID", "STATE", "CONTROL", "GOSSIP", "OUT", "IN", "MTU", "SYNC LAG", "SINCE")
	t.status = 2
	for _, x := range peers {
		if x.State == peerLeft { // nothing else is so any more
			t.add(x.Name, x.ID, x.State, "", "", "", "", "", "", p.age(x.Since)+" ago")
			continue
		}
		t.add(x.Name, x.ID, x.State, planeWord(x.Control), planeWord(x.Gossip), pathCell(x.Out), pathCell(x.In), mtuCell(x), lag(x.SyncLag), p.age(x.Since)+" ago")
	}
	p.table(t)
	for _, x := range peers {
		if x.State == peerConnected {
			if x.Out.NoteIsNew {
				p.printf("  %s\n", printable(x.Name+": "+x.Out.Note))
			}
			continue
		}
		for _, why := range x.Why {
			p.printf("  %s\n", p.paint(colourOf(x.State), printable(x.Name+": "+why)))
		}
	}
}

func planeWord(plane api.Plane) string {
	if plane.OK {
		return "ok"
	}
	return "broken"
}

func pathWord(path api.Path) string {
	switch {
	case !path.Known:
		return "unknown"
	case !path.OK:
		return "broken"
	}
	return "ok"
}

// pathCell is one direction in few words, "0.42 ms / 0%".
func pathCell(path api.Path) string {
	if word := pathWord(path); word != "ok" {
		return word
	}
	return fmt.Sprintf("%.2f ms / %.3g%%", path.RTT, path.Loss)
}

// mtuCell is what was measured out and in, in bytes, or the one number that both are.
func mtuCell(x api.Peer) string {
	switch out, in := x.Out.MTU, x.In.MTU; {
	case out == 0 && in == 0:
		return ""
	case x.Out.Narrowed && (out == in || in == 0):
		return fmt.Sprintf("%d narrowed", out)
	case x.Out.Narrowed:
		return fmt.Sprintf("%d narrowed / %d", out, in)
	case out == in || in == 0:
		return fmt.Sprint(out)
	case out == 0:
		return fmt.Sprint(in)
	default:
		return fmt.Sprintf("%d / %d", out, in)
	}
}

func lag(ms int64) string {
	if ms < 0 {
		return "nothing yet"
	}
	return short(ms)
}

// short is a time in milliseconds, which counts below a second.
func short(ms int64) string {
	if ms < 1000 {
		return fmt.Sprintf("%dms", ms)
	}
	return duration(time.Duration(ms) * time.Millisecond)
}

// printPeer prints how a peer is, and what is missing.
func printPeer(p *printer, x *api.Peer) {
	if x.State == peerLeft {
		p.printf("%s (ID %d): %s %s ago\n", printable(x.Name), x.ID, p.paint(yellow, peerLeft), p.age(x.Since))
	} else {
		p.printf("%s (ID %d): %s, joined %s ago\n", printable(x.Name), x.ID, p.paint(colourOf(x.State), printable(x.State)), p.age(x.Since))
	}
	for _, why := range x.Why {
		p.printf("  - %s\n", p.paint(colourOf(x.State), printable(why)))
	}
	if x.State == peerLeft {
		return
	}
	p.about("control plane", planeText(p, x.Control))
	p.about("gossip", planeText(p, x.Gossip))
	p.about("data path out", pathText(p, x.Out))
	p.about("data path in", pathText(p, x.In))
	p.about("sync lag", lag(x.SyncLag))
	p.about("clock", skew(x.ClockSkew))
	if x.Excess > 0 || x.Refused > 0 {
		p.about("entries", p.paint(red, entriesText(x)))
	}
}

// printPeerMore prints what is the same for long.
func printPeerMore(p *printer, x *api.Peer) {
	if x.Excess == 0 && x.Refused == 0 {
		p.about("entries", entriesText(x))
	}
	p.about("nodes", fmt.Sprint(x.Nodes))
	p.about("our certificate", certUntil(p, x.CertExpires))
	p.about("its certificate", certUntil(p, x.PeerCertExpires))
	p.about("its store", printable(strings.Join(x.StoreEndpoints, ", ")))
	p.about("its peering API", printable(strings.Join(x.Endpoints, ", ")))
	p.about("its version", printable(x.Version))
}

// about prints one line of what is known of a peer.
func (p *printer) about(what, text string) {
	if text == "" {
		text = "-"
	}
	p.printf("  %s  %s\n", pad(what, 15), text)
}

func planeText(p *printer, plane api.Plane) string {
	return withDetail(p, planeWord(plane), plane.Detail)
}

// narrowed marks the MTU of a path that packets are kept to.
func narrowed(path api.Path) string {
	if path.Narrowed {
		return " (narrowed)"
	}
	return ""
}

// pathText is all that is known of one direction.
func pathText(p *printer, path api.Path) string {
	var parts []string
	if path.Problem != "" {
		parts = append(parts, path.Problem)
	}
	if path.Known && path.Last >= 0 {
		if path.RTT > 0 {
			parts = append(parts, fmt.Sprintf("RTT %.2f ms", path.RTT))
		}
		parts = append(parts, fmt.Sprintf("%.3g%% lost", path.Loss), "last round trip "+short(path.Last)+" ago")
	}
	if path.Known && path.Last < 0 {
		parts = append(parts, "no round trip yet")
	}
	if path.MTU > 0 {
		parts = append(parts, fmt.Sprintf("pod MTU %d", path.MTU)+narrowed(path))
	}
	if path.Note != "" {
		parts = append(parts, path.Note)
	}
	if path.From != "" {
		parts = append(parts, "as "+path.From+" measures it")
	}
	return withDetail(p, pathWord(path), strings.Join(parts, ", "))
}

func withDetail(p *printer, word, detail string) string {
	text := word
	switch word {
	case "broken":
		text = p.paint(red, word)
	case "unknown":
		text = p.paint(yellow, word)
	}
	if detail != "" {
		text += ": " + printable(detail)
	}
	return text
}

// skew says how a peer's clock goes compared to this node's.
func skew(ms int64) string {
	d := short(max(ms, -ms))
	switch {
	case ms > 0:
		return d + " ahead"
	case ms < 0:
		return d + " behind"
	}
	return "the same"
}

func entriesText(x *api.Peer) string {
	text := fmt.Sprintf("%d accepted, of at most %d", x.Entries, x.Quota)
	if x.Excess > 0 {
		text += fmt.Sprintf("; %d more are left out", x.Excess)
	}
	if x.Refused > 0 {
		text += fmt.Sprintf("; %d refused", x.Refused)
	}
	return text
}

func certUntil(p *printer, t time.Time) string {
	if t.IsZero() {
		return "none"
	}
	return fmt.Sprintf("until %s (%s)", minute(t), p.until(t))
}

// minute is a time as people in several zones write it to each other.
func minute(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 MST") }
