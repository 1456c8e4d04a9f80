package k8s

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestNodeAddresses(t *testing.T) {
	node := func(podCIDR string, podCIDRs []string, addresses ...corev1.NodeAddress) *corev1.Node {
		n := &corev1.Node{Spec: corev1.NodeSpec{PodCIDR: podCIDR, PodCIDRs: podCIDRs}, Status: corev1.NodeStatus{Addresses: addresses}}
		n.Name = "node1"
		return n
	}
	host := corev1.NodeAddress{Type: corev1.NodeHostName, Address: "node1"}
	internal := corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}
	second := corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "2001:db8::1"}
	for _, tc := range []struct {
		node *corev1.Node
		cidr []string
		err  string
	}{
		{node("10.1.0.0/24", []string{"10.1.0.0/24", "fd00::/64"}, host, internal, second), []string{"10.1.0.0/24", "fd00::/64"}, ""},
		{node("10.1.0.0/24", nil, internal), []string{"10.1.0.0/24"}, ""},
		{node("10.1.0.0/24", nil, host), nil, "no InternalIP"},
		{node("", nil, internal), nil, "--allocate-node-cidrs"},
		{node("", []string{"10.1.0.0"}, internal), nil, "podCIDRs"},
	} {
		got, err := nodeAddresses(tc.node)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got %v, want %q", err, tc.err)
			}
			continue
		}
		var cidr []string
		for _, p := range got.PodCIDRs {
			cidr = append(cidr, p.String())
		}
		if err != nil || got.Address != netip.MustParseAddr("192.0.2.1") || !slices.Equal(cidr, tc.cidr) {
			t.Errorf("got %v, %v", got, err)
		}
	}
}
