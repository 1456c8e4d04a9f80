package agent

import (
	"net/http"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh/gossip"
	"causeway/identity"
)

// members is what this node knows of the life of all others.
func (v *view) members() (api.Members, []<-chan struct{}, error) {
	read := v.read()
	_, c1 := v.tables.Liveness.AllWatch(read)
	_, c2 := v.tables.Reaches.AllWatch(read)
	return v.overview(), []<-chan struct{}{c1, c2}, nil
}

func (v *view) overview() api.Members {
	m := api.Members{
		Pools: []api.Pool{}, Speakers: map[string][]string{}, Nodes: []api.NodeLiveness{},
		Clusters: []identity.Reach{}, Transitions: []api.Transition{},
	}
	o := v.life.gossip.Overview()
	self := v.life.self
	m.Enabled, m.Speakers = true, o.Speakers
	m.Clusters = append(m.Clusters, o.Clusters...)
	for _, p := range o.Pools {
		m.Pools = append(m.Pools, pool(p, self))
	}
	for _, n := range o.Nodes {
		m.Nodes = append(m.Nodes, api.NodeLiveness{
			Liveness: n.Liveness, Address: n.Address, Member: n.Member, Speaker: n.Speaker, RTT: milliseconds(n.RTT),
			Suspicion: n.Suspicion, Key: n.Key, Here: n.NodeName() == self,
		})
	}
	for _, t := range o.Transitions {
		m.Transitions = append(m.Transitions, api.Transition(t))
	}
	return m
}

func pool(p gossip.PoolView, self identity.NodeName) api.Pool {
	out := api.Pool{
		Name: p.Name, Label: p.Label, Health: p.Health, Members: []api.Member{},
		ProbeInterval: p.Profile.ProbeInterval.Milliseconds(), ProbeTimeout: p.Profile.ProbeTimeout.Milliseconds(),
	}
	for _, m := range p.Members {
		out.Members = append(out.Members, api.Member{
			Node: m.Node.String(), Address: m.Address, RTT: milliseconds(m.RTT), LastAck: m.LastAck, UDPBlocked: m.UDPBlocked, Here: m.Node == self,
		})
	}
	return out
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// drain answers requests to take this node's backends out of service, or back.
func (s *server) drain(on bool) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		told, err := s.life.drain(on)
		backends := 0
		for _, row := range s.tables.tables.TargetsAt(s.tables.read(), s.life.self) {
			if !row.Object.Port.NodeLocal { // Each is one of the port for all nodes, too.
				backends++
			}
		}
		answer(w, api.DrainResult{Draining: on, Told: told, Backends: backends}, err)
	}
}

// keyring answers requests about the mesh's gossip keys. No answer and no error holds a key.
func (s *server) keyring(w http.ResponseWriter, r *http.Request) {
	var req api.KeyringRequest
	if err := decode(r, &req); err != nil {
		answer(w, nil, err)
		return
	}
	if err := s.changeKeyring(req); err != nil {
		answer(w, nil, err)
		return
	}
	ring := api.Keyring{Keys: []api.GossipKey{}}
	for _, k := range s.life.gossip.Overview().Keys {
		ring.Keys = append(ring.Keys, api.GossipKey{Fingerprint: k.Fingerprint, Primary: k.Primary, Held: k.Held, Used: k.Used, Alive: k.Live})
	}
	answer(w, ring, nil)
}

func (s *server) changeKeyring(req api.KeyringRequest) error {
	g := s.life.gossip
	var err error
	switch req.Action {
	case "list":
		return nil
	case "add":
		key := gossip.NewKey()
		if req.Key != "" {
			if key, err = gossip.ParseKey(req.Key); err != nil {
				return invalid("%w", err)
			}
		}
		err = g.AddKey(key)
	case "use":
		err = g.UseKey(req.Fingerprint)
	case "remove":
		err = g.RemoveKey(req.Fingerprint)
	default:
		return invalid("action %q: want list, add, use or remove", req.Action)
	}
	if err != nil {
		return conflict("%w", err)
	}
	return nil
}
