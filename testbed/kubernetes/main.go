// Command kubernetes is a real Kubernetes for the test-bed, in one program: control plane and its etcd, kubectl, a kubelet whose containers are plain processes, cluster DNS,
// and programs for pods. It is a module of its own, so that what all this depends on stays out of Causeway's.
//
// It does what the name that it is called by says, or else its first argument: kubernetes kube-apiserver --help.
package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// programs by name. Each gets the process's arguments in os.Args, its own name first.
var programs = map[string]func() int{
	"kube-apiserver":          kubeAPIServer,
	"kube-controller-manager": kubeControllerManager,
	"kube-scheduler":          kubeScheduler,
	"kubectl":                 kubectl,
	"etcd":                    etcd,
	"etcdctl":                 etcdctl,
	"etcdutl":                 etcdUtil,
	"coredns":                 coredns,
	"agnhost":                 agnhost,
	"kubelet":                 kubelet,
}

func main() {
	run, ok := programs[filepath.Base(os.Args[0])]
	if !ok && len(os.Args) > 1 {
		os.Args = os.Args[1:]
		run, ok = programs[os.Args[0]]
	}
	if !ok {
		fmt.Fprintf(os.Stderr, "usage: kubernetes PROGRAM ARGUMENT…, where PROGRAM is one of %s\n", strings.Join(slices.Sorted(maps.Keys(programs)), ", "))
		os.Exit(2)
	}
	os.Exit(run())
}
