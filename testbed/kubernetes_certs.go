package testbed

import (
	"fmt"
	"net/netip"
	"os"
	"time"

	"causeway/identity/pki"

	"sigs.k8s.io/yaml"
)

// Certificates of a cluster's Kubernetes, in its kubernetes/pki directory. They have an authority of their own: what may ask the API server is
// nobody in the cluster's store, and the other way round.
const (
	kubernetesCA       = "ca"
	apiServerCert      = "apiserver"
	kubeletClientCert  = "apiserver-kubelet-client" // the API server's, at kubelets
	managersCert       = "managers"                 // of controller-manager and scheduler, for what asks them
	serviceAccountCert = "service-accounts"         // signs the tokens of service accounts
	// What the API server is to extension API servers, which believe it whom it asks for. The authority is for nothing else.
	frontProxyCA, frontProxyCert = "front-proxy-ca", "front-proxy-client"
)

// Users of Kubernetes that have a kubeconfig; its groups are Kubernetes' own.
var (
	userAdmin             = pki.Request{User: "kubernetes-admin", Groups: []string{"system:masters"}}
	userControllerManager = pki.Request{User: "system:kube-controller-manager", Groups: []string{"system:kube-controller-manager"}}
	userScheduler         = pki.Request{User: "system:kube-scheduler", Groups: []string{"system:kube-scheduler"}}
	// userAgent has only what kubernetes.yaml grants it.
	userAgent = pki.Request{User: "causeway-agent", Groups: []string{"causeway:agents"}}
)

// userNode is a kubelet, which the API server lets change its own node and pods alone.
func userNode(node string) pki.Request {
	return pki.Request{User: "system:node:" + node, Groups: []string{"system:nodes"}}
}

func (l layout) kubernetesPKI(cluster, name string) string { return l.kubernetes(cluster, "pki", name) }

// kubeconfigs of a cluster; the one of its agents and kubelet is in each node's directory.
func (l layout) adminKubeconfig(cluster string) string {
	return l.kubernetes(cluster, "admin.kubeconfig")
}
func (l layout) managerKubeconfig(cluster string) string {
	return l.kubernetes(cluster, "controller-manager.kubeconfig")
}
func (l layout) schedulerKubeconfig(cluster string) string {
	return l.kubernetes(cluster, "scheduler.kubeconfig")
}
func (l layout) agentKubeconfig(cluster, node string) string {
	return l.path(cluster, node, "kubernetes", "agent.kubeconfig")
}
func (l layout) kubeletKubeconfig(cluster, node string) string {
	return l.path(cluster, node, "kubernetes", "kubelet.kubeconfig")
}
func (l layout) kubeletCert(cluster, node string) string {
	return l.path(cluster, node, "kubernetes", "kubelet")
}

// certifyKubernetes makes all certificates and kubeconfigs of the bed's clusters.
func (b *Bed) certifyKubernetes(s *State) error {
	now := time.Now()
	inside, outside := newKubeconfig(), newKubeconfig()
	authorities := map[string]*pki.Authority{}
	for _, c := range s.Clusters {
		authority, err := pki.NewAuthority(c.Name, now)
		if err != nil {
			return err
		}
		authorities[c.Name] = authority
		if err := b.certifyControlPlane(&c, authority, now); err != nil {
			return err
		}
		admin, err := authority.Issue(userAdmin, now)
		if err != nil {
			return err
		}
		inside.add(c.Name, apiServerURL(c.KVStore.Address, apiServerPort), authority, admin)
		outside.add(c.Name, apiServerURL(loopback, c.Kubernetes.Port), authority, admin)
	}
	for _, c := range s.Clusters {
		inside.CurrentContext = c.Name
		if err := inside.write(b.adminKubeconfig(c.Name)); err != nil {
			return err
		}
		for _, n := range c.Nodes {
			if err := b.certifyNode(&c, &n, authorities[c.Name], now); err != nil {
				return err
			}
		}
	}
	outside.CurrentContext = s.Clusters[0].Name
	return outside.write(b.Kubeconfig())
}

// certifyControlPlane makes what a cluster's control plane has.
func (b *Bed) certifyControlPlane(c *ClusterState, authority *pki.Authority, now time.Time) error {
	if err := os.MkdirAll(b.kubernetes(c.Name, "pki"), 0o700); err != nil {
		return err
	}
	// The managers sign for others, as a kubelet's certificate that it asks for.
	ca := pki.Pair{Cert: authority.CertPEM(), Key: authority.KeyPEM()}
	if err := b.writePair(b.kubernetesPKI(c.Name, kubernetesCA), ca); err != nil {
		return err
	}
	front, err := pki.NewAuthority(c.Name, now)
	if err != nil {
		return err
	}
	if err := writeFile(b.kubernetesPKI(c.Name, frontProxyCA)+".crt", front.CertPEM(), 0o600); err != nil {
		return err
	}
	hosts := []string{c.KVStore.Address.String(), loopback.String(), "localhost", "kubernetes"}
	for _, domain := range []string{"default", "default.svc", "default.svc." + clusterDomain} {
		hosts = append(hosts, "kubernetes."+domain)
	}
	for _, services := range clusterServiceCIDRs(c.ID) {
		hosts = append(hosts, services.Addr().Next().String()) // of the Service default/kubernetes
	}
	for _, cert := range []struct {
		name   string
		signer *pki.Authority
		pki.Request
	}{
		{apiServerCert, authority, pki.Request{User: "kube-apiserver", Server: true, Hosts: hosts}},
		{managersCert, authority, pki.Request{User: "kube-managers", Server: true, Hosts: []string{loopback.String()}}},
		{kubeletClientCert, authority, pki.Request{User: "kube-apiserver-kubelet-client", Groups: []string{"system:masters"}}},
		{serviceAccountCert, authority, pki.Request{User: "service-accounts"}},
		{frontProxyCert, front, pki.Request{User: frontProxyCert}},
	} {
		pair, err := cert.signer.Issue(cert.Request, now)
		if err != nil {
			return err
		}
		if err := b.writePair(b.kubernetesPKI(c.Name, cert.name), pair); err != nil {
			return err
		}
	}
	for file, user := range map[string]pki.Request{
		b.managerKubeconfig(c.Name): userControllerManager, b.schedulerKubeconfig(c.Name): userScheduler,
	} {
		if err := b.writeKubeconfig(file, c, authority, user, now); err != nil {
			return err
		}
	}
	return nil
}

// certifyNode makes what a node's agent and its kubelet have.
func (b *Bed) certifyNode(c *ClusterState, n *NodeState, authority *pki.Authority, now time.Time) error {
	if err := os.MkdirAll(b.path(c.Name, n.Name, "kubernetes"), 0o700); err != nil {
		return err
	}
	serving := pki.Request{User: "system:node:" + n.Name, Groups: []string{"system:nodes"}, Server: true, Hosts: []string{n.Address.String(), n.Name}}
	pair, err := authority.Issue(serving, now)
	if err != nil {
		return err
	}
	if err := b.writePair(b.kubeletCert(c.Name, n.Name), pair); err != nil {
		return err
	}
	if err := b.writeKubeconfig(b.kubeletKubeconfig(c.Name, n.Name), c, authority, userNode(n.Name), now); err != nil {
		return err
	}
	return b.writeKubeconfig(b.agentKubeconfig(c.Name, n.Name), c, authority, userAgent, now)
}

func (b *Bed) writePair(path string, p pki.Pair) error {
	if err := writeFile(path+".crt", p.Cert, 0o600); err != nil {
		return err
	}
	return writeFile(path+".key", p.Key, 0o600)
}

// writeKubeconfig writes one for a user of a cluster's API server at its own address.
func (b *Bed) writeKubeconfig(file string, c *ClusterState, authority *pki.Authority, user pki.Request, now time.Time) error {
	pair, err := authority.Issue(user, now)
	if err != nil {
		return err
	}
	k := newKubeconfig()
	k.add(c.Name, apiServerURL(c.KVStore.Address, apiServerPort), authority, pair)
	k.CurrentContext = c.Name
	return k.write(file)
}

func apiServerURL(address netip.Addr, port uint16) string {
	return "https://" + netip.AddrPortFrom(address, port).String()
}

// kubeconfig is the part of client-go's Config (v1) that the bed writes.
type kubeconfig struct {
	APIVersion     string              `json:"apiVersion"`
	Kind           string              `json:"kind"`
	CurrentContext string              `json:"current-context"`
	Clusters       []kubeconfigCluster `json:"clusters"`
	Users          []kubeconfigUser    `json:"users"`
	Contexts       []kubeconfigContext `json:"contexts"`
}

type kubeconfigCluster struct {
	Name    string `json:"name"`
	Cluster struct {
		Server string `json:"server"`
		CA     []byte `json:"certificate-authority-data"`
	} `json:"cluster"`
}

type kubeconfigUser struct {
	Name string `json:"name"`
	User struct {
		Cert []byte `json:"client-certificate-data"`
		Key  []byte `json:"client-key-data"`
	} `json:"user"`
}

type kubeconfigContext struct {
	Name    string `json:"name"`
	Context struct {
		Cluster string `json:"cluster"`
		User    string `json:"user"`
	} `json:"context"`
}

func newKubeconfig() *kubeconfig { return &kubeconfig{APIVersion: "v1", Kind: "Config"} }

// add adds a cluster, a user of it, and a context for both, all by the cluster's name.
func (k *kubeconfig) add(cluster, server string, authority *pki.Authority, user pki.Pair) {
	c, u, ctx := kubeconfigCluster{Name: cluster}, kubeconfigUser{Name: cluster}, kubeconfigContext{Name: cluster}
	c.Cluster.Server, c.Cluster.CA = server, authority.CertPEM()
	u.User.Cert, u.User.Key = user.Cert, user.Key
	ctx.Context.Cluster, ctx.Context.User = cluster, cluster
	k.Clusters, k.Users, k.Contexts = append(k.Clusters, c), append(k.Users, u), append(k.Contexts, ctx)
}

func readKubeconfig(file string) (*kubeconfig, error) {
	doc, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	k := new(kubeconfig)
	if err := yaml.Unmarshal(doc, k); err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return k, nil
}

func (k *kubeconfig) write(file string) error {
	doc, err := yaml.Marshal(k)
	if err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	return writeFile(file, doc, 0o600)
}
