package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/identity"
)

// Options of a bed. Only Clusters and Nodes have no default.
type Options struct {
	// Dir is the bed's directory; empty: [DefaultDir].
	Dir string
	// Clusters by name; the first gets the cluster ID 1, and so on.
	Clusters []string
	// Nodes per cluster.
	Nodes int
	// AssignIDs leaves the clusters' IDs out of the agents' configurations, so that the clusters are assigned some.
	AssignIDs bool
	// Binary is the clustermesh program to run; empty: the running one. It is copied.
	Binary string
	// LogLevel of the agents: debug, info, warn, error; empty: the agent's default.
	LogLevel string
	// Underlay is the address family of the network between the nodes; empty: IPv4.
	Underlay Underlay
	// Encryption is what all clusters encrypt; empty: everything. EncryptionOf has those that differ.
	Encryption   identity.Encryption
	EncryptionOf map[string]identity.Encryption
	// Unconnected: the clusters are not joined.
	Unconnected bool
	// Kubernetes: each cluster is a Kubernetes cluster, with a control plane and a kubelet on each node.
	Kubernetes bool
	// KubernetesProgram is what testbed/kubernetes builds; empty: it is built from the checkout that the working directory is in, once.
	KubernetesProgram string
	// Ephemeral ties the bed to this process: when it has died, whoever comes next may
	// clean up. Otherwise a bed stays until it is taken down.
	Ephemeral bool
	// Timeout for the whole of Up; zero: 30 s, and 0.5 s more for every node; with Kubernetes 90 s more.
	Timeout time.Duration
	// Progress, if set, is told what has been done, one call at a time.
	Progress func(Event)
}

// Event is a step of Up that is done.
type Event struct {
	// Text says what was done, like "2 stores answer".
	Text string
	// Elapsed since Up began.
	Elapsed time.Duration
}

// ErrAlreadyUp says that a bed of the same directory is up.
var ErrAlreadyUp = errors.New("a test-bed is already up")

// Bed is a test-bed that is up. Its methods may be called at the same time, by several processes too.
type Bed struct {
	layout
	mu    sync.Mutex // orders this process's changes of the state file
	exits exitCodes
}

// Open returns the bed that is up in dir; the error is [ErrNoBed] if none is.
func Open(dir string) (*Bed, error) {
	l, err := newLayout(dir)
	if err != nil {
		return nil, err
	}
	b := &Bed{layout: l}
	s, err := b.readState()
	if err != nil {
		return nil, err
	}
	if s.Phase != PhaseUp {
		return nil, fmt.Errorf("the test-bed in %s is %s, not up; if no command is at work on it, take it down with: clustermesh testbed down%s", l.dir, s.Phase, l.dirFlag())
	}
	if boot, err := bootID(); err == nil && boot != s.Boot {
		return nil, fmt.Errorf("the test-bed in %s was lost when this machine was started again; clean up with: clustermesh testbed down%s", l.dir, l.dirFlag())
	}
	return b, nil
}

// Dir returns the bed's directory.
func (b *Bed) Dir() string { return b.dir }

// ID returns what the names of the bed's namespaces and cgroups begin with.
func (b *Bed) ID() string { return b.id }

// State returns what the bed has recorded.
func (b *Bed) State() (*State, error) { return b.readState() }

// BinDir returns the directory of the bed's programs.
func (b *Bed) BinDir() string { return b.binDir() }

// Client returns a client for the agent of a node. Its Close is the caller's.
func (b *Bed) Client(cluster, node string) *api.Client {
	return api.NewClient(b.socket(cluster, node))
}

// PinDir returns the bpf file system of a node, where its agent pins programs and maps.
func (b *Bed) PinDir(cluster, node string) string { return b.bpffs(cluster, node) }

// AgentLog returns the path of the log of a node's agent.
func (b *Bed) AgentLog(cluster, node string) string { return b.agentLog(cluster, node) }

// Down takes the bed down, see [Clean].
func (b *Bed) Down(ctx context.Context) error { return Clean(ctx, b.dir) }

// within runs fn as an operation on a bed that must stay up meanwhile.
func (b *Bed) within(ctx context.Context, fn func(*State) error) error {
	lock, err := b.operate(ctx, false)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w in %s", ErrNoBed, b.dir)
	}
	if err != nil {
		return err
	}
	defer lock.unlock()
	s, err := b.readState()
	if err != nil {
		return err
	}
	return fn(s)
}

// exitCodes remembers how the children of this process ended: the kernel tells it once.
type exitCodes struct {
	mu    sync.Mutex
	codes map[Process]int
}

// of returns the exit code of a process that has ended, if it was a child of this one.
func (e *exitCodes) of(p Process) (int, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if code, ok := e.codes[p]; ok {
		return code, true
	}
	code, ok := p.reap()
	if ok {
		if e.codes == nil {
			e.codes = map[Process]int{}
		}
		e.codes[p] = code
	}
	return code, ok
}

// marker is a file that makes a directory a bed's. It says what the bed made outside of the
// directory without its ID in the name.
type marker struct {
	ID string `json:"id"`
	// Dirs that were made to hold the bed, innermost first.
	Dirs []string `json:"dirs"`
}

func (l layout) readMarker() (marker, error) {
	var m marker
	b, err := os.ReadFile(l.marker())
	if err != nil {
		return m, err
	}
	// A damaged one still marks the directory.
	_ = json.Unmarshal(b, &m)
	return m, nil
}

func (l layout) writeMarker(m marker) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return writeFile(l.marker(), append(b, '\n'), 0o600)
}
