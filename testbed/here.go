package testbed

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// SocketHere returns the socket of the agent of the node whose network namespace this process is in; false if it is in
// none of a test-bed's.
func SocketHere() (string, bool) {
	here, err := os.Stat("/proc/self/ns/net")
	if err != nil {
		return "", false
	}
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return "", false
	}
	for _, e := range entries {
		id, place, ok := strings.Cut(e.Name(), "-")
		if !ok || !strings.HasPrefix(id, "cw") {
			continue
		}
		if fi, err := os.Stat(netnsPath(e.Name())); err == nil && os.SameFile(here, fi) {
			return socketOfNS(id, place)
		}
	}
	return "", false
}

// socketOfNS returns the agent's socket for a node's namespace ID-PLACE. The cgroup of a bed says where the bed is.
func socketOfNS(id, place string) (string, bool) {
	for _, dir := range bedDirs(id) {
		l, err := newLayout(dir)
		if err != nil || l.id != id {
			continue
		}
		s, err := l.readState()
		if err != nil {
			continue
		}
		for _, c := range s.Clusters {
			for _, n := range c.Nodes {
				if c.Name+"-"+n.Name == place {
					return l.socket(c.Name, n.Name), true
				}
			}
		}
	}
	return "", false
}

func bedDirs(id string) []string {
	dirs := []string{DefaultDir, DemoDir}
	if mount, err := findCgroupMount(); err == nil && mount != "" {
		dirs = append(dirs, cgroupOwner(filepath.Join(mount, id)))
	}
	return dirs
}

// SocketOf returns the socket of the agent of a node, CLUSTER/NODE, of the test-bed in dir; an empty dir is the default one, or
// the demo's if only that is up.
func SocketOf(dir, node string) (string, error) {
	n, err := ParseNode(node)
	if err != nil {
		return "", err
	}
	l, err := newLayout(dir)
	if err != nil {
		return "", err
	}
	s, err := l.readState()
	if err != nil && dir == "" {
		if demo, demoErr := newLayout(DemoDir); demoErr == nil {
			if ds, demoErr := demo.readState(); demoErr == nil {
				l, s, err = demo, ds, nil
			}
		}
	}
	if err != nil {
		return "", err
	}
	if _, err := s.node(n.Cluster, n.Node); err != nil {
		return "", fmt.Errorf("test-bed in %s: %w", l.dir, err)
	}
	return l.socket(n.Cluster, n.Node), nil
}
