package testbed

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// Target is a place of the bed to run a command in.
type Target struct {
	// Cluster is empty for the underlay. With neither Node nor Pod, the cluster's store is meant.
	Cluster string
	Node    string
	Pod     string
}

// ParseTarget reads CLUSTER/NODE, CLUSTER/pod:NAME, CLUSTER/kvstore or "underlay".
func ParseTarget(s string) (Target, error) {
	if s == underlayName {
		return Target{}, nil
	}
	n, err := ParseNode(s)
	if err != nil {
		return Target{}, fmt.Errorf("%q is no place in a test-bed; write CLUSTER/NODE, CLUSTER/pod:NAME, CLUSTER/kvstore or underlay", s)
	}
	t := Target{Cluster: n.Cluster, Node: n.Node}
	if pod, ok := strings.CutPrefix(n.Node, "pod:"); ok {
		t.Node, t.Pod = "", pod
	} else if n.Node == kvstoreName {
		t.Node = ""
	}
	return t, nil
}

func (t Target) String() string {
	switch {
	case t.Cluster == "":
		return underlayName
	case t.Pod != "":
		return t.Cluster + "/pod:" + t.Pod
	case t.Node != "":
		return t.Cluster + "/" + t.Node
	}
	return t.Cluster + "/" + kvstoreName
}

// place is what a target is made of.
type place struct {
	netns  string
	cgroup string
	socket string // of the node's agent, if the target is a node
	// kubeconfig of the cluster, if it has Kubernetes and the target is one of its machines.
	kubeconfig string
}

// environ is the environment of commands there.
func (pl place) environ(l layout) []string {
	env := l.environ(pl.socket)
	if pl.kubeconfig == "" {
		return env
	}
	env = slices.DeleteFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "KUBECONFIG=") })
	// What kubectl learns of an API server is that bed's alone: the next one has the same addresses.
	return append(env, "KUBECONFIG="+pl.kubeconfig, "KUBECACHEDIR="+filepath.Join(filepath.Dir(pl.kubeconfig), "cache"))
}

func (b *Bed) find(s *State, t Target) (place, error) {
	switch {
	case t.Cluster == "":
		return place{netns: b.underlayNS(), cgroup: s.cgroup(underlayName, "exec")}, nil
	case t.Pod != "":
		p, err := s.pod(t.Cluster, t.Pod)
		if err != nil {
			return place{}, err
		}
		return place{netns: b.podNS(t.Cluster, t.Pod), cgroup: s.cgroup(cgroupPod(t.Cluster, p.Node, t.Pod))}, nil
	case t.Node != "":
		if _, err := s.node(t.Cluster, t.Node); err != nil {
			return place{}, err
		}
		return place{
			netns:      b.nodeNS(t.Cluster, t.Node),
			cgroup:     s.cgroup(t.Cluster, t.Node, "exec"),
			socket:     b.socket(t.Cluster, t.Node),
			kubeconfig: b.kubeconfigOf(s, t.Cluster),
		}, nil
	}
	if _, err := s.cluster(t.Cluster); err != nil {
		return place{}, err
	}
	return place{
		netns:      b.kvstoreNS(t.Cluster),
		cgroup:     s.cgroup(filepath.Join(t.Cluster, kvstoreName, "exec")),
		kubeconfig: b.kubeconfigOf(s, t.Cluster),
	}, nil
}
