package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// emptyCluster is an API server that has nothing but its ranges of Services, and a kubeconfig for it with the context "east".
func emptyCluster(t *testing.T) (kubeconfig string) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.HasSuffix(r.URL.Path, "/servicecidrs/kubernetes") {
			_, _ = io.WriteString(w, `{"kind":"ServiceCIDR","apiVersion":"networking.k8s.io/v1","metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/16"]}}`)
			return
		}
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
	}))
	t.Cleanup(server.Close)
	kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	text := "apiVersion: v1\nkind: Config\ncurrent-context: east\nclusters: [{name: c, cluster: {server: \"" + server.URL + "\"}}]\n" +
		"users: [{name: c, user: {}}]\ncontexts: [{name: east, context: {cluster: c, user: c}}, {name: west, context: {cluster: c, user: c}}]\n"
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return kubeconfig
}

func TestInstallPrintsTheObjects(t *testing.T) {
	kubeconfig := emptyCluster(t)
	args := []string{"install", "--kubeconfig", kubeconfig, "--context", "east", "--dry-run", "-o", "yaml", "--api-server", "192.0.2.1:6443"}
	got := cli(t, nil, append(args, "--pod-cidr", "10.1.0.0/16", "--image", "example.com/c:v1", "--etcd-members", "1")...)
	if got.code != exitOK || got.err != "" {
		t.Fatalf("got %+v", got)
	}
	for _, want := range []string{"kind: DaemonSet", "kind: StatefulSet", "image: example.com/c:v1", "name: east", `serviceCIDRs: ["10.96.0.0/16"]`, "replicas: 1"} {
		if !strings.Contains(got.out, want) {
			t.Errorf("%q is not in the manifest", want)
		}
	}
	if strings.Contains(got.out, "PRIVATE KEY") || strings.Contains(got.out, "kind: Secret") {
		t.Error("a secret is in the manifest")
	}
	if got := cli(t, nil, args...); got.code != exitFailed || !strings.Contains(got.err, "--pod-cidr") {
		t.Errorf("without pod ranges: %+v", got)
	}
}

func TestInstallRefuses(t *testing.T) {
	kubeconfig := emptyCluster(t)
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"install", exitNotAsked, "--cluster-name"},
		{"install --context north", exitNotAsked, "north"},
		{"install --context east --pod-cidr x", exitNotAsked, "--pod-cidr"},
		{"install --context east", exitFailed, "--api-server"}, // the kubeconfig's is on the loopback
		{"install --context east --cluster-id 256", exitNotAsked, "cluster-id"},
		{"upgrade --context east", exitFailed, "not installed"},
		{"uninstall --context east --yes", exitFailed, "not installed"},
		{"connect --context east", exitNotAsked, "--to"},
		{"connect --to east", exitNotAsked, "--context"},
		{"connect --context east --to east", exitNotAsked, "itself"},
		{"connect --context east --to north", exitFailed, ""},
		{"connect --context east --to west", exitFailed, "agents of east"},
		{"connect --context east --to west - ", exitNotAsked, "give one of them"},
	} {
		got := cli(t, nil, append(strings.Fields(tc.args), "--kubeconfig", kubeconfig)...)
		if got.code != tc.code || got.out != "" || !strings.Contains(got.err, tc.want) {
			t.Errorf("%s: got %+v, want code %d and %q", tc.args, got, tc.code, tc.want)
		}
	}
}

func TestWithBrackets(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1:1": "192.0.2.1:1", "2001:db8::1:7961": "[2001:db8::1]:7961", "[2001:db8::1]:7961": "[2001:db8::1]:7961", ":1": ":1", "": "", "host:1": "host:1",
	} {
		if got := withBrackets(address); got != want {
			t.Errorf("%q: %q, want %q", address, got, want)
		}
	}
}
