package agent

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/cilium/statedb"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/datapath"
	"causeway/identity"
	"causeway/tunnel"
)

// sessionPatience is how long after a tunnel is in force it may be without any handshake before that is a problem.
const sessionPatience = 10 * time.Second

// encryptionDrops are the reasons for drops that have to do with encryption.
var encryptionDrops = []string{datapath.DropNoNode, datapath.DropUnencrypted, datapath.DropCleartext, datapath.DropNotVXLAN, datapath.DropUnknownNode}

// encryption shows how packets between this node and the others are encrypted.
func (v *view) encryption() (api.Encryption, []<-chan struct{}, error) {
	drops, err := v.datapath.Drops()
	s := v.enc.state(v.read())
	if err != nil {
		s.Problems = append(s.Problems, "drop counters cannot be read: "+err.Error())
	}
	for _, d := range drops {
		if slices.Contains(encryptionDrops, d.Reason) {
			s.Drops = append(s.Drops, api.BPFDrop{Reason: d.Reason, Direction: d.Direction, Packets: d.Packets, Bytes: d.Bytes})
		}
	}
	return s, nil, nil
}

// state is what is known of encryption, without the data path's counters.
func (e *encryption) state(txn statedb.ReadTxn) api.Encryption {
	s := api.Encryption{
		Mode: e.mode, Devices: []api.WireGuardDevice{}, RotateEvery: int64(e.every.Seconds()), Nodes: []api.EncryptionNode{}, Drops: []api.BPFDrop{},
		Repairs: map[string]uint64{}, Problems: []string{},
	}
	var status tunnel.WireGuardStatus
	wg, rotator, missing := e.current()
	switch {
	case e.mode == identity.EncryptOff:
	case wg == nil:
		s.Problems = append(s.Problems, "this node's WireGuard device is not there, so what must be encrypted is dropped: "+missing.Error())
	default:
		var err error
		if status, err = wg.Status(); err != nil {
			s.Problems = append(s.Problems, "WireGuard cannot be read back: "+err.Error())
		}
		s.Problems = append(s.Problems, status.Problems...)
		s.Devices = devicesOf(status, wg.Keys())
		var problems []string
		s.Rotation, s.Rotations, problems = rotator.status()
		s.Problems = append(s.Problems, problems...)
		if keys := wg.Keys(); len(keys) == 1 {
			s.Next = rotator.due(keys[0])
		}
	}
	for what, n := range status.Repairs {
		s.Repairs[what] = n
	}
	peers := map[identity.NodeName][]tunnel.WireGuardPeer{}
	for _, p := range status.Peers {
		peers[p.Node] = append(peers[p.Node], p)
	}
	for row := range e.tables.Tunnels.All(txn) {
		if !row.Object.Self {
			s.Nodes = append(s.Nodes, e.nodeOf(row, peers[row.Object.NodeName()]))
		}
	}
	s.Problems = append(s.Problems, e.nodeProblems(txn, s.Nodes)...)
	return s
}

func devicesOf(status tunnel.WireGuardStatus, keys []identity.TunnelKey) []api.WireGuardDevice {
	devices := []api.WireGuardDevice{}
	for _, d := range status.Devices {
		device := api.WireGuardDevice{
			Slot: d.Slot, Name: d.Name, Kind: d.Kind, PID: d.PID, Key: d.Key, Port: d.Port, MTU: d.MTU, Made: d.Made,
			Preferred: len(keys) > 0 && keys[0].Slot == d.Slot, DroppedReceive: d.DroppedReceive, DroppedTransmit: d.DroppedTransmit,
		}
		if d.Address.IsValid() {
			device.Address = d.Address.String()
		}
		devices = append(devices, device)
	}
	slices.SortFunc(devices, func(a, b api.WireGuardDevice) int { return cmp.Compare(a.Slot, b.Slot) })
	return devices
}

// nodeOf is a node's tunnel with what WireGuard says of its peers.
func (e *encryption) nodeOf(row *clustermesh.Row[identity.Tunnel], peers []tunnel.WireGuardPeer) api.EncryptionNode {
	t := row.Object
	n := api.EncryptionNode{Cluster: t.Cluster, Node: t.Node, Mode: t.Mode, Why: t.Why, MTU: t.MTU, Status: rowStatus(row.Status)}
	for _, p := range peers {
		n.Received += p.Received
		n.Transmitted += p.Transmitted
		if t.Mode != identity.TunnelWireGuard || e.node.TunnelAddress(p.Slot) != t.Local || t.TunnelAddress(p.Remote) != t.Remote {
			continue
		}
		n.Slot, n.Remote, n.Session, n.Handshake, n.Keepalive = p.Slot, p.Remote, p.Shaken, p.Handshake, int(p.Keepalive.Seconds())
		if p.Endpoint.IsValid() {
			n.Endpoint = p.Endpoint.String()
		}
	}
	return n
}

// nodeProblems says which tunnels are closed or have no session, the first one of each with the reason.
func (e *encryption) nodeProblems(txn statedb.ReadTxn, nodes []api.EncryptionNode) (problems []string) {
	var closed, silent []api.EncryptionNode
	for _, n := range nodes {
		switch {
		case n.Mode == identity.TunnelClosed:
			closed = append(closed, n)
		case n.Mode == identity.TunnelWireGuard && !n.Session && n.Handshake.IsZero() && n.Status.Kind == string(clustermesh.Done) &&
			time.Since(n.Status.At) > sessionPatience && e.alive(txn, n):
			silent = append(silent, n)
		}
	}
	if len(closed) > 0 {
		problems = append(problems, fmt.Sprintf("packets to %s are dropped: %s", namedNodes(closed), closed[0].Why))
	}
	if len(silent) > 0 {
		problems = append(problems, fmt.Sprintf("packets to %s are dropped, as there never was a WireGuard session, though it is alive: are the UDP ports of encryption.ports open between the nodes, in both directions? (endpoint %s)",
			namedNodes(silent), cmp.Or(silent[0].Endpoint, "unknown")))
	}
	return problems
}

// namedNodes returns the first node's name, and how many others there are.
func namedNodes(nodes []api.EncryptionNode) string {
	name := nodes[0].Cluster + "/" + nodes[0].Node
	switch len(nodes) {
	case 1:
		return name
	case 2:
		return name + " and another node"
	}
	return fmt.Sprintf("%s and %d other nodes", name, len(nodes)-1)
}

func (e *encryption) alive(txn statedb.ReadTxn, n api.EncryptionNode) bool {
	life, _, ok := e.tables.Liveness.Get(txn, e.tables.Liveness.ByKey(n.Cluster+"/"+n.Node))
	return ok && life.Object.State == identity.NodeAlive
}

// rotate answers requests to change this node's key.
func (s *server) rotate(w http.ResponseWriter, r *http.Request) {
	// The change has to be finished whether or not who asked for it waits.
	key, joined, err := s.agent.enc.rotate(context.WithoutCancel(r.Context()))
	answer(w, api.RotateResult{Key: key.Key, Joined: joined}, err)
}
