package testbed

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"causeway/identity"
)

const (
	// DefaultDir is the directory of the test-bed that people drive by hand.
	DefaultDir = "/run/causeway/testbed"
	// DemoDir is the directory of the demo's own test-bed.
	DemoDir = "/run/causeway/demo"

	// MaxClusters and MaxNodes (per cluster) are bounded by the addresses of the underlay,
	// maxPorts by what one Linux bridge takes.
	MaxClusters = 255
	MaxNodes    = 200
	maxPorts    = 1023

	maxClusterName = 32
	maxPodName     = 63
	// maxSocketPath is what fits into sockaddr_un without its final NUL.
	maxSocketPath = 107

	kvstoreName  = "kvstore"
	underlayName = "underlay"
	// kubeconfigName is the file with the contexts of a bed with Kubernetes.
	kubeconfigName = "kubeconfig"
	kvstorePort    = 2379
	underlayMTU    = 1500
)

// layout derives every name of a bed from its directory: files, namespaces, cgroups.
type layout struct {
	dir string // absolute
	id  string // no "-" in it, so that the ID of a name ends at its first "-"
}

// newLayout resolves dir; the same directory always gives the same ID.
func newLayout(dir string) (layout, error) {
	if dir == "" {
		dir = DefaultDir
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return layout{}, fmt.Errorf("resolving the test-bed's directory: %w", err)
	}
	abs = resolveLinks(abs)
	return layout{dir: abs, id: bedID(abs)}, nil
}

// resolveLinks follows the symbolic links of the part of path that exists.
func resolveLinks(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	parent := filepath.Dir(path)
	if parent == path {
		return path
	}
	return filepath.Join(resolveLinks(parent), filepath.Base(path))
}

func bedID(dir string) string {
	switch dir {
	case resolveLinks(DefaultDir):
		return "cw"
	case resolveLinks(DemoDir):
		return "cwdemo"
	}
	sum := sha256.Sum256([]byte(dir))
	return "cw" + hex.EncodeToString(sum[:3])
}

func (l layout) isDefault() bool { return l.id == "cw" || l.id == "cwdemo" }

// Files.
func (l layout) path(parts ...string) string {
	return filepath.Join(append([]string{l.dir}, parts...)...)
}
func (l layout) marker() string            { return l.path(".causeway-testbed") }
func (l layout) stateFile() string         { return l.path("state.json") }
func (l layout) binDir() string            { return l.path("bin") }
func (l layout) binary() string            { return l.path("bin", "clustermesh") }
func (l layout) ownCgroupMount() string    { return l.path("cgroup") }
func (l layout) faultsDir() string         { return l.path(underlayName, "bpf") }
func (l layout) pki(cluster string) string { return l.path(cluster, "pki") }
func (l layout) nodePKI(cluster, n string) string {
	return l.path(cluster, n, "pki")
}
func (l layout) socket(cluster, n string) string { return l.path(cluster, n, "agent.sock") }
func (l layout) bpffs(cluster, n string) string  { return l.path(cluster, n, "bpf") }
func (l layout) gossipKey(cluster, n string) string {
	return l.path(cluster, n, "gossip.key")
}
func (l layout) agentLog(cluster, n string) string {
	return l.path(cluster, n, "agent.log")
}
func (l layout) kvstoreLog(cluster string) string { return l.path(cluster, kvstoreName, "kvstore.log") }
func (l layout) podLog(cluster, n, pod string) string {
	return l.path(cluster, n, "pods", pod+".log")
}

// Network namespaces, as "ip netns list" shows them.
func (l layout) underlayNS() string              { return l.id + "-" + underlayName }
func (l layout) kvstoreNS(cluster string) string { return l.id + "-" + cluster + "-" + kvstoreName }
func (l layout) nodeNS(cluster, n string) string { return l.id + "-" + cluster + "-" + n }
func (l layout) podNS(cluster, pod string) string {
	return l.id + "-" + cluster + "-pod-" + pod
}

// Cgroups, below the bed's own directory in the cgroup2 file system.
func cgroupNode(cluster, n string) string { return filepath.Join(cluster, n) }
func cgroupAgent(cluster, n string) string {
	return filepath.Join(cluster, n, "agent")
}
func cgroupWireGuard(cluster, n string) string {
	return filepath.Join(cluster, n, "wireguard")
}
func cgroupProxy(cluster, n string) string {
	return filepath.Join(cluster, n, "proxy")
}
func cgroupPod(cluster, n, pod string) string { return filepath.Join(cluster, n, "pods", pod) }
func cgroupKVStore(cluster string) string     { return filepath.Join(cluster, kvstoreName, "server") }

var ownedNS = regexp.MustCompile(`^(underlay|[a-z0-9-]+-(node[0-9]+|kvstore)|[a-z0-9-]+-pod-[a-z0-9-]+)$`)

// ownsNS tells whether a namespace's name is one that this bed would give.
func (l layout) ownsNS(name string) bool {
	rest, ok := strings.CutPrefix(name, l.id+"-")
	return ok && ownedNS.MatchString(rest)
}

// Node n (from 1) of a cluster.
func nodeName(n int) string { return "node" + strconv.Itoa(n) }

// nodeNumber is the reverse of nodeName; 0 for a name that is none.
func nodeNumber(name string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(name, "node"))
	return n
}

// portName names the underlay's end of a veth: at most 15 bytes, a hash where the names are longer.
func portName(cluster, n string) string {
	full := cluster + "-" + n
	if len(full) <= 15 {
		return full
	}
	sum := sha256.Sum256([]byte(full))
	return full[:8] + "-" + hex.EncodeToString(sum[:3])
}

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)

func validateName(kind, name string, limit int) error {
	switch {
	case name == "":
		return fmt.Errorf("%s name is empty", kind)
	case len(name) > limit:
		return fmt.Errorf("%s name %q has %d characters; at most %d are allowed", kind, name, len(name), limit)
	case !dnsLabel.MatchString(name):
		return fmt.Errorf("%s name %q must be lower case letters, digits and '-', beginning and ending with a letter or digit", kind, name)
	}
	return nil
}

// reservedClusters are taken by files and targets of the bed itself.
var reservedClusters = []string{"bin", "cgroup", underlayName, kvstoreName, kubeconfigName}

func validateCluster(name string) error {
	if err := validateName("cluster", name, maxClusterName); err != nil {
		return err
	}
	if slices.Contains(reservedClusters, name) || strings.Contains(name+"-", "-pod-") {
		return fmt.Errorf("cluster name %q is reserved by the test-bed; choose another", name)
	}
	return nil
}

// ParseNode splits "CLUSTER/NODE".
func ParseNode(s string) (identity.NodeName, error) {
	c, n, ok := strings.Cut(s, "/")
	if !ok || c == "" || n == "" || strings.Contains(n, "/") {
		return identity.NodeName{}, fmt.Errorf("%q is not a node; write CLUSTER/NODE, like east/node1", s)
	}
	return identity.NodeName{Cluster: c, Node: n}, nil
}

// validate checks what Up is asked for, before anything is made.
func (o *Options) validate(l layout) error {
	if len(o.Clusters) == 0 || len(o.Clusters) > MaxClusters {
		return fmt.Errorf("%d clusters: a test-bed has 1 to %d", len(o.Clusters), MaxClusters)
	}
	if o.Nodes < 1 || o.Nodes > MaxNodes {
		return fmt.Errorf("%d nodes per cluster: 1 to %d are possible", o.Nodes, MaxNodes)
	}
	if n := len(o.Clusters) * (o.Nodes + 1); n > maxPorts {
		return fmt.Errorf("%d clusters of %d nodes need %d ports on the underlay's bridge; Linux allows %d", len(o.Clusters), o.Nodes, n, maxPorts)
	}
	ports := map[string]bool{}
	for i, c := range o.Clusters {
		if err := validateCluster(c); err != nil {
			return err
		}
		if slices.Contains(o.Clusters[:i], c) {
			return fmt.Errorf("cluster %q is named twice", c)
		}
		for n := range o.Nodes + 1 {
			name := kvstoreName
			if n > 0 {
				name = nodeName(n)
			}
			if p := portName(c, name); ports[p] {
				return fmt.Errorf("cluster names are too alike: two links of the underlay would be called %q", p)
			} else {
				ports[p] = true
			}
		}
		if s := l.socket(c, nodeName(o.Nodes)); len(s) > maxSocketPath {
			return fmt.Errorf("the agent's socket %s would have a path of %d bytes, and unix sockets allow %d; use a shorter --dir", s, len(s), maxSocketPath)
		}
	}
	if strings.ContainsAny(l.dir, " \t\n\\") {
		return errors.New("the test-bed's directory must not contain white space or backslashes")
	}
	if o.KubernetesProgram != "" && !o.Kubernetes {
		return errors.New("a program for Kubernetes is named, and no Kubernetes is asked for: add --kubernetes")
	}
	return errors.Join(o.Underlay.validate(), o.validateEncryption())
}
