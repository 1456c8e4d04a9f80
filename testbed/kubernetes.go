package testbed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"causeway/identity/pki"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
)

// The control plane of a cluster's Kubernetes runs on the machine that the cluster's store is on: in its network namespace, at its address. Nodes
// reach the API server there; people reach it at 127.0.0.1, through a process that listens in the machine's own namespace (forward.go).

const (
	clusterDomain = "cluster.local"
	apiServerPort = 6443
	kubeletPort   = 10250
	// Ports at loopback of the control plane's machine, whose store has 2379 at its address.
	etcdPort, etcdPeerPort = 2389, 2390
	controllerManagerPort  = 10257
	schedulerPort          = 10259
)

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// kubernetesNames are the programs that the one program is.
var kubernetesNames = []string{
	"kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd", "etcdctl", "etcdutl", "kubelet", "kubectl", "coredns", "agnhost",
}

// Parts of a cluster's Kubernetes, each a process; those but etcd and the forwarder can be killed and started by these names.
const (
	partEtcd              = "etcd"
	partAPIServer         = "apiserver"
	partControllerManager = "controller-manager"
	partScheduler         = "scheduler"
	partForward           = "forward"
)

// etcdName is that of a cluster's only etcd member.
const etcdName = "kubernetes"

// controlPlane are the parts on the cluster's machine, in the order of their start.
var controlPlane = []string{partEtcd, partAPIServer, partControllerManager, partScheduler}

// KubernetesState is a cluster's Kubernetes.
type KubernetesState struct {
	// Port at 127.0.0.1 of the machine at which the API server is reached.
	Port uint16 `json:"port"`
	// Processes by part: etcd, apiserver, controller-manager, scheduler, forward.
	Processes map[string]*Process `json:"processes,omitempty"`
}

// Kubeconfig returns the file with a context for each cluster of a bed that has Kubernetes, for this machine.
func (b *Bed) Kubeconfig() string { return b.path(kubeconfigName) }

func (l layout) kubernetes(cluster string, parts ...string) string {
	return l.path(append([]string{cluster, "kubernetes"}, parts...)...)
}
func (l layout) etcdData(cluster string) string      { return l.kubernetes(cluster, "etcd") }
func (l layout) partLog(cluster, part string) string { return l.kubernetes(cluster, part+".log") }

// cgroupPart is the cgroup of a part. The forwarder is no process of the cluster's machine, and outlives it.
func cgroupPart(cluster, part string) string {
	if part == partForward {
		return filepath.Join(cluster, partForward)
	}
	return filepath.Join(cluster, kvstoreName, part)
}

// serviceCIDRs of a cluster as Kubernetes wants them: the family of the API server's own address first.
func (c *ClusterState) serviceCIDRs() []netip.Prefix {
	cidrs := clusterServiceCIDRs(c.ID)
	if c.KVStore.Address.Is6() {
		slices.Reverse(cidrs)
	}
	return cidrs
}

// dnsAddress is that of the Service kube-system/kube-dns: the tenth of the first range.
func (c *ClusterState) dnsAddress() netip.Addr {
	a := c.serviceCIDRs()[0].Addr()
	for range 10 {
		a = a.Next()
	}
	return a
}

// partCommand returns the command line of a part of a cluster's control plane.
func (b *Bed) partCommand(c *ClusterState, part string) []string {
	cert := func(name string) string { return b.kubernetesPKI(c.Name, name) }
	program := func(name string, args ...string) []string {
		return append([]string{filepath.Join(b.binDir(), name)}, args...)
	}
	// manager is what controller-manager and scheduler have in common. They are alone, so there is no leader to elect.
	manager := func(name, kubeconfig string, port uint16, args ...string) []string {
		return program(name, append([]string{
			"--kubeconfig=" + kubeconfig, "--authentication-kubeconfig=" + kubeconfig, "--authorization-kubeconfig=" + kubeconfig,
			"--bind-address=" + loopback.String(), fmt.Sprintf("--secure-port=%d", port),
			"--tls-cert-file=" + cert(managersCert) + ".crt", "--tls-private-key-file=" + cert(managersCert) + ".key",
			"--leader-elect=false", "--profiling=false",
		}, args...)...)
	}
	switch part {
	case partEtcd:
		peer := urlAt(etcdPeerPort)
		return program("etcd", "--name="+etcdName, "--data-dir="+b.etcdData(c.Name),
			"--listen-client-urls="+urlAt(etcdPort), "--advertise-client-urls="+urlAt(etcdPort),
			"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster="+etcdName+"="+peer,
			// A killed process loses nothing that it has written; only a machine could.
			"--unsafe-no-fsync", "--log-level=warn")
	case partAPIServer:
		return program("kube-apiserver",
			"--bind-address="+c.KVStore.Address.String(), "--advertise-address="+c.KVStore.Address.String(), fmt.Sprintf("--secure-port=%d", apiServerPort),
			"--etcd-servers="+urlAt(etcdPort),
			"--tls-cert-file="+cert(apiServerCert)+".crt", "--tls-private-key-file="+cert(apiServerCert)+".key",
			"--client-ca-file="+cert(kubernetesCA)+".crt", "--authentication-config="+b.kubernetes(c.Name, "authentication.yaml"),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
			"--service-account-issuer=https://kubernetes.default.svc."+clusterDomain,
			"--service-account-key-file="+cert(serviceAccountCert)+".crt", "--service-account-signing-key-file="+cert(serviceAccountCert)+".key",
			// Webhooks and extension API servers are asked at their pods: services' addresses mean nothing on this machine, which is no node.
			"--service-cluster-ip-range="+joined(c.serviceCIDRs()), "--enable-aggregator-routing",
			"--kubelet-certificate-authority="+cert(kubernetesCA)+".crt", "--kubelet-preferred-address-types=InternalIP",
			"--kubelet-client-certificate="+cert(kubeletClientCert)+".crt", "--kubelet-client-key="+cert(kubeletClientCert)+".key",
			"--requestheader-client-ca-file="+cert(frontProxyCA)+".crt", "--requestheader-allowed-names="+frontProxyCert,
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file="+cert(frontProxyCert)+".crt", "--proxy-client-key-file="+cert(frontProxyCert)+".key",
			"--profiling=false")
	case partControllerManager:
		return manager("kube-controller-manager", b.managerKubeconfig(c.Name), controllerManagerPort,
			"--use-service-account-credentials", "--service-account-private-key-file="+cert(serviceAccountCert)+".key", "--root-ca-file="+cert(kubernetesCA)+".crt",
			"--cluster-signing-cert-file="+cert(kubernetesCA)+".crt", "--cluster-signing-key-file="+cert(kubernetesCA)+".key",
			// The bed gives each node its ranges; the kubelet says them.
			"--allocate-node-cidrs=false", "--cluster-cidr="+joined(clusterPodCIDRs(c.ID)), "--service-cluster-ip-range="+joined(c.serviceCIDRs()))
	case partScheduler:
		return manager("kube-scheduler", b.schedulerKubeconfig(c.Name), schedulerPort)
	}
	panic("no part of a control plane: " + part)
}

func urlAt(port uint16) string { return "http://" + netip.AddrPortFrom(loopback, port).String() }

func joined(prefixes []netip.Prefix) string {
	var s []string
	for _, p := range prefixes {
		s = append(s, p.String())
	}
	return strings.Join(s, ",")
}

// authenticationConfig lets nobody in without a certificate or a token, but for questions whether the API server is well.
const authenticationConfig = `apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous:
  enabled: true
  conditions: [{path: /livez}, {path: /readyz}, {path: /healthz}]
`

// partHealth is the URL that answers with 200 if a part is well.
func partHealth(c *ClusterState, part string) string {
	switch part {
	case partEtcd:
		return urlAt(etcdPort) + "/health"
	case partControllerManager:
		return apiServerURL(loopback, controllerManagerPort) + "/healthz"
	case partScheduler:
		return apiServerURL(loopback, schedulerPort) + "/healthz"
	}
	return apiServerURL(c.KVStore.Address, apiServerPort) + "/readyz"
}

// prepareKubernetes makes each cluster's API server reachable, then what all that runs reads.
func (b *Bed) prepareKubernetes(ctx context.Context, s *State) error {
	for _, c := range s.Clusters {
		if err := os.MkdirAll(b.kubernetes(c.Name), 0o700); err != nil {
			return err
		}
		if err := writeFile(b.kubernetes(c.Name, "authentication.yaml"), []byte(authenticationConfig), 0o600); err != nil {
			return err
		}
		if err := b.routeToPods(&c); err != nil {
			return err
		}
	}
	// First, because kubeconfigs have its port.
	if err := b.eachCluster(ctx, s, b.startForward); err != nil {
		return err
	}
	return b.certifyKubernetes(s)
}

// routeToPods gives a cluster's control plane the way to its pods, over their nodes, in the underlay's family: pods ask the API server by their own
// address, and the API server may ask them.
func (b *Bed) routeToPods(c *ClusterState) error {
	return withHandle(b.kvstoreNS(c.Name), func(h *netlink.Handle) error {
		for _, n := range c.Nodes {
			for _, pods := range n.PodCIDRs {
				if pods.Addr().Is4() != n.Address.Is4() {
					continue
				}
				dst := &net.IPNet{IP: pods.Addr().AsSlice(), Mask: net.CIDRMask(pods.Bits(), pods.Addr().BitLen())}
				if err := h.RouteReplace(&netlink.Route{Dst: dst, Gw: n.Address.AsSlice()}); err != nil {
					return fmt.Errorf("routing from the control plane of cluster %s to %s at %s: %w", c.Name, pods, n.Name, err)
				}
			}
		}
		return nil
	})
}

// startControlPlane starts all of a cluster's control plane that does not run and waits until it is well.
func (b *Bed) startControlPlane(ctx context.Context, s *State, c *ClusterState) error {
	if err := b.startParts(ctx, s, c, partEtcd); err != nil {
		return err
	}
	if err := b.startParts(ctx, s, c, partAPIServer); err != nil {
		return err
	}
	return b.startParts(ctx, s, c, partControllerManager, partScheduler)
}

// startParts starts those of the parts that do not run, and waits until all of them are well.
func (b *Bed) startParts(ctx context.Context, s *State, c *ClusterState, parts ...string) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, part := range parts {
		g.Go(func() error {
			p := c.Kubernetes.Processes[part]
			if !p.alive() {
				var err error
				if p, err = b.startPart(ctx, s, c, part); err != nil {
					return err
				}
			}
			return b.waitPart(ctx, c, part, p)
		})
	}
	return g.Wait()
}

func (b *Bed) startPart(ctx context.Context, s *State, c *ClusterState, part string) (*Process, error) {
	cgroup := s.cgroup(cgroupPart(c.Name, part))
	if err := makeCgroup(cgroup); err != nil {
		return nil, err
	}
	p, err := spawn(spec{argv: b.partCommand(c, part), env: b.environ(""), netns: b.kvstoreNS(c.Name), cgroup: cgroup, log: b.partLog(c.Name, part)})
	if err != nil {
		return nil, err
	}
	return p, b.recordPart(ctx, c.Name, part, p)
}

func (b *Bed) recordPart(ctx context.Context, cluster, part string, p *Process) error {
	return b.update(ctx, func(s *State) error {
		c, err := s.cluster(cluster)
		if err != nil {
			return err
		}
		if c.Kubernetes.Processes == nil {
			c.Kubernetes.Processes = map[string]*Process{}
		}
		c.Kubernetes.Processes[part] = p
		return nil
	})
}

// waitPart asks a part for its health until it is well.
func (b *Bed) waitPart(ctx context.Context, c *ClusterState, part string, p *Process) error {
	client, err := b.kubernetesHTTP(c)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	what := fmt.Sprintf("%s of the Kubernetes of cluster %s", part, c.Name)
	return waitWell(ctx, what, b.partLog(c.Name, part), p, func(ctx context.Context) error { return askHealth(ctx, client, partHealth(c, part)) })
}

// waitWell asks until there is no error, the process has ended, or ctx has.
func waitWell(ctx context.Context, what, log string, p *Process, ask func(context.Context) error) error {
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		if !p.alive() {
			return withLog(fmt.Errorf("the %s ended", what), log)
		}
		select {
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), context.Canceled) {
				return ctx.Err()
			}
			return withLog(fmt.Errorf("the %s is not well (%w): %w", what, err, context.Cause(ctx)), log)
		case <-time.After(5 * pollInterval):
		}
	}
}

// kubernetesHTTP returns a client that speaks to a cluster's control plane as its administrator, from within its namespace.
func (b *Bed) kubernetesHTTP(c *ClusterState) (*http.Client, error) {
	k, err := readKubeconfig(b.adminKubeconfig(c.Name))
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(k.Users, func(u kubeconfigUser) bool { return u.Name == c.Name })
	cert, err := pki.Pair{Cert: k.Users[i].User.Cert, Key: k.Users[i].User.Key}.TLS()
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(k.Clusters[i].Cluster.CA)
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		return b.dialIn(ctx, b.kvstoreNS(c.Name), network, address)
	}
	return &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{DialContext: dial, TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}},
	}, nil
}

// getObject reads an object, or a list, from a cluster's API server.
func getObject(ctx context.Context, client *http.Client, c *ClusterState, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, apiServerURL(c.KVStore.Address, apiServerPort)+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		return fmt.Errorf("GET %s: %s: %s", path, resp.Status, body)
	}
	return json.NewDecoder(resp.Body).Decode(into)
}

// KubernetesStatus is a cluster's Kubernetes as it is now.
type KubernetesStatus struct {
	// Server is its URL on this machine.
	Server string `json:"server"`
	// Version is what the API server says it is; empty if it does not answer.
	Version string `json:"version,omitempty"`
	// Parts by name: etcd, apiserver, controller-manager, scheduler.
	Parts map[string]ProcessStatus `json:"parts"`
	// Problems of the control plane and its nodes.
	Problems []string `json:"problems"`
}

// kubernetesStatus asks a cluster's API server how it and its nodes are.
func (b *Bed) kubernetesStatus(ctx context.Context, c *ClusterState) *KubernetesStatus {
	st := &KubernetesStatus{Server: apiServerURL(loopback, c.Kubernetes.Port), Parts: map[string]ProcessStatus{}, Problems: []string{}}
	for _, part := range controlPlane {
		st.Parts[part] = processStatus(c.Kubernetes.Processes[part], c.KVStore.Address, b.kvstoreNS(c.Name), b.partLog(c.Name, part))
	}
	for _, part := range slices.Sorted(maps.Keys(st.Parts)) {
		if !st.Parts[part].Alive {
			st.Problems = append(st.Problems, fmt.Sprintf("its %s does not run", part))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	err := func() error {
		client, err := b.kubernetesHTTP(c)
		if err != nil {
			return err
		}
		defer client.CloseIdleConnections()
		var version struct{ GitVersion string }
		if err := getObject(ctx, client, c, "/version", &version); err != nil {
			return err
		}
		st.Version = version.GitVersion
		waiting, err := notReady(ctx, client, c)
		st.Problems = append(st.Problems, waiting...)
		return err
	}()
	if err != nil && st.Parts[partAPIServer].Alive {
		st.Problems = append(st.Problems, "its API server does not answer: "+err.Error())
	}
	return st
}

// notReady returns what of a cluster's nodes and DNS is not ready, as the API server says it.
func notReady(ctx context.Context, client *http.Client, c *ClusterState) (problems []string, err error) {
	type condition struct{ Type, Status, Message string }
	var nodes struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct{ Conditions []condition }
		}
	}
	if err := getObject(ctx, client, c, "/api/v1/nodes", &nodes); err != nil {
		return nil, err
	}
	states := map[string]string{}
	for _, n := range nodes.Items {
		states[n.Metadata.Name] = "it has not said how it is"
		for _, cond := range n.Status.Conditions {
			if cond.Type == "Ready" {
				states[n.Metadata.Name] = cond.Message
				if cond.Status == "True" {
					states[n.Metadata.Name] = ""
				}
			}
		}
	}
	for _, n := range c.Nodes {
		if message, there := states[n.Name]; !there {
			problems = append(problems, fmt.Sprintf("%s has not registered", n.Name))
		} else if message != "" {
			problems = append(problems, fmt.Sprintf("%s is not ready: %s", n.Name, message))
		}
	}
	var dns struct {
		Status struct{ AvailableReplicas int }
	}
	if err := getObject(ctx, client, c, "/apis/apps/v1/namespaces/kube-system/deployments/coredns", &dns); err != nil {
		return problems, err
	}
	if dns.Status.AvailableReplicas == 0 {
		problems = append(problems, "cluster DNS is not available")
	}
	return problems, nil
}

//go:embed kubernetes.yaml
var kubernetesManifest string

// bringUpKubernetes starts a cluster's control plane for the first time, and applies what the cluster has from the start.
func (b *Bed) bringUpKubernetes(ctx context.Context, s *State, c *ClusterState) error {
	if err := b.startControlPlane(ctx, s, c); err != nil {
		return err
	}
	manifest := strings.NewReplacer("{{.Domain}}", clusterDomain, "{{.DNS}}", c.dnsAddress().String()).Replace(kubernetesManifest)
	if err := b.runTool(ctx, c.Name, manifest, "kubectl", "apply", "--server-side", "--field-manager=testbed", "-f", "-"); err != nil {
		return fmt.Errorf("applying what the Kubernetes of cluster %s has from the start: %w", c.Name, err)
	}
	return nil
}

// kubeconfigOf returns the kubeconfig for commands on a cluster's machines; empty if it has no Kubernetes.
func (b *Bed) kubeconfigOf(s *State, cluster string) string {
	if !s.hasKubernetes() {
		return ""
	}
	return b.adminKubeconfig(cluster)
}

// hasKubernetes tells whether the bed's clusters are Kubernetes clusters.
func (s *State) hasKubernetes() bool { return s.Clusters[0].Kubernetes != nil }
