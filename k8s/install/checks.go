package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/version"
)

// minimumVersion of Kubernetes: what the objects use is older, and older ones were never tried.
const minimumVersion = "1.28.0"

// networks are DaemonSets by which other CNI plugins are known.
var networks = map[string]string{
	"antrea-agent": "Antrea", "aws-node": "the AWS VPC CNI", "azure-cni": "Azure CNI", "calico-node": "Calico", "canal": "Canal", "cilium": "Cilium", "kindnet": "kindnet",
	"kube-flannel": "Flannel", "kube-flannel-ds": "Flannel", "kube-router": "kube-router", "ovnkube-node": "OVN-Kubernetes", "weave-net": "Weave Net",
}

// defaultClass marks a StorageClass that claims without one get.
const defaultClass = "storageclass.kubernetes.io/is-default-class"

// CheckCluster refuses a cluster that the options won't work in, with all reasons at once.
func (c *Cluster) CheckCluster(ctx context.Context, o Options) error {
	server, err := c.client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("the API server %s: %w", c.host, err)
	}
	if v, err := version.ParseGeneric(server.GitVersion); err != nil || v.LessThan(version.MustParseGeneric(minimumVersion)) {
		return fmt.Errorf("the API server %s has version %s: at least %s is needed", c.host, server.GitVersion, minimumVersion)
	}
	return errors.Join(c.checkPermissions(ctx, o), c.checkNetwork(ctx, o), c.checkStorage(ctx, o), c.checkNodes(ctx, o))
}

// checkPermissions asks whether we may make each kind of object.
func (c *Cluster) checkPermissions(ctx context.Context, o Options) error {
	objects, err := Objects(o)
	if err != nil {
		return err
	}
	all, err := entries(objects)
	if err != nil {
		return err
	}
	type right struct{ verb, group, resource, namespace string }
	wanted := []right{{"create", "", "secrets", o.Namespace}, {"get", "", "secrets", o.Namespace}}
	for _, e := range all {
		for _, verb := range []string{"get", "create", "patch"} {
			r := right{verb, e.resource().Group, e.resource().Resource, e.GetNamespace()}
			if !slices.Contains(wanted, r) {
				wanted = append(wanted, r)
			}
		}
	}
	var missing []string
	for _, r := range wanted {
		answer, err := c.client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
			Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
				Verb: r.verb, Group: r.group, Resource: r.resource, Namespace: r.namespace,
			}},
		}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("the API server %s does not say what we may do: %w", c.host, err)
		}
		if !answer.Status.Allowed {
			missing = append(missing, r.verb+" "+r.resource)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("we may not %s at %s: it takes a user who may, such as one with the ClusterRole cluster-admin", strings.Join(missing, ", "), c.host)
	}
	return nil
}

// checkNetwork refuses to be a second network, and to be chained behind none.
func (c *Cluster) checkNetwork(ctx context.Context, o Options) error {
	all, err := c.client.AppsV1().DaemonSets(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("the API server %s: list DaemonSets, to see whether there is another CNI plugin: %w", c.host, err)
	}
	for _, d := range all.Items {
		if name, ok := networks[d.Name]; ok && o.Mode == ModeCNI && d.Namespace != o.Namespace {
			return fmt.Errorf("pods of this cluster have their network from %s (DaemonSet %s/%s), which Causeway cannot live beside in this version: install it in a cluster without a CNI plugin", name, d.Namespace, d.Name)
		}
	}
	return nil
}

// checkStorage refuses claims that nobody would ever fulfil.
func (c *Cluster) checkStorage(ctx context.Context, o Options) error {
	classes, err := c.client.StorageV1().StorageClasses().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("the API server %s: list StorageClasses: %w", c.host, err)
	}
	var names []string
	for _, class := range classes.Items {
		if class.Name == o.StorageClass || o.StorageClass == "" && class.Annotations[defaultClass] == "true" {
			return nil
		}
		names = append(names, class.Name)
	}
	if o.StorageClass != "" {
		return fmt.Errorf("there is no StorageClass %s for the store's volumes: pass --etcd-storage-class with one of %s", o.StorageClass, orNone(names))
	}
	return fmt.Errorf("no StorageClass is the default for the store's volumes: pass --etcd-storage-class with one of %s", orNone(names))
}

// checkNodes refuses more members than there are nodes, each of which takes one.
func (c *Cluster) checkNodes(ctx context.Context, o Options) error {
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("the API server %s: list Nodes: %w", c.host, err)
	}
	if n := len(nodes.Items); n < o.Members {
		return fmt.Errorf("the cluster has %d nodes, and the store's %d members need one each: pass --etcd-members 1", n, o.Members)
	}
	return nil
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "(there is none: make one first, such as with a local-path provisioner)"
	}
	return strings.Join(names, ", ")
}
