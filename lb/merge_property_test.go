package lb

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// world is what clusters declare and offer, small enough for names, ports and addresses to meet.
type world struct {
	services map[string]Service // by cluster and name
	backends map[string]Backend
}

var (
	worldClusters = []string{"east", "west", "north"}
	worldNames    = []Name{{"web", "shop"}, {"web", "cart"}}
	worldNodes    = []string{"node1", "node2", ""} // self's is node1, in each cluster
)

// kept is what one cluster's nodes keep: a backend's targets are worked out again when it changes,
// those of a service's backends when one of its declarations does.
type kept map[string][]Target

// TestTargetsOneByOne holds that keeping targets backend by backend comes to the same as working
// all of them out from scratch, by the rules as they are written down, after any history.
func TestTargetsOneByOne(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		w := world{map[string]Service{}, map[string]Backend{}}
		keeps := map[string]kept{"east": {}, "west": {}, "north": {}}
		for step := range 60 {
			name, backend := w.change(random)
			for self, keep := range keeps {
				if backend != "" {
					keep.update(w, self, backend)
				} else {
					for key, b := range w.backends {
						if b.Service == name {
							keep.update(w, self, key)
						}
					}
				}
				if got, want := keep.all(), w.targets(self); !maps.Equal(got, want) {
					t.Fatalf("step %d in %s:\ngot  %v\nwant %v\nof %+v", step, self, got, want, w)
				}
			}
		}
	}
}

// change does one random thing: it returns the service that was declared differently, or the backend that changed.
func (w world) change(random *rand.Rand) (Name, string) {
	id := random.IntN(len(worldClusters))
	cluster, name := worldClusters[id], worldNames[random.IntN(len(worldNames))]
	if random.IntN(3) == 0 {
		key := cluster + name.String()
		if random.IntN(3) == 0 {
			delete(w.services, key)
			return name, ""
		}
		s := Service{Cluster: cluster, ClusterID: uint8(id + 1), Name: name, Global: random.IntN(3) > 0, Affinity: AffinityNone}
		s.Shared = s.Global && random.IntN(3) > 0
		s.InternalLocal, s.ExternalLocal = random.IntN(3) == 0, random.IntN(3) == 0
		for i, port := range []string{"http", "metrics", "admin"} {
			if random.IntN(2) == 0 {
				s.Ports = append(s.Ports, ServicePort{Name: port, Protocol: TCP, Port: uint16(80 + i), TargetPort: uint16(8080 + i)})
			}
		}
		w.services[key] = s
		return name, ""
	}
	b := Backend{Cluster: cluster, ClusterID: uint8(id + 1), Service: name, Node: worldNodes[random.IntN(len(worldNodes))], Slice: "node1", Terminating: random.IntN(4) == 0}
	b.Address = netip.AddrFrom4([4]byte{10, b.ClusterID, 1, byte(random.IntN(4))})
	if random.IntN(2) == 0 {
		b.Address = netip.AddrFrom16([16]byte{0xfd, 14: b.ClusterID, 15: byte(random.IntN(4))})
	}
	for i, port := range []string{"http", "metrics"} {
		if random.IntN(4) > 0 {
			b.Ports = append(b.Ports, BackendPort{port, TCP, uint16(8080 + i)})
		}
	}
	key := fmt.Sprintf("%s %s %s", cluster, name, b.Address)
	if random.IntN(3) == 0 {
		delete(w.backends, key)
	} else {
		w.backends[key] = b
	}
	return name, key
}

// targets works out what self's nodes may use, by family, from the rules: the own cluster's backends of an own
// service; another cluster's if its service is global and shared, and the own one, if there is one, global. What is on the own node counts
// once more where the own service wants clients to stay on their node.
func (w world) targets(self string) map[Target]bool {
	all := map[Target]bool{}
	for _, b := range w.backends {
		theirs, declared := w.services[b.Cluster+b.Service.String()]
		ours, both := w.services[self+b.Service.String()]
		offered := b.Cluster == self || theirs.Global && theirs.Shared && (!both || ours.Global)
		if !declared || !offered {
			continue
		}
		for _, p := range b.Ports {
			for _, sp := range theirs.Ports {
				if sp.Name == p.Name && sp.Protocol == p.Protocol {
					key := TargetKey{PortKey{Service: b.Service, Port: p.Name, Protocol: p.Protocol, Family: FamilyOf(b.Address)}, b.Address, p.Port}
					target := Target{TargetKey: key, Cluster: b.Cluster, ClusterID: b.ClusterID, Node: b.Node, Local: b.Cluster == self, Terminating: b.Terminating}
					all[target] = true
					if target.Port.NodeLocal = true; b.Cluster == self && b.Node == "node1" && (ours.InternalLocal || ours.ExternalLocal) {
						all[target] = true
					}
				}
			}
		}
	}
	return all
}

func (k kept) update(w world, self, key string) {
	b, ok := w.backends[key]
	if !ok {
		delete(k, key)
		return
	}
	view := ServiceView{Self: self, Node: "node1"}
	for _, s := range w.services {
		if s.Name == b.Service {
			view.Declared = append(view.Declared, s)
		}
	}
	k[key] = Targets(view, b)
}

func (k kept) all() map[Target]bool {
	all := map[Target]bool{}
	for _, targets := range k {
		for _, target := range targets {
			all[target] = true
		}
	}
	return all
}
