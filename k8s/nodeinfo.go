package k8s

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// NodeAddresses is what a Node says that an agent has to know of its node before it can begin.
type NodeAddresses struct {
	// Address on the underlay: the first InternalIP.
	Address netip.Addr
	// PodCIDRs that the cluster's controller manager, or its provider, has given the node.
	PodCIDRs []netip.Prefix
}

// NodeInfo asks the API server for a Node, once.
func NodeInfo(ctx context.Context, cfg *rest.Config, name string) (NodeAddresses, error) {
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return NodeAddresses{}, fmt.Errorf("kubernetes: %w", err)
	}
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return NodeAddresses{}, fmt.Errorf("kubernetes: node %s at %s: %w", name, cfg.Host, err)
	}
	return nodeAddresses(node)
}

func nodeAddresses(node *corev1.Node) (out NodeAddresses, err error) {
	for _, a := range node.Status.Addresses {
		if a.Type != corev1.NodeInternalIP || out.Address.IsValid() {
			continue
		}
		if out.Address, err = netip.ParseAddr(a.Address); err != nil {
			return out, fmt.Errorf("kubernetes: node %s: InternalIP: %w", node.Name, err)
		}
	}
	if !out.Address.IsValid() {
		return out, fmt.Errorf("kubernetes: node %s has no InternalIP in its status: give node.address in the agent's configuration, or the kubelet --node-ip", node.Name)
	}
	ranges := node.Spec.PodCIDRs
	if len(ranges) == 0 && node.Spec.PodCIDR != "" {
		ranges = []string{node.Spec.PodCIDR}
	}
	for _, text := range ranges {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return out, fmt.Errorf("kubernetes: node %s: podCIDRs: %w", node.Name, err)
		}
		out.PodCIDRs = append(out.PodCIDRs, prefix)
	}
	if len(out.PodCIDRs) == 0 {
		return out, fmt.Errorf("kubernetes: node %s has no spec.podCIDRs yet: run kube-controller-manager with --allocate-node-cidrs and --cluster-cidr, or give node.podCIDRs in the agent's configuration", node.Name)
	}
	return out, nil
}
