package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"causeway/agent"
	"causeway/agent/api"

	"sigs.k8s.io/yaml"
)

// writeAgentConfig writes the configuration of a node's agent. Which clusters it is joined with is in its cluster's store.
func (b *Bed) writeAgentConfig(s *State, c ClusterState, n NodeState, o *Options) error {
	cfg := agent.Config{
		Cluster: agent.ClusterConfig{
			Name: c.Name, ID: c.ID,
			PodCIDRs:     clusterPodCIDRs(c.ID),
			ServiceCIDRs: clusterServiceCIDRs(c.ID),
		},
		Node:    agent.NodeConfig{Name: n.Name, Address: n.Address, PodCIDRs: n.PodCIDRs},
		KVStore: b.kvstoreConfig(c, b.nodePKI(c.Name, n.Name)),
		// The mesh is named by the bed's ID, so that two beds never mix.
		Gossip: agent.GossipConfig{KeyFile: b.gossipKey(c.Name, n.Name), Mesh: b.id},
		// A process that is WireGuard stays when its agent is killed, and goes with its node.
		Encryption: agent.EncryptionConfig{
			Mode: c.Encryption, DeviceName: b.wireGuardName(c.ID, nodeNumber(n.Name)), Cgroup: s.cgroup(cgroupWireGuard(c.Name, n.Name)),
		},
		// So does the L7 proxy.
		Proxy:    agent.ProxyConfig{Cgroup: s.cgroup(cgroupProxy(c.Name, n.Name))},
		Socket:   b.socket(c.Name, n.Name),
		StateDir: b.path(c.Name, n.Name, "state"),
		BPFFS:    b.bpffs(c.Name, n.Name),
		Cgroup:   s.cgroup(cgroupNode(c.Name, n.Name)),
		LogLevel: o.LogLevel,
	}
	if o.Kubernetes {
		cfg.Kubernetes.Kubeconfig = b.agentKubeconfig(c.Name, n.Name)
	}
	if o.AssignIDs {
		cfg.Cluster.ID = 0
	}
	doc, err := yaml.Marshal(cfg)
	if err != nil {
		return fmt.Errorf("writing the configuration of the agent of %s/%s: %w", c.Name, n.Name, err)
	}
	return writeFile(b.agentConfig(c.Name, n.Name), doc, 0o600)
}

func (l layout) agentConfig(cluster, n string) string { return l.path(cluster, n, "agent.yaml") }

// kvstoreConfig is how agents reach the store of a cluster, with the certificate in a directory.
func (l layout) kvstoreConfig(c ClusterState, pki string) agent.KVStoreConfig {
	return agent.KVStoreConfig{
		Endpoints: []string{"https://" + kvstoreEndpoint(c.KVStore.Address)},
		CAFile:    filepath.Join(pki, caFile+".crt"),
		CertFile:  filepath.Join(pki, agentFile+".crt"),
		KeyFile:   filepath.Join(pki, agentFile+".key"),
	}
}

// giveCertificate brings a node what its agent needs to reach its cluster's store, as one brings it to a machine. The agent
// renews it by itself.
func (l layout) giveCertificate(cluster, node string) error {
	dir := l.nodePKI(cluster, node)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{caFile + ".crt", agentFile + ".crt", agentFile + ".key"} {
		data, err := os.ReadFile(filepath.Join(l.pki(cluster), name))
		if err != nil {
			return fmt.Errorf("the certificate of the agent of %s/%s: %w", cluster, node, err)
		}
		if err := writeFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// startAgent starts a node's agent for the first time and waits until it is well.
func (b *Bed) startAgent(ctx context.Context, s *State, c *ClusterState, n *NodeState) error {
	if err := b.giveCertificate(c.Name, n.Name); err != nil {
		return err
	}
	p, err := b.launchAgent(ctx, s, c.Name, n.Name)
	if err != nil {
		return err
	}
	return b.waitAgent(ctx, c.Name, n.Name, p, 1)
}

// launchAgent starts a node's agent and records it.
func (b *Bed) launchAgent(ctx context.Context, s *State, cluster, node string) (*Process, error) {
	cgroup := s.cgroup(cgroupAgent(cluster, node))
	for _, dir := range []string{cgroup, s.cgroup(cgroupWireGuard(cluster, node)), s.cgroup(cgroupProxy(cluster, node))} {
		if err := makeCgroup(dir); err != nil {
			return nil, err
		}
	}
	// A killed agent leaves its socket, which would look like one that does not answer.
	if err := os.Remove(b.socket(cluster, node)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	env, err := b.agentEnviron(cluster, node)
	if err != nil {
		return nil, err
	}
	p, err := spawn(spec{
		argv: []string{b.binary(), "agent", "--config", b.agentConfig(cluster, node)},
		env:  env, netns: b.nodeNS(cluster, node), cgroup: cgroup, log: b.agentLog(cluster, node),
	})
	if err != nil {
		return nil, err
	}
	return p, b.update(ctx, func(s *State) error {
		n, err := s.node(cluster, node)
		if err == nil {
			n.Agent = p
		}
		return err
	})
}

// waitAgent waits until the agent is well and has synced with all the stores.
func (b *Bed) waitAgent(ctx context.Context, cluster, node string, p *Process, stores int) error {
	return b.pollAgent(ctx, cluster, node, p, func(ctx context.Context, c *api.Client) string {
		return agentProblem(ctx, c, stores)
	})
}

// waitAgentAnswers waits until the agent answers, however it is: it may be cut off from a store.
func (b *Bed) waitAgentAnswers(ctx context.Context, cluster, node string, p *Process) error {
	return b.pollAgent(ctx, cluster, node, p, func(ctx context.Context, c *api.Client) string {
		if _, err := c.Status(ctx); err != nil {
			return err.Error()
		}
		return ""
	})
}

// pollAgent asks an agent until it has no problem, has ended, or ctx has.
func (b *Bed) pollAgent(ctx context.Context, cluster, node string, p *Process, problemOf func(context.Context, *api.Client) string) error {
	client := b.Client(cluster, node)
	defer client.Close()
	for {
		problem := problemOf(ctx, client)
		if problem == "" {
			return nil
		}
		if !p.alive() {
			return withLog(fmt.Errorf("the agent of %s/%s ended right after its start", cluster, node), b.agentLog(cluster, node))
		}
		select {
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), context.Canceled) {
				return ctx.Err()
			}
			return withLog(fmt.Errorf("the agent of %s/%s is not well (%s): %w", cluster, node, problem, context.Cause(ctx)), b.agentLog(cluster, node))
		case <-time.After(2 * pollInterval):
		}
	}
}

// agentProblem asks an agent how it is; empty is well.
func agentProblem(ctx context.Context, client *api.Client, stores int) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	st, err := client.Status(ctx)
	switch {
	case err != nil:
		return err.Error()
	case !st.OK:
		return strings.Join(st.Problems, "; ")
	case len(st.Stores) < stores:
		return fmt.Sprintf("it follows %d of %d stores", len(st.Stores), stores)
	}
	for _, store := range st.Stores {
		if !store.Synced {
			return "it has not synced with the store of " + store.Cluster
		}
	}
	return ""
}

// environ is the environment of the bed's processes: the bed's program first in PATH, and the socket of the node's agent, if any.
func (l layout) environ(socket string) []string {
	var env []string
	for _, kv := range os.Environ() {
		if k, _, _ := strings.Cut(kv, "="); k != "PATH" && k != api.SocketEnv && k != agent.ClockOffsetEnv {
			env = append(env, kv)
		}
	}
	env = append(env, "PATH="+l.binDir()+":"+os.Getenv("PATH"))
	if socket != "" {
		env = append(env, api.SocketEnv+"="+socket)
	}
	return env
}
