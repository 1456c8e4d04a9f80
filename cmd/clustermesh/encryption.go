package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"causeway/agent/api"
	"causeway/identity"

	"github.com/spf13/cobra"
)

// rotatePause is how long rotate --wait waits before it asks again.
const rotatePause = 250 * time.Millisecond

func newEncryptionCommand(e *env) *cobra.Command {
	cmd := family("encryption", "How packets between nodes are encrypted, and the node's key", `  clustermesh encryption status
  clustermesh encryption status --node east/node1 -o json
  clustermesh encryption rotate --wait`,
		newEncryptionStatusCommand(e), newEncryptionRotateCommand(e))
	return cmd
}

func newEncryptionStatusCommand(e *env) *cobra.Command {
	return query[*api.Encryption]{
		use:   "status",
		short: "How packets get to each other node, this node's key, and what was dropped",
		long: `How packets get to each other node: in WireGuard, plain (encryption.mode leaves them out), or not at all (closed), since they would have to be
encrypted and cannot be; the reason is beside it. Besides, this node's devices and keys, and the packets that were dropped.

Exit codes:
  0  all that has to be encrypted can be
  1  something cannot be, listed first; or the agent could not answer
  2  wrong usage, or no agent there`,
		example: `  clustermesh encryption status
  clustermesh encryption status -o json | jq '.nodes[] | select(.mode == "closed")'`,
		get:   (*api.Client).Encryption,
		print: printEncryption,
		verdict: func(s *api.Encryption) error {
			if len(s.Problems) > 0 {
				return &exitError{code: exitFailed}
			}
			return nil
		},
	}.command(e)
}

func printEncryption(p *printer, s *api.Encryption) {
	p.printf("encryption: %s\n", s.Mode)
	for _, problem := range s.Problems {
		p.printf("  - %s\n", p.paint(red, printable(problem)))
	}
	for _, d := range s.Devices {
		p.printf("  device %s (%s), port %d/udp, tunnel address %s, MTU %d\n", printable(d.Name), kindText(d), d.Port, d.Address, d.MTU)
		p.printf("    key %s, %s old%s\n", d.Key, p.age(d.Made), preferredText(s, d))
	}
	if len(s.Devices) > 0 {
		p.printf("  %s\n", nextRotation(p, s))
	}
	printRotation(p, s.Rotation)
	p.printf("\n")
	p.table(encryptionTable(p, s.Nodes))
	if drops := encryptionDropTable(s); len(drops.rows) > 0 {
		p.printf("\n")
		p.table(drops)
	}
	if len(s.Repairs) > 0 {
		var repairs []string
		for _, what := range slices.Sorted(maps.Keys(s.Repairs)) {
			repairs = append(repairs, fmt.Sprintf("%d × %s", s.Repairs[what], printable(what)))
		}
		p.printf("\nput back after somebody else had removed it: %s\n", strings.Join(repairs, ", "))
	}
}

func kindText(d api.WireGuardDevice) string {
	if d.PID > 0 {
		return fmt.Sprintf("%s, process %d", d.Kind, d.PID)
	}
	return d.Kind
}

func preferredText(s *api.Encryption, d api.WireGuardDevice) string {
	switch {
	case len(s.Devices) < 2:
		return ""
	case d.Preferred:
		return ", preferred"
	}
	return ", beside it"
}

func nextRotation(p *printer, s *api.Encryption) string {
	switch {
	case s.Rotation != nil:
		return fmt.Sprintf("the key is being changed, %s, for %s", stepText(s.Rotation), p.age(s.Rotation.Since))
	case s.RotateEvery == 0:
		return "the key is changed by hand only (encryption.rotateEvery is 0)"
	case s.Next.IsZero():
		return "when the key is changed next is not known"
	}
	return "the key is changed " + p.until(s.Next)
}

// encryptionText says in a line how packets to the other nodes go; empty if the agent does not say.
func encryptionText(s api.EncryptionSummary) string {
	if s.Mode == "" {
		return ""
	}
	text := "encryption " + string(s.Mode)
	if s.Kind != "" {
		text += " by WireGuard (" + s.Kind + ")"
	}
	for _, mode := range []identity.TunnelMode{identity.TunnelWireGuard, identity.TunnelPlain, identity.TunnelClosed} {
		if n := s.Nodes[mode]; n > 0 {
			text += fmt.Sprintf(", %d nodes %s", n, mode)
		}
	}
	if s.Rotating {
		text += ", the key is being changed"
	}
	return text
}

// stepText says what a change of the key is at.
func stepText(r *api.Rotation) string {
	switch {
	case r.Store:
		return "waiting for this cluster's store"
	case r.Step == "moving":
		return "moving this node's tunnels to the new one"
	}
	return "waiting until nothing comes in by the old one"
}

func printRotation(p *printer, r *api.Rotation) {
	if r == nil {
		return
	}
	for _, w := range r.Waiting {
		p.printf("    waits for %s, %s so far: %s\n", printable(w.Cluster+"/"+w.Node), p.age(w.Since), printable(w.Why))
	}
}

func encryptionTable(p *printer, nodes []api.EncryptionNode) *table {
	t := newTable("NODE", "MTU", "HANDSHAKE", "IN", "OUT", "ENDPOINT", "KEEPALIVE", "MODE")
	for _, n := range nodes {
		mode := string(n.Mode)
		if n.Why != "" {
			mode += ": " + n.Why
		}
		if n.Mode != identity.TunnelWireGuard {
			t.add(n.Cluster+"/"+n.Node, n.MTU, "", "", "", "", "", mode)
			continue
		}
		handshake := "never"
		if !n.Handshake.IsZero() {
			handshake = p.age(n.Handshake) + " ago"
		}
		keepalive := "off"
		if n.Keepalive > 0 {
			keepalive = fmt.Sprintf("%ds", n.Keepalive)
		}
		if n.Status.Error != "" {
			mode = "error: " + n.Status.Error
		} else if !n.Session {
			mode = "pending: no session"
		}
		t.add(n.Cluster+"/"+n.Node, n.MTU, handshake, size(int64(n.Received)), size(int64(n.Transmitted)), n.Endpoint, keepalive, mode)
	}
	return t
}

// encryptionDropTable lists what was dropped, by the programs and by the devices.
func encryptionDropTable(s *api.Encryption) *table {
	t := newTable("DROPPED", "DIRECTION", "PACKETS")
	for _, d := range s.Drops {
		t.add(d.Reason, d.Direction, d.Packets)
	}
	for _, d := range s.Devices {
		if d.DroppedReceive > 0 {
			t.add("by device "+d.Name, "ingress", d.DroppedReceive)
		}
		if d.DroppedTransmit > 0 {
			t.add("by device "+d.Name, "egress", d.DroppedTransmit)
		}
	}
	return t
}

func newEncryptionRotateCommand(e *env) *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Change the node's key now, without losing a packet",
		Long: `Change the node's key now, without losing a packet, and without waiting for its time (encryption.rotateEvery). The new key is made beside the old one,
each node moves to it when both have shaken hands by it, and the old one ends when nobody uses it any more. If a change is going on already, this is
the same one.

With --wait it returns when only the new key is left and all packets go by it. A node that is alive and does not take the new key is waited for; which
one, clustermesh encryption status says, too.`,
		Example: `  clustermesh encryption rotate
  clustermesh encryption rotate --node east/node1 --wait --timeout 1m`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			return e.rotate(cmd.Context(), c, wait, timeout)
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "return when only the new key is left")
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "how long to wait at most")
	return cmd
}

func (e *env) rotate(ctx context.Context, c *api.Client, wait bool, timeout time.Duration) error {
	begun, err := c.Rotate(ctx)
	if err != nil {
		return err
	}
	p := e.printer()
	if begun.Joined {
		p.printf("a change of the key is going on already; the new one is %s\n", begun.Key)
	} else {
		p.printf("the new key is %s\n", begun.Key)
	}
	if !wait {
		return nil
	}
	if err := e.waitRotated(ctx, c, begun.Key, timeout); err != nil {
		return err
	}
	p.printf("all packets go by it, and the old one has ended\n")
	return nil
}

// waitRotated asks until nothing is left of the change to a key.
func (e *env) waitRotated(ctx context.Context, c *api.Client, key identity.WireGuardKey, timeout time.Duration) error {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last := "the agent did not answer"
	for {
		s, err := c.Encryption(bounded)
		switch {
		case bounded.Err() != nil:
		case err != nil:
			return err
		default:
			if last = rotationLacks(s, key); last == "" {
				return nil
			}
		}
		select {
		case <-time.After(rotatePause):
		case <-bounded.Done():
			if ctx.Err() != nil {
				return &exitError{exitInterrupted, errors.New("interrupted while waiting; the change of the key goes on")}
			}
			return fmt.Errorf("not done within %s: %s; the change goes on", duration(timeout), last)
		}
	}
}

// rotationLacks says what a change to a key waits for; empty if it has ended.
func rotationLacks(s *api.Encryption, key identity.WireGuardKey) string {
	switch {
	case s.Rotation != nil && len(s.Rotation.Waiting) > 0:
		w := s.Rotation.Waiting[0]
		return fmt.Sprintf("waiting for %s/%s: %s", w.Cluster, w.Node, w.Why)
	case s.Rotation != nil:
		return stepText(s.Rotation)
	case len(s.Devices) != 1:
		return cmp.Or(strings.Join(s.Problems, "; "), fmt.Sprintf("there are %d devices", len(s.Devices)))
	case s.Devices[0].Key != key:
		return "another key is in use by now: " + s.Devices[0].Key.String()
	}
	for _, n := range s.Nodes {
		if n.Mode == identity.TunnelWireGuard && n.Slot != s.Devices[0].Slot {
			return fmt.Sprintf("the tunnel to %s/%s does not use the new key", n.Cluster, n.Node)
		}
	}
	return ""
}
