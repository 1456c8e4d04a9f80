// Package install puts Causeway into a Kubernetes cluster and takes it out again. options.go says what can be chosen, objects.go, rbac.go, node.go and store.go make Kubernetes'
// objects of that (the only place that has them: the Helm chart is made of the same, by chart.go), apply.go, wait.go and remove.go bring them into a cluster, and
// detect.go and checks.go look at the cluster before.
package install

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"

	"causeway/identity"
	"causeway/lb"

	"k8s.io/apimachinery/pkg/api/resource"
)

// Modes of living with a cluster's network.
const (
	// ModeCNI: pods get their addresses and their way from Causeway.
	ModeCNI = "cni"
	// ModeChained: another CNI plugin does, and Causeway's is called after it.
	ModeChained = "chained"
)

// Defaults of Options.
const (
	DefaultNamespace = "causeway-system"
	DefaultImage     = "causeway/clustermesh"
	DefaultStorage   = "2Gi"
	DefaultMembers   = 3
)

// Options are all that can be chosen. They are kept in the cluster, in the ConfigMap [OptionsName], for upgrades.
type Options struct {
	// ClusterName and ClusterID as in the agent's configuration. ID 0 has the cluster take one that is free.
	ClusterName string             `json:"clusterName"`
	ClusterID   identity.ClusterID `json:"clusterID,omitempty"`
	// Namespace of all that is not the whole cluster's.
	Namespace string `json:"namespace"`
	// Image of the agents and of the store.
	Image string `json:"image"`
	// Mode is ModeCNI or ModeChained.
	Mode string `json:"mode"`
	// PodCIDRs and ServiceCIDRs of the cluster, one or one of each family.
	PodCIDRs     []netip.Prefix `json:"podCIDRs"`
	ServiceCIDRs []netip.Prefix `json:"serviceCIDRs"`
	// APIServer is the "host:port" at which nodes reach the API server without any Service, which the agents make: empty is the Service "kubernetes", which then takes kube-proxy.
	APIServer string `json:"apiServer,omitempty"`
	// Encryption as in the agent's configuration.
	Encryption identity.Encryption `json:"encryption"`
	// Members of the store, 1, 3 or 5.
	Members int `json:"members"`
	// StorageClass and StorageSize of each member's volume. An empty class is the cluster's default.
	StorageClass string `json:"storageClass,omitempty"`
	StorageSize  string `json:"storageSize"`
	// StoreToken is one for the members of this installation and for no other; made by the first install.
	StoreToken string `json:"storeToken"`
}

// SetDefaults fills in what has a default.
func (o *Options) SetDefaults() {
	setDefault(&o.Namespace, DefaultNamespace)
	setDefault(&o.Image, DefaultImage)
	setDefault(&o.Mode, ModeCNI)
	setDefault(&o.Encryption, identity.EncryptAll)
	setDefault(&o.Members, DefaultMembers)
	setDefault(&o.StorageSize, DefaultStorage)
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

var (
	// imageRef is the shape of an image's name, with a tag or a digest: what else is in it, the kubelet says.
	imageRef  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}$`)
	tokenText = regexp.MustCompile(`^[A-Za-z0-9-]{8,64}$`)
)

// Check refuses what cannot work. Each error names the flag of "clustermesh install" that changes it.
func (o *Options) Check() error {
	if len(o.PodCIDRs) == 0 {
		return errors.New("the cluster's pod CIDRs are not known: pass --pod-cidr, such as --pod-cidr 10.244.0.0/16, what kube-controller-manager has as --cluster-cidr")
	}
	if len(o.ServiceCIDRs) == 0 {
		return errors.New("the cluster's service CIDRs are not known: pass --service-cidr, such as --service-cidr 10.96.0.0/12, what kube-apiserver has as --service-cluster-ip-range")
	}
	info := identity.ClusterInfo{Name: o.ClusterName, ID: max(o.ClusterID, 1), Version: "any", PodCIDRs: o.PodCIDRs, ServiceCIDRs: o.ServiceCIDRs}
	if err := identity.CheckCluster(info); err != nil {
		return fmt.Errorf("%w: see --cluster-name, --cluster-id, --pod-cidr and --service-cidr", err)
	}
	if err := lb.CheckName("--namespace", o.Namespace); err != nil {
		return err
	}
	if !imageRef.MatchString(o.Image) {
		return fmt.Errorf("--image %q is no image's name, such as %s:v1", o.Image, DefaultImage)
	}
	if o.Mode != ModeCNI && o.Mode != ModeChained {
		return fmt.Errorf("--mode %q is not one of %s and %s", o.Mode, ModeCNI, ModeChained)
	}
	if _, err := identity.ParseEncryption(string(o.Encryption)); err != nil {
		return fmt.Errorf("--encryption: %w", err)
	}
	if o.APIServer != "" {
		if host, port, err := net.SplitHostPort(o.APIServer); err != nil || host == "" || port == "" || strings.ContainsAny(o.APIServer, " \"'/\\") {
			return fmt.Errorf("--api-server %q: want host:port, as nodes reach it", o.APIServer)
		}
	}
	if o.Members != 1 && o.Members != 3 && o.Members != 5 {
		return fmt.Errorf("--etcd-members %d: want 3, which live on without any one, 5, or 1 for a cluster of one or two nodes", o.Members)
	}
	if q, err := resource.ParseQuantity(o.StorageSize); err != nil || q.Sign() <= 0 {
		return fmt.Errorf("--etcd-storage-size %q is no size, such as %s", o.StorageSize, DefaultStorage)
	}
	if o.StorageClass != "" {
		if err := lb.CheckName("--etcd-storage-class", strings.ReplaceAll(o.StorageClass, ".", "-")); err != nil {
			return err
		}
	}
	if !tokenText.MatchString(o.StoreToken) {
		return fmt.Errorf("the store's token %q is not 8 to 64 letters, digits and hyphens", o.StoreToken)
	}
	return nil
}

// fixed says what an installation cannot change any more, by comparing the options that it has with those that are wanted.
func (o *Options) fixed(wanted *Options) error {
	for _, f := range []struct{ flag, has, wants, why string }{
		{"--cluster-name", o.ClusterName, wanted.ClusterName, "its identities, keys and peers have that name"},
		{"--namespace", o.Namespace, wanted.Namespace, "the store's volumes are in it"},
		{"--etcd-members", fmt.Sprint(o.Members), fmt.Sprint(wanted.Members), "members are added to a store one by one, and not by its manifest"},
		{"--etcd-storage-class", o.StorageClass, wanted.StorageClass, "the volumes are made"},
		{"--etcd-storage-size", o.StorageSize, wanted.StorageSize, "the volumes are made: make the claims larger themselves"},
	} {
		if f.has != f.wants {
			return fmt.Errorf("%s: installed is %q, and it cannot become %q: %s; uninstall it with --purge first, which ends its connections with other clusters", f.flag, f.has, f.wants, f.why)
		}
	}
	return nil
}
