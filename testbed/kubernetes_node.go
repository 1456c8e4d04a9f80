package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"
)

// cniPlugin is the name that the bed's program is called by as a CNI plugin.
const cniPlugin = "causeway-cni"

func (l layout) kubeletLog(cluster, n string) string { return l.path(cluster, n, "kubelet.log") }
func (l layout) cni(cluster, n string, parts ...string) string {
	return l.path(append([]string{cluster, n, "cni"}, parts...)...)
}
func (l layout) imagesFile() string { return l.path("bin", "images.yaml") }

func cgroupKubelet(cluster, n string) string { return filepath.Join(cluster, n, "kubelet") }

// image says what runs in a container instead of an image: nothing is downloaded here, and every machine has a shell.
type image struct {
	// Image is a pattern of names, in which * is any text.
	Image string `json:"image"`
	// Command and Args are the image's ENTRYPOINT and CMD.
	Command []string `json:"command,omitempty"`
	Args    []string `json:"args,omitempty"`
	// Env is the image's environment.
	Env map[string]string `json:"env,omitempty"`
}

// images of the bed, of which the first that matches counts.
func (b *Bed) images() []image {
	program := func(name string) []string { return []string{filepath.Join(b.binDir(), name)} }
	images := []image{
		{Image: "*pause*", Command: program("agnhost"), Args: []string{"pause"}},
		{Image: "*agnhost*", Command: program("agnhost"), Args: []string{"pause"}},
		{Image: "*coredns*", Command: program("coredns")},
		{Image: "*echo-basic*", Command: program(echoProgram)},
		{Image: "*causeway/serve*", Command: []string{b.binary(), "testbed", "serve"}},
		{Image: "*causeway/clustermesh*", Command: []string{b.binary()}},
		{Image: "*busybox*", Args: []string{"sh"}},
		{Image: "*alpine*", Args: []string{"sh"}},
		{Image: "*debian*", Args: []string{"bash"}},
		{Image: "*curl*", Args: []string{"curl"}},
	}
	for i := range images {
		// The bed's programs are found in containers as on nodes.
		images[i].Env = map[string]string{"PATH": b.binDir() + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	return images
}

// writeImages writes the table of images, which all kubelets read.
func (b *Bed) writeImages() error {
	doc, err := yaml.Marshal(b.images())
	if err != nil {
		return err
	}
	return writeFile(b.imagesFile(), doc, 0o600)
}

// prepareCNI writes how a node's kubelet has pods connected: by the bed's own program, called as the CNI specification says.
func (b *Bed) prepareCNI(cluster, node string) error {
	for _, dir := range []string{"conf", "bin"} {
		if err := os.MkdirAll(b.cni(cluster, node, dir), 0o700); err != nil {
			return err
		}
	}
	if err := os.Symlink(b.binary(), b.cni(cluster, node, "bin", cniPlugin)); err != nil {
		return err
	}
	conf, err := json.MarshalIndent(map[string]any{
		"cniVersion": "1.1.0",
		"name":       "causeway",
		"plugins":    []any{map[string]string{"type": cniPlugin, "socket": b.socket(cluster, node), "logFile": b.path(cluster, node, "cni.log")}},
	}, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(b.cni(cluster, node, "conf", "10-causeway.conflist"), append(conf, '\n'), 0o600)
}

// startKubelet starts a node's kubelet.
func (b *Bed) startKubelet(ctx context.Context, s *State, c *ClusterState, n *NodeState) error {
	cgroup := s.cgroup(cgroupKubelet(c.Name, n.Name))
	if err := makeCgroup(cgroup); err != nil {
		return err
	}
	cert := b.kubeletCert(c.Name, n.Name)
	p, err := spawn(spec{
		argv: []string{filepath.Join(b.binDir(), "kubelet"),
			"--kubeconfig=" + b.kubeletKubeconfig(c.Name, n.Name), "--node-name=" + n.Name, "--node-ip=" + n.Address.String(), "--pod-cidr=" + joined(n.PodCIDRs),
			"--root-dir=" + b.path(c.Name, n.Name, "kubelet"), "--cgroup=" + s.cgroup(c.Name, n.Name, "pods"),
			"--cni-conf-dir=" + b.cni(c.Name, n.Name, "conf"), "--cni-bin-dir=" + b.cni(c.Name, n.Name, "bin"),
			"--cluster-dns=" + c.dnsAddress().String(), "--cluster-domain=" + clusterDomain, "--images=" + b.imagesFile(),
			"--server-cert=" + cert + ".crt", "--server-key=" + cert + ".key", "--netns-prefix=" + b.id + "-" + c.Name, "--client-ca=" + b.kubernetesPKI(c.Name, kubernetesCA) + ".crt"},
		env: b.environ(b.socket(c.Name, n.Name)), netns: b.nodeNS(c.Name, n.Name), cgroup: cgroup, log: b.kubeletLog(c.Name, n.Name), binDir: b.binDir(),
	})
	if err != nil {
		return err
	}
	return b.update(ctx, func(s *State) error {
		n, err := s.node(c.Name, n.Name)
		if err == nil {
			n.Kubelet = p
		}
		return err
	})
}

// waitKubernetes waits until every node of a cluster is ready and its DNS answers.
func (b *Bed) waitKubernetes(ctx context.Context, _ *State, c *ClusterState) error {
	client, err := b.kubernetesHTTP(c)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	s, err := b.readState()
	if err != nil {
		return err
	}
	now, err := s.node(c.Name, c.Nodes[0].Name)
	if err != nil {
		return err
	}
	return waitWell(ctx, "kubelet of "+c.Name+"/"+now.Name, b.kubeletLog(c.Name, now.Name), now.Kubelet, func(ctx context.Context) error {
		return readiness(ctx, client, c)
	})
}

func readiness(ctx context.Context, client *http.Client, c *ClusterState) error {
	problems, err := notReady(ctx, client, c)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range problems {
		errs = append(errs, errors.New(p))
	}
	return errors.Join(errs...)
}
