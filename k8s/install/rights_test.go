package install

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"causeway/k8s"
)

// rightsUsed runs something as an agent's ServiceAccount of an installation, and returns which rights it has made use of, as "get pods", and which it was denied.
func rightsUsed(t *testing.T, c *Cluster, admin *rest.Config, namespace string, run func(ctx context.Context, agent *rest.Config) error) (used, denied []string) {
	t.Helper()
	token, err := c.client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), AgentName, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	agent := rest.CopyConfig(admin)
	agent.BearerToken = token.Status.Token
	agent.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			resp, err := next.RoundTrip(r)
			if right := rightOf(r); right != "" && err == nil {
				mu.Lock()
				defer mu.Unlock()
				if resp.StatusCode == http.StatusForbidden {
					denied = append(denied, right)
				} else if !slices.Contains(used, right) {
					used = append(used, right)
				}
			}
			return resp, err
		})
	})
	if err := run(t.Context(), agent); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	return used, denied
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// rightOf is the right that a request takes; empty if it is about no resource.
func rightOf(r *http.Request) string {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	skip := map[string]int{"api": 2, "apis": 3}[parts[0]]
	if skip == 0 || len(parts) <= skip {
		return ""
	}
	if parts = parts[skip:]; parts[0] == "namespaces" && len(parts) > 2 {
		parts = parts[2:]
	}
	verb := map[string]string{http.MethodPost: "create", http.MethodPut: "update", http.MethodPatch: "patch", http.MethodDelete: "delete"}[r.Method]
	switch {
	case verb != "":
	case r.URL.Query().Get("watch") == "true" || r.URL.Query().Get("watch") == "1":
		verb = "watch"
	case len(parts) > 1:
		verb = "get"
	default:
		verb = "list"
	}
	return verb + " " + parts[0]
}

// unusedRights are those of AgentRules that are not among the used ones.
func unusedRights(used []string) (unused []string) {
	for _, rule := range AgentRules() {
		for _, resource := range rule.Resources {
			for _, verb := range rule.Verbs {
				if right := verb + " " + resource; !slices.Contains(used, right) {
					unused = append(unused, right)
				}
			}
		}
	}
	return unused
}

// checkRights has an installation's agents do what they do to begin with, and what they must not.
func checkRights(t *testing.T, c *Cluster, admin *rest.Config, namespace string) {
	used, denied := rightsUsed(t, c, admin, namespace, func(ctx context.Context, agent *rest.Config) error {
		resolver, err := k8s.PodResolver(agent, StoreName, namespace)
		if err != nil {
			return err
		}
		_, _ = resolver.LookupHost(ctx, StoreName+"-0."+StoreName+"."+namespace+".svc") // pods are nowhere: there is no scheduler
		_, err = k8s.NodeInfo(ctx, agent, "node1")
		if err != nil && strings.Contains(err.Error(), "no InternalIP") {
			err = nil // it was read, and there is no kubelet
		}
		return err
	})
	slices.Sort(used)
	if len(denied) != 0 || !slices.Equal(used, []string{"get nodes", "get pods"}) {
		t.Errorf("used %v, denied %v", used, denied)
	}
	if unused := unusedRights(used); slices.Contains(unused, "get nodes") || !slices.Contains(unused, "watch services") {
		t.Errorf("unused %v", unused)
	}
	_, denied = rightsUsed(t, c, admin, namespace, func(ctx context.Context, agent *rest.Config) error {
		other, err := Open(agent)
		if err != nil {
			return err
		}
		_, _ = other.client.CoreV1().Secrets(namespace).Get(ctx, AuthorityName, metav1.GetOptions{})
		_, _ = other.client.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{})
		_ = other.client.CoreV1().Pods(namespace).Delete(ctx, StoreName+"-0", metav1.DeleteOptions{})
		return nil
	})
	if !slices.Equal(denied, []string{"get secrets", "list configmaps", "delete pods"}) {
		t.Errorf("agents are denied only %v", denied)
	}
}
