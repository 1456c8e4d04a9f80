package testbed

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// kubernetesDir is that of the one bed with Kubernetes that all tests of a run share. It is always the same, so that what a killed run left goes with the next one.
var kubernetesDir = filepath.Join(os.TempDir(), "cw-kubernetes-test")

// kubernetesUp brings that bed up: two clusters of two nodes, with the program that users run.
var kubernetesUp = sync.OnceValues(func() (*Bed, error) {
	program, err := realBinary()
	if err != nil {
		return nil, err
	}
	return Up(context.Background(), Options{Dir: kubernetesDir, Clusters: []string{"east", "west"}, Nodes: 2, Binary: program, Kubernetes: true, Ephemeral: true})
})

// kube is the bed with Kubernetes in a test, which must leave it as it found it.
type kube struct {
	*testing.T
	bed *Bed
}

// kubernetesBed returns the bed with Kubernetes that the tests of a run share; the first one brings it up.
func kubernetesBed(t *testing.T) *kube {
	t.Helper()
	needRoot(t)
	b, err := kubernetesUp()
	if err != nil {
		var failed *ProcessError
		if errors.As(err, &failed) {
			t.Log(strings.Join(failed.Tail, "\n"))
		}
		t.Fatal(err)
	}
	return &kube{T: t, bed: b}
}

// takeKubernetesDown ends the shared bed, if there is one, the hard way: all of its processes are killed, then what is left is removed.
func takeKubernetesDown() error {
	if !fileExists(kubernetesDir) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if b, err := Open(kubernetesDir); err == nil {
		if s, err := b.State(); err == nil {
			if err := killCgroup(ctx, s.CgroupRoot); err != nil {
				return err
			}
		}
	}
	if err := Clean(ctx, kubernetesDir); err != nil {
		return err
	}
	left, err := Leftovers(kubernetesDir)
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left of the bed with Kubernetes: %v", left))
	}
	return err
}

// kubectl runs it as a user does, outside of all namespaces, and returns what it printed.
func (k *kube) kubectl(args ...string) string {
	k.Helper()
	out, err := k.try("", args...)
	if err != nil {
		k.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	return out
}

// try is kubectl that may fail, with a text as its input.
func (k *kube) try(input string, args ...string) (string, error) {
	k.Helper()
	// Also when the test is over, and cleans up.
	cmd := exec.CommandContext(context.WithoutCancel(k.Context()), filepath.Join(k.bed.BinDir(), "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+k.bed.Kubeconfig(), "HOME="+k.TempDir())
	cmd.Stdin = strings.NewReader(input)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, strings.TrimSpace(problems.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// apply applies a manifest in a cluster; the test's end deletes it.
func (k *kube) apply(cluster, manifest string) {
	k.Helper()
	if _, err := k.try(manifest, "--context", cluster, "apply", "-f", "-"); err != nil {
		k.Fatal(err)
	}
	k.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(k.bed.BinDir(), "kubectl"), "--kubeconfig", k.bed.Kubeconfig(), "--context", cluster, "delete", "--ignore-not-found", "-f", "-")
		cmd.Stdin = strings.NewReader(manifest)
		if out, err := cmd.CombinedOutput(); err != nil {
			k.Errorf("deleting what the test applied: %v\n%s", err, out)
		}
	})
}

func TestKubernetesNodes(t *testing.T) {
	k := kubernetesBed(t)
	var version struct {
		ClientVersion, ServerVersion struct{ GitVersion, Major, Minor string }
	}
	if err := json.Unmarshal([]byte(k.kubectl("version", "-o", "json")), &version); err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile("kubernetes/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if s := version.ServerVersion; s != version.ClientVersion || s.Major != "1" || !strings.HasPrefix(s.GitVersion, "v1."+s.Minor+".") ||
		!strings.Contains(string(mod), "k8s.io/kubernetes "+s.GitVersion+"\n") {
		t.Errorf("the versions are %+v, which go.mod does not name", version)
	}
	for i, cluster := range []string{"east", "west"} {
		nodes := k.kubectl("--context", cluster, "get", "nodes", "-o",
			`jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status} {.spec.podCIDRs} {.status.addresses[?(@.type=="InternalIP")].address}{"\n"}{end}`)
		want := strings.ReplaceAll(`node1 True ["10.C.1.0/24","fd00:10:C:1::/64"] 172.29.C.11`+"\n"+`node2 True ["10.C.2.0/24","fd00:10:C:2::/64"] 172.29.C.12`, "C", fmt.Sprint(i+1))
		if nodes != want {
			t.Errorf("nodes of %s:\n%s\nwant\n%s", cluster, nodes, want)
		}
		if out, code := run(t, k.bed, cluster+"/node1", "kubectl", "get", "nodes", "-o", "jsonpath={.items[*].status.addresses[0].address}"); code != 0 || out != fmt.Sprintf("172.29.%d.11 172.29.%[1]d.12", i+1) {
			t.Errorf("asked on %s/node1, with the cluster's own context: %q, exit code %d", cluster, out, code)
		}
	}
	st, err := k.bed.Status(t.Context())
	if err != nil || !st.OK {
		t.Errorf("status %+v, %v", st, err)
	}
}

// What may be done with which credentials, and without any.
func TestKubernetesPermissions(t *testing.T) {
	k := kubernetesBed(t)
	server := k.kubectl("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer client.CloseIdleConnections()
	for path, want := range map[string]int{"/readyz": 200, "/livez": 200, "/version": 401, "/api/v1/namespaces": 401, "/metrics": 401} {
		resp, err := client.Get(server + path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s without a certificate: %s, want %d", path, resp.Status, want)
		}
	}
	agent, kubelet := k.bed.agentKubeconfig("east", "node1"), k.bed.kubeletKubeconfig("east", "node1")
	for _, tt := range []struct {
		kubeconfig string
		can        string
		want       string
	}{
		{agent, "watch services", "yes"}, {agent, "list endpointslices.discovery.k8s.io", "yes"}, {agent, "list pods", "yes"},
		{agent, "get namespaces", "yes"}, {agent, "get nodes", "yes"}, {agent, "create events", "yes"},
		{agent, "get secrets", "no"}, {agent, "create pods", "no"}, {agent, "update nodes", "no"}, {agent, "delete services", "no"},
	} {
		argv := append([]string{"kubectl", "--kubeconfig", tt.kubeconfig, "auth", "can-i", "-A"}, strings.Fields(tt.can)...)
		out, _ := run(t, k.bed, "east/node1", argv...)
		if lines := strings.Split(strings.TrimSpace(out), "\n"); lines[len(lines)-1] != tt.want {
			t.Errorf("%s may %s: %q, want %s", filepath.Base(tt.kubeconfig), tt.can, out, tt.want)
		}
	}
	// A kubelet may change its own node alone.
	label := func(node string) (string, int) {
		return run(t, k.bed, "east/node1", "kubectl", "--kubeconfig", kubelet, "annotate", "--overwrite", "node", node, "test=of-permissions")
	}
	if out, code := label("node1"); code != 0 {
		t.Errorf("its own node: exit code %d: %s", code, out)
	}
	if out, code := label("node2"); code == 0 || !strings.Contains(out, "Forbidden") {
		t.Errorf("another node: exit code %d: %s", code, out)
	}
	k.kubectl("--context", "east", "annotate", "node", "node1", "test-")
}

func TestKubernetesPods(t *testing.T) {
	k := kubernetesBed(t)
	k.apply("west", `
apiVersion: apps/v1
kind: Deployment
metadata: {name: pods-test}
spec:
  replicas: 3
  selector: {matchLabels: {app: pods-test}}
  template:
    metadata: {labels: {app: pods-test}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: e2e-test-images/agnhost:2.53
        args: [netexec]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`)
	k.kubectl("--context", "west", "rollout", "status", "deployment/pods-test", "--timeout=60s")
	pods := strings.Fields(k.kubectl("--context", "west", "get", "pods", "-l", "app=pods-test", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(pods) != 3 {
		t.Fatalf("pods %q", pods)
	}
	if got := k.kubectl("--context", "west", "exec", pods[0], "--", "curl", "-s", "http://127.0.0.1:8080/hostname"); got != pods[0] {
		t.Errorf("a pod says it is %q, and is %s", got, pods[0])
	}
	if got := k.kubectl("--context", "west", "logs", pods[0]); !strings.Contains(got, "Started HTTP server on port 8080") {
		t.Errorf("log %q", got)
	}
	if got := k.kubectl("--context", "west", "exec", pods[1], "--", "/bin/sh", "-c", "getent hosts kubernetes.default.svc.cluster.local"); !strings.Contains(got, "100.64.128.1") {
		t.Errorf("cluster DNS says %q", got)
	}
}

// The API server is killed and started, and its store wiped and filled from a snapshot.
func TestKubernetesControlPlaneFaults(t *testing.T) {
	k := kubernetesBed(t)
	east := func(args ...string) string {
		t.Helper()
		return k.kubectl(append([]string{"--context", "east"}, args...)...)
	}
	east("create", "namespace", "before")
	t.Cleanup(func() { _, _ = k.try("", "--context", "east", "delete", "namespace", "before", "--wait=false") })
	snapshot := filepath.Join(t.TempDir(), "east.db")
	if err := k.bed.SnapshotKubernetes(t.Context(), "east", snapshot); err != nil {
		t.Fatal(err)
	}
	east("create", "namespace", "after")

	v := Victim{Kind: "apiserver", Cluster: "east"}
	if err := k.bed.Kill(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	if _, err := k.try("", "--context", "east", "--request-timeout=5s", "get", "nodes"); err == nil {
		t.Error("a killed API server answers")
	}
	if st, err := k.bed.Status(t.Context()); err != nil || st.OK || !strings.Contains(strings.Join(st.Clusters[0].Kubernetes.Problems, ";"), "its apiserver does not run") {
		t.Errorf("status of a bed without an API server: %+v, %v", st.Clusters[0].Kubernetes, err)
	}
	if err := k.bed.Kill(t.Context(), v); err == nil || !strings.Contains(err.Error(), "testbed start apiserver east") {
		t.Errorf("killing it again: %v", err)
	}
	if err := k.bed.Start(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	if got := east("get", "namespaces", "before", "after", "-o", "name"); got != "namespace/before\nnamespace/after" {
		t.Errorf("after a restart of the API server: %q", got)
	}

	if err := k.bed.RestoreKubernetes(t.Context(), "east", "/etc/hostname"); err == nil || !strings.Contains(err.Error(), "etcdutl") {
		t.Errorf("restoring what is no snapshot: %v", err)
	}
	east("get", "namespace", "after")
	if err := k.bed.RestoreKubernetes(t.Context(), "east", snapshot); err != nil {
		t.Fatal(err)
	}
	if got := east("get", "namespaces", "--ignore-not-found", "before", "after", "-o", "name"); got != "namespace/before" {
		t.Errorf("after the restore: %q", got)
	}
}

func TestKubernetesFaultsWithoutKubernetes(t *testing.T) {
	b := mustUp(t, Options{Clusters: []string{"east"}, Nodes: 1})
	for what, err := range map[string]error{
		"kill apiserver":  b.Kill(t.Context(), Victim{Kind: "apiserver", Cluster: "east"}),
		"start apiserver": b.Start(t.Context(), Victim{Kind: "apiserver", Cluster: "east"}),
		"kill kubelet":    b.Kill(t.Context(), Victim{Kind: "kubelet", Cluster: "east", Node: "node1"}),
		"start kubelet":   b.Start(t.Context(), Victim{Kind: "kubelet", Cluster: "east", Node: "node1"}),
		"snapshot":        b.SnapshotKubernetes(t.Context(), "east", "/nowhere"),
	} {
		if !errors.Is(err, errNoKubernetes) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
