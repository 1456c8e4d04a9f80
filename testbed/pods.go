package testbed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"causeway/agent/api"
	"causeway/identity"

	"golang.org/x/sys/unix"
)

const (
	// readyTimeout bounds the wait for a pod's port.
	readyTimeout = 10 * time.Second
	// earlyExit is how long a new pod's command is watched for failing at once.
	earlyExit = 100 * time.Millisecond
	// withdrawTime is left between the withdrawal of a pod as a backend and its end: longer than
	// the news takes to reach every node.
	withdrawTime = 300 * time.Millisecond
	// DefaultGrace is what a pod gets between SIGTERM and SIGKILL.
	DefaultGrace = 5 * time.Second
)

// PodSpec says what pod to run.
type PodSpec struct {
	Cluster string
	Node    string
	Name    string // unique in its cluster
	// Namespace; empty: "default".
	Namespace string
	Labels    map[string]string
	// ReadyPort is a TCP port: the pod is a backend only once it listens there. Zero: at once.
	ReadyPort uint16
	Command   []string
	// Env is added to the environment of this process.
	Env []string
}

// PodStatus is a pod as it is now.
type PodStatus struct {
	Cluster   string `json:"cluster"`
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Node      string `json:"node"`
	// Address is the pod's IPv4 address, Address6 its IPv6 one.
	Address  netip.Addr        `json:"ip,omitzero"`
	Address6 netip.Addr        `json:"ip6,omitzero"`
	Labels   map[string]string `json:"labels"`
	PID      int               `json:"pid,omitempty"`
	// State is "running", "exited", or "creating".
	State string `json:"state"`
	// ExitCode is known only to the process that started the pod.
	ExitCode *int     `json:"exitCode,omitempty"`
	Command  []string `json:"command"`
	Log      string   `json:"log"`
}

func (p *PodSpec) validate() error {
	if err := validateName("pod", p.Name, maxPodName); err != nil {
		return err
	}
	if err := validateName("namespace", p.Namespace, maxPodName); err != nil {
		return err
	}
	if len(p.Command) == 0 {
		return fmt.Errorf("pod %s has no command; write it after --", p.Name)
	}
	_, err := lookPath(p.Command[0], "")
	if p.Command[0] == "clustermesh" {
		err = nil // the bed has it
	}
	return err
}

// RunPod connects a new pod to its node and starts its command. It returns when the pod has its
// address and, with a ReadyPort, listens there. If it fails, nothing of the pod is left.
func (b *Bed) RunPod(ctx context.Context, spec PodSpec) (*PodStatus, error) {
	if spec.Namespace == "" {
		spec.Namespace = "default"
	}
	if err := spec.validate(); err != nil {
		return nil, err
	}
	var status *PodStatus
	err := b.within(ctx, func(s *State) error {
		if err := b.recordPod(ctx, &spec); err != nil {
			return err
		}
		err := b.makePod(ctx, s, &spec)
		if err != nil {
			cleanCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
			defer cancel()
			return errors.Join(err, b.removePod(cleanCtx, s, spec.Cluster, spec.Node, spec.Namespace, spec.Name))
		}
		s, err = b.readState()
		if err != nil {
			return err
		}
		p, err := s.pod(spec.Cluster, spec.Name)
		if err == nil {
			status = b.podStatus(p)
		}
		return err
	})
	return status, err
}

// recordPod takes the pod's name, before anything of it is made.
func (b *Bed) recordPod(ctx context.Context, spec *PodSpec) error {
	return b.update(ctx, func(s *State) error {
		n, err := s.node(spec.Cluster, spec.Node)
		if err != nil {
			return err
		}
		if n.Down {
			return fmt.Errorf("node %s/%s was killed; start it with: clustermesh testbed start node %[1]s/%[2]s", spec.Cluster, spec.Node)
		}
		if p, err := s.pod(spec.Cluster, spec.Name); err == nil {
			return fmt.Errorf("there is a pod %s/%s already, on %s; delete it with: clustermesh testbed pod delete %[1]s/%[2]s", spec.Cluster, spec.Name, p.Node)
		}
		s.Pods = append(s.Pods, PodState{
			Cluster: spec.Cluster, Name: spec.Name, Node: spec.Node, Namespace: spec.Namespace, Labels: spec.Labels,
			Command: spec.Command, Env: spec.Env, ReadyPort: spec.ReadyPort, Created: time.Now().UTC(),
		})
		return nil
	})
}

func (b *Bed) makePod(ctx context.Context, s *State, spec *PodSpec) error {
	ns := b.podNS(spec.Cluster, spec.Name)
	if err := createNS(ns); err != nil {
		return err
	}
	if err := makeCgroup(s.cgroup(cgroupPod(spec.Cluster, spec.Node, spec.Name))); err != nil {
		return err
	}
	client := b.Client(spec.Cluster, spec.Node)
	defer client.Close()
	state := identity.EndpointReady
	if spec.ReadyPort != 0 {
		state = identity.EndpointNotReady
	}
	ep, err := client.AddEndpoint(ctx, api.EndpointRequest{
		Namespace: spec.Namespace, Name: spec.Name, Labels: spec.Labels, NetNS: netnsPath(ns), State: state,
	})
	if err != nil {
		return fmt.Errorf("connecting pod %s/%s to %s: %w", spec.Cluster, spec.Name, spec.Node, err)
	}
	pod := PodState{Cluster: spec.Cluster, Name: spec.Name, Node: spec.Node, Command: spec.Command, Env: spec.Env, ReadyPort: spec.ReadyPort}
	pod.Address, pod.Address6 = ep.Address, ep.Address6
	p, err := b.startPod(ctx, s, &pod)
	if err != nil {
		return err
	}
	if err := b.waitPod(ctx, s, &pod, p); err != nil {
		return err
	}
	if spec.ReadyPort == 0 {
		return nil
	}
	return client.PatchEndpoint(ctx, spec.Namespace, spec.Name, api.EndpointPatch{State: identity.EndpointReady})
}

// startPod starts a pod's command in its namespace and cgroup, and records the process and the pod's addresses.
func (b *Bed) startPod(ctx context.Context, s *State, pod *PodState) (*Process, error) {
	p, err := spawn(spec{
		argv: pod.Command, env: append(b.environ(""), pod.Env...), binDir: b.binDir(),
		netns:  b.podNS(pod.Cluster, pod.Name),
		cgroup: s.cgroup(cgroupPod(pod.Cluster, pod.Node, pod.Name)),
		log:    b.podLog(pod.Cluster, pod.Node, pod.Name),
	})
	if err != nil {
		return nil, err
	}
	return p, b.update(ctx, func(s *State) error {
		rec, err := s.pod(pod.Cluster, pod.Name)
		if err == nil {
			rec.Process, rec.Address, rec.Address6 = p, pod.Address, pod.Address6
		}
		return err
	})
}

// waitPod waits until the pod listens on its port, or if it has none just long enough to see it fail at once.
func (b *Bed) waitPod(ctx context.Context, s *State, pod *PodState, p *Process) error {
	patience := earlyExit
	if pod.ReadyPort != 0 {
		patience = readyTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if pod.ReadyPort != 0 {
			if listening, err := listens(b.podNS(pod.Cluster, pod.Name), pod.ReadyPort); err != nil || listening {
				return err
			}
		}
		if !p.alive() {
			if err := b.podEnded(s, pod, p); err != nil || pod.ReadyPort == 0 {
				return err
			}
		}
		select {
		case <-ctx.Done():
			if pod.ReadyPort == 0 && errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return nil
			}
			return withLog(fmt.Errorf("pod %s/%s does not listen on port %d: %w", pod.Cluster, pod.Name, pod.ReadyPort, ctx.Err()), b.podLog(pod.Cluster, pod.Node, pod.Name))
		case <-time.After(pollInterval / 2):
		}
	}
}

// podEnded tells what is wrong about a pod whose command has ended early: a command that puts itself into the background is well.
func (b *Bed) podEnded(s *State, pod *PodState, p *Process) error {
	code, known := b.exits.of(*p)
	populated, err := cgroupPopulated(s.cgroup(cgroupPod(pod.Cluster, pod.Node, pod.Name)))
	if err != nil {
		return err
	}
	if populated || (known && code == 0 && pod.ReadyPort == 0) {
		return nil
	}
	return withLog(fmt.Errorf("pod %s/%s: %s ended right after its start with exit status %d", pod.Cluster, pod.Name, pod.Command[0], code), b.podLog(pod.Cluster, pod.Node, pod.Name))
}

// DeletePod withdraws a pod as a backend, ends its processes (SIGTERM, then SIGKILL after grace), and removes it. If its node's
// agent does not run the pod is removed all the same, and warning says so.
func (b *Bed) DeletePod(ctx context.Context, cluster, name string, grace time.Duration) (warning string, err error) {
	err = b.within(ctx, func(s *State) error {
		pod, err := s.pod(cluster, name)
		if err != nil {
			return err
		}
		client := b.Client(cluster, pod.Node)
		defer client.Close()
		err = client.PatchEndpoint(ctx, pod.Namespace, name, api.EndpointPatch{State: identity.EndpointTerminating})
		switch {
		case errors.Is(err, api.ErrNoAgent):
			warning = fmt.Sprintf("the agent of %s/%s does not run: it will notice that the pod is gone when it starts", cluster, pod.Node)
		case err != nil && !isNotFound(err):
			return fmt.Errorf("withdrawing pod %s/%s: %w", cluster, name, err)
		case err == nil:
			if err := pause(ctx, withdrawTime); err != nil {
				return err
			}
		}
		if err := b.endPod(ctx, s, pod, grace); err != nil {
			return err
		}
		return b.removePod(ctx, s, cluster, pod.Node, pod.Namespace, name)
	})
	return warning, err
}

// endPod lets the pod's command end by itself, for as long as grace.
func (b *Bed) endPod(ctx context.Context, s *State, pod *PodState, grace time.Duration) error {
	if err := pod.Process.signal(unix.SIGTERM); err != nil {
		return err
	}
	graceCtx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if pod.Process.alive() {
		_ = waitEmpty(graceCtx, s.cgroup(cgroupPod(pod.Cluster, pod.Node, pod.Name)))
	}
	return ctx.Err()
}

// removePod removes whatever there is of a pod.
func (b *Bed) removePod(ctx context.Context, s *State, cluster, node, namespace, name string) error {
	cgroup := s.cgroup(cgroupPod(cluster, node, name))
	if err := killCgroup(ctx, cgroup); err != nil {
		return err
	}
	client := b.Client(cluster, node)
	defer client.Close()
	err := client.DeleteEndpoint(ctx, namespace, name)
	if err != nil && !isNotFound(err) && !errors.Is(err, api.ErrNoAgent) {
		return fmt.Errorf("disconnecting pod %s/%s: %w", cluster, name, err)
	}
	if err := deleteNS(b.podNS(cluster, name)); err != nil {
		return err
	}
	if err := removeCgroup(ctx, cgroup); err != nil {
		return err
	}
	return b.update(ctx, func(s *State) error {
		if p, err := s.pod(cluster, name); err == nil && p.Process != nil {
			b.exits.of(*p.Process)
		}
		s.removePod(cluster, name)
		return nil
	})
}

func isNotFound(err error) bool {
	var refused *api.Error
	return errors.As(err, &refused) && refused.Status == 404
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// Pods returns all pods of the bed.
func (b *Bed) Pods() ([]PodStatus, error) {
	s, err := b.readState()
	if err != nil {
		return nil, err
	}
	return b.podStatuses(s), nil
}

func (b *Bed) podStatuses(s *State) []PodStatus {
	pods := make([]PodStatus, 0, len(s.Pods))
	for i := range s.Pods {
		pods = append(pods, *b.podStatus(&s.Pods[i]))
	}
	return pods
}

func (b *Bed) podStatus(p *PodState) *PodStatus {
	st := &PodStatus{
		Cluster: p.Cluster, Name: p.Name, Namespace: p.Namespace, Node: p.Node, Address: p.Address, Address6: p.Address6, Labels: p.Labels,
		Command: p.Command, Log: b.podLog(p.Cluster, p.Node, p.Name), State: "creating",
	}
	if st.Labels == nil {
		st.Labels = map[string]string{}
	}
	switch {
	case p.Process.alive():
		st.PID, st.State = p.Process.PID, "running"
	case p.Process != nil:
		st.State = "exited"
		if code, ok := b.exits.of(*p.Process); ok {
			st.ExitCode = &code
		}
	}
	return st
}

// ParseLabels reads "a=b,c=d".
func ParseLabels(text string) (map[string]string, error) {
	labels := map[string]string{}
	for pair := range strings.SplitSeq(text, ",") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" || strings.ContainsAny(pair, " \t\n") {
			return nil, fmt.Errorf("label %q must be KEY=VALUE, without blanks", pair)
		}
		if old, dup := labels[k]; dup && old != v {
			return nil, fmt.Errorf("label %s is given twice, as %q and %q", k, old, v)
		}
		labels[k] = v
	}
	return labels, nil
}
