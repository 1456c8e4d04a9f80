package kubelet

import (
	"strings"
	"testing"

	"causeway/testbed/kubernetes/kubelet/cri"
)

func TestCheckFlags(t *testing.T) {
	good := func() config {
		return config{nodeIPs: []string{"10.0.0.1", "fd00::1"}, podCIDRs: []string{"10.1.0.0/24"}, clusterDNS: "10.96.0.10", runtime: cri.Config{Root: "/run/x"}}
	}
	if err := good().check(); err != nil {
		t.Errorf("refused what is right: %v", err)
	}
	for says, spoil := range map[string]func(*config){
		"addresses":     func(c *config) { c.nodeIPs = []string{"node"} },
		"absolute path": func(c *config) { c.runtime.Root = "run" },
		"at most 80":    func(c *config) { c.runtime.Root = "/run/" + strings.Repeat("x", 80) },
		"no prefix":     func(c *config) { c.podCIDRs = []string{"10.1.0.0"} },
		"beyond":        func(c *config) { c.podCIDRs = []string{"10.1.0.1/24"} },
	} {
		c := good()
		spoil(&c)
		if err := c.check(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, which does not say %q", err, says)
		}
	}
}
