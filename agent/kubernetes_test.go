package agent

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/statedb"

	"causeway/clustermesh"
	"causeway/identity"
	"causeway/k8s"
	"causeway/kvstore"
	"causeway/lb"
)

func TestServicesOfKubernetesAreDeclaredThereAlone(t *testing.T) {
	store := kvstore.NewMemory()
	s := newServices(t, store)
	s.kubernetes = true
	_, applied := s.Apply(brief(t), manifest(""))
	for what, err := range map[string]error{"apply": applied, "delete": s.Delete(brief(t), lb.Name{Namespace: "default", Name: "shop"})} {
		if err == nil || httpStatus(err) != http.StatusConflict || !strings.Contains(err.Error(), "kubectl") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := stored(t, store); n != 0 || len(s.refusals.List()) > 0 {
		t.Errorf("%d entries, refusals %v", n, s.refusals.List())
	}
}

// lists answers lists of a Kubernetes API server, once it may: one Service, and nothing else. Watches are silent.
func lists(t *testing.T, may <-chan struct{}) *httptest.Server {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		kind, version, items := "", "v1", ""
		switch part := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]; part {
		case "services":
			kind, items = "Service", `{"metadata":{"namespace":"web","name":"shop"},"spec":{"clusterIP":"10.96.0.2","clusterIPs":["10.96.0.2"],"ports":[{"port":80}]}}`
		case "endpointslices":
			kind, version = "EndpointSlice", "discovery.k8s.io/v1"
		case "pods":
			kind = "Pod"
		case "nodes":
			kind = "Node"
		}
		select {
		case <-may:
		case <-r.Context().Done():
			return
		}
		switch q := r.URL.Query(); {
		case kind == "":
			fmt.Fprint(w, `{"gitVersion":"v1.34.10"}`)
		case q.Get("sendInitialEvents") != "":
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"BadRequest","code":400}`)
		case q.Get("watch") != "":
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			fmt.Fprintf(w, `{"kind":"%sList","apiVersion":"%s","metadata":{"resourceVersion":"1"},"items":[%s]}`, kind, version, items)
		}
	}))
	t.Cleanup(server.Close)
	return server
}

// TestNothingIsStaleUntilKubernetesIsRead has an agent that starts while the API server does not answer: its store has been read, but what the kernel has
// of the cluster's services stays until Kubernetes has said which there are.
func TestNothingIsStaleUntilKubernetesIsRead(t *testing.T) {
	answers := make(chan struct{})
	server := lists(t, answers)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte("clusters: [{name: c, cluster: {server: \""+server.URL+"\"}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tables := newTables(t)
	cfg := Config{Cluster: ClusterConfig{Name: "east", ID: 1}, Node: NodeConfig{Name: "node1"}, Kubernetes: KubernetesConfig{Kubeconfig: file}}
	a := &agent{
		cfg: cfg, log: slog.New(slog.DiscardHandler), tables: tables, refusals: clustermesh.NewRefusals(), synced: map[identity.ClusterID]bool{},
		life: &life{complete: make(chan struct{}, 1)}, tunnels: newTunnels(tables, newTestEncryption(tables, newFakeWireGuard(0))),
		channels: &channels{own: &channel{cluster: "east", id: 1}}, pods: &endpoints{},
	}
	var err error
	a.local, err = clustermesh.NewLocal(clustermesh.LocalConfig{
		Tables: tables, Log: a.log, Cluster: identity.ClusterInfo{Name: "east", ID: 1},
		Node: identity.Node{Cluster: "east", ClusterID: 1, Name: "node1", Address: netip.MustParseAddr("172.29.1.11"), Version: identity.Version{Incarnation: 1, Sequence: 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	a.balancer, _ = startBalance(t, tables, nil)
	if err := a.setupKubernetes(); err != nil {
		t.Fatal(err)
	}
	pruned := make(chan string, 1)
	a.prunes = append(a.prunes, func() { pruned <- keys(tables.DB.ReadTxn(), tables.Frontends) })
	run(t, a.local.Run)
	run(t, a.tunnels.Run)
	run(t, a.kubernetes.Run)

	a.ownStoreSynced(t.Context())
	<-a.life.complete // gossip need not wait
	if a.isSynced(1) {
		t.Error("the own cluster's entries in the kernel may be called stale before Kubernetes has been read")
	}
	if s := kubernetesStatus(a.kubernetes); s.Synced || s.Server != server.URL {
		t.Errorf("status %+v", s)
	}
	close(answers)
	if got := <-pruned; got != "10.96.0.2:80/TCP" {
		t.Errorf("when what is stale is removed, the frontends are %q", got)
	}
	if !a.isSynced(1) {
		t.Error("it is not known that all has been read")
	}
	until(t, tables, tables.Services, "the Service is there", func(txn statedb.ReadTxn) bool { return keys(txn, tables.Services) == "east/web/shop" })
	if kubernetesStatus((*k8s.Source)(nil)) != nil {
		t.Error("an agent without Kubernetes has a status of it")
	}
}
