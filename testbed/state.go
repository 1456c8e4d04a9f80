package testbed

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"causeway/identity"

	"golang.org/x/sys/unix"
)

// stateVersion of state.json; another one is treated like a damaged file: it can only be cleaned up.
const stateVersion = 2

// Phases of a bed.
const (
	PhaseStarting = "starting" // Up is at work, or died at it
	PhaseUp       = "up"
	PhaseStopping = "stopping" // Down is at work, or died at it
)

// State is what a bed remembers in state.json. It is written before what it names is made.
type State struct {
	Version int       `json:"version"`
	ID      string    `json:"id"`
	Phase   string    `json:"phase"`
	Created time.Time `json:"created"`
	// Boot is the kernel's boot ID: after a reboot nothing but files is left of a bed.
	Boot string `json:"boot"`
	// Owner is the process that an ephemeral bed belongs to.
	Owner *Process `json:"owner,omitempty"`
	// CgroupRoot is the bed's directory in the cgroup2 file system.
	CgroupRoot string `json:"cgroupRoot"`
	// Underlay is the address family of the network between the nodes.
	Underlay   Underlay       `json:"underlay"`
	Clusters   []ClusterState `json:"clusters"`
	Pods       []PodState     `json:"pods,omitempty"`
	Partitions []Partition    `json:"partitions,omitempty"`
	PathMTUs   []PathMTU      `json:"pathMTUs,omitempty"`
	// Loss in percent of the packets on every link of the underlay.
	Loss float64 `json:"loss,omitempty"`
}

// ClusterState is a cluster of the bed.
type ClusterState struct {
	Name    string             `json:"name"`
	ID      identity.ClusterID `json:"id"`
	KVStore KVStoreState       `json:"kvstore"`
	Nodes   []NodeState        `json:"nodes"`
	// Encryption is what its nodes encrypt, as configured.
	Encryption identity.Encryption `json:"encryption"`
	// Kubernetes of the cluster, if the bed was brought up with it.
	Kubernetes *KubernetesState `json:"kubernetes,omitempty"`
}

// KVStoreState is a cluster's etcd.
type KVStoreState struct {
	Address netip.Addr `json:"address"`
	Process *Process   `json:"process,omitempty"`
	// Down is set by Kill of the cluster: its link is down.
	Down bool `json:"down,omitempty"`
}

// NodeState is a node of a cluster.
type NodeState struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
	// PodCIDRs of the node: IPv4, IPv6.
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
	Agent    *Process       `json:"agent,omitempty"`
	Kubelet  *Process       `json:"kubelet,omitempty"`
	// ClockOffset is how far the agent's clock is ahead of the machine's.
	ClockOffset time.Duration `json:"clockOffset,omitempty"`
	// Down is set by Kill of the node or of its cluster: its link is down.
	Down bool `json:"down,omitempty"`
}

// PodState is a pod of the bed.
type PodState struct {
	Cluster   string            `json:"cluster"`
	Name      string            `json:"name"`
	Node      string            `json:"node"`
	Namespace string            `json:"namespace"`
	Labels    map[string]string `json:"labels,omitempty"`
	Address   netip.Addr        `json:"address,omitzero"`
	Address6  netip.Addr        `json:"address6,omitzero"`
	Command   []string          `json:"command"`
	Env       []string          `json:"env,omitempty"`
	ReadyPort uint16            `json:"readyPort,omitempty"`
	Created   time.Time         `json:"created"`
	Process   *Process          `json:"process,omitempty"`
}

// ErrNoBed says that there is no test-bed in a directory.
var ErrNoBed = errors.New("no test-bed")

func newState(l layout, o *Options) (*State, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	s := &State{Version: stateVersion, ID: l.id, Phase: PhaseStarting, Created: time.Now().UTC(), Boot: boot, Underlay: cmp.Or(o.Underlay, UnderlayIPv4)}
	if o.Ephemeral {
		self, err := processOf(os.Getpid())
		if err != nil {
			return nil, err
		}
		s.Owner = self
	}
	for i, name := range o.Clusters {
		c := ClusterState{Name: name, ID: identity.ClusterID(i + 1), Encryption: o.encryptionOf(name)}
		if o.Kubernetes {
			c.Kubernetes = new(KubernetesState)
		}
		c.KVStore.Address = s.Underlay.kvstoreAddress(c.ID)
		for n := 1; n <= o.Nodes; n++ {
			c.Nodes = append(c.Nodes, NodeState{Name: nodeName(n), Address: s.Underlay.nodeAddress(c.ID, n), PodCIDRs: nodePodCIDRs(c.ID, n)})
		}
		s.Clusters = append(s.Clusters, c)
	}
	return s, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("reading the kernel's boot ID: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// readState returns ErrNoBed if there is none; any other error means a damaged file.
func (l layout) readState() (*State, error) {
	b, err := os.ReadFile(l.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s; bring one up with: clustermesh testbed up%s", ErrNoBed, l.dir, l.dirFlag())
	}
	if err != nil {
		return nil, err
	}
	s := new(State)
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("%s is damaged (%w); take the test-bed down with: clustermesh testbed down%s", l.stateFile(), err, l.dirFlag())
	}
	if s.Version != stateVersion || s.ID != l.id {
		return nil, fmt.Errorf("%s is not of this program's version (%d of %s); take the test-bed down with: clustermesh testbed down%s", l.stateFile(), s.Version, s.ID, l.dirFlag())
	}
	return s, nil
}

// dirFlag is what a user has to add to a command to mean this bed.
func (l layout) dirFlag() string {
	if l.id == "cw" {
		return ""
	}
	return " --dir " + l.dir
}

func (l layout) writeState(s *State) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(l.stateFile(), append(b, '\n'), 0o600)
}

// writeFile replaces path at once: a reader sees the old or the new content.
func writeFile(path string, content []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, content, mode); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return nil
}

// update changes the stored state under its lock.
func (b *Bed) update(ctx context.Context, change func(*State) error) error {
	// The mutex only keeps this process's own goroutines from polling for the file's lock.
	b.mu.Lock()
	defer b.mu.Unlock()
	lock, err := lockFile(ctx, b.path("state.lock"), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer lock.unlock()
	s, err := b.readState()
	if err != nil {
		return err
	}
	if err := change(s); err != nil {
		return err
	}
	return b.writeState(s)
}

func (s *State) cluster(name string) (*ClusterState, error) {
	for i := range s.Clusters {
		if s.Clusters[i].Name == name {
			return &s.Clusters[i], nil
		}
	}
	var names []string
	for _, c := range s.Clusters {
		names = append(names, c.Name)
	}
	return nil, fmt.Errorf("no cluster %q in this test-bed; it has %s", name, strings.Join(names, ", "))
}

func (s *State) node(cluster, node string) (*NodeState, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return nil, err
	}
	for i := range c.Nodes {
		if c.Nodes[i].Name == node {
			return &c.Nodes[i], nil
		}
	}
	return nil, fmt.Errorf("no node %q in cluster %s; it has node1 to node%d", node, cluster, len(c.Nodes))
}

func (s *State) pod(cluster, name string) (*PodState, error) {
	if _, err := s.cluster(cluster); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(s.Pods, func(p PodState) bool { return p.Cluster == cluster && p.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("no pod %q in cluster %s; see: clustermesh testbed pod list", name, cluster)
	}
	return &s.Pods[i], nil
}

func (s *State) removePod(cluster, name string) {
	s.Pods = slices.DeleteFunc(s.Pods, func(p PodState) bool { return p.Cluster == cluster && p.Name == name })
}

// cgroup returns a directory of the bed's tree.
func (s *State) cgroup(parts ...string) string {
	return filepath.Join(append([]string{s.CgroupRoot}, parts...)...)
}
