package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// kubeconfigOf writes a kubeconfig for an API server.
func kubeconfigOf(t *testing.T, server string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: \"" + server + "\"}}]\n" +
		"users: [{name: c, user: {}}]\ncontexts: [{name: c, context: {cluster: c, user: c}}]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestConfigFromNode has what a configuration lacks come from the Node, and what it says win.
func TestConfigFromNode(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path != "/api/v1/nodes/node1" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = w.Write([]byte(`{"kind":"Node","apiVersion":"v1","metadata":{"name":"node1"},"spec":{"podCIDRs":["10.1.1.0/24"]},
			"status":{"addresses":[{"type":"InternalIP","address":"172.29.1.11"}]}}`))
	}))
	defer server.Close()
	config := func(node string) string {
		file := filepath.Join(t.TempDir(), "agent.yaml")
		text := "cluster: {name: east, podCIDRs: [10.1.0.0/16], serviceCIDRs: [100.64.64.0/18]}\nnode: {" + node + "}\n" +
			"kvstore: {endpoints: [\"https://etcd-0.etcd.sys.svc:7961\"], caFile: ca, certFile: cert, keyFile: key}\nkubernetes: {kubeconfig: " + kubeconfigOf(t, server.URL) + "}\n"
		if err := writeFile(file, []byte(text)); err != nil {
			t.Fatal(err)
		}
		return file
	}
	t.Setenv(nodeNameEnv, "node1")
	c, err := LoadConfig(config(""))
	if err != nil || c.Node.Name != "node1" || c.Node.Address.String() != "172.29.1.11" || len(c.Node.PodCIDRs) != 1 || c.Node.PodCIDRs[0].String() != "10.1.1.0/24" {
		t.Errorf("got %+v, %v", c.Node, err)
	}
	c, err = LoadConfig(config("address: 172.29.1.12"))
	if err != nil || c.Node.Address.String() != "172.29.1.12" || len(c.Node.PodCIDRs) != 1 {
		t.Errorf("got %+v, %v", c.Node, err)
	}
	if _, err = LoadConfig(config("name: node2")); err == nil || !strings.Contains(err.Error(), "node node2") {
		t.Errorf("a Node that is not there: %v", err)
	}
	t.Setenv(nodeNameEnv, "")
	if _, err = LoadConfig(config("")); err == nil || !strings.Contains(err.Error(), "node.name") {
		t.Errorf("no name: %v", err)
	}
}

// TestStoreEndpointsForOthers puts addresses in place of names that hold in this cluster only.
func TestStoreEndpointsForOthers(t *testing.T) {
	a := &agent{resolver: &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no DNS") }}}
	if got, err := a.resolveEndpoints(t.Context(), []string{"https://172.29.1.2:2379"}); err != nil || !slices.Equal(got, []string{"https://172.29.1.2:2379"}) {
		t.Errorf("addresses: %v, %v", got, err)
	}
	if _, err := a.resolveEndpoints(t.Context(), []string{"https://etcd-0.etcd.sys.svc:7961"}); err == nil || !strings.Contains(err.Error(), "no DNS") {
		t.Errorf("names that nobody knows: %v", err)
	}
	if got, err := a.resolveEndpoints(t.Context(), []string{"https://etcd-0.etcd.sys.svc:7961", "https://172.29.1.2:2379"}); err != nil || len(got) != 1 {
		t.Errorf("one of two: %v, %v", got, err)
	}
}
