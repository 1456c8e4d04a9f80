package install

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

func testOptions() Options {
	o := Options{
		ClusterName: "east", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
		APIServer: "192.0.2.1:6443", StoreToken: "0123456789abcdef",
	}
	o.SetDefaults()
	return o
}

// did are the steps of an object, by its name, and all that was done.
type did []Step

func (d did) all(t *testing.T, want string) {
	t.Helper()
	if len(d) == 0 {
		t.Error("nothing was reported")
	}
	for _, s := range d {
		if s.Did != want {
			t.Errorf("%s: %s, want %s", s.Object, s.Did, want)
		}
	}
}

func (d did) of(what string) string {
	for _, s := range d {
		if s.Object == what {
			return s.Did
		}
	}
	return ""
}

func TestOnARealAPIServer(t *testing.T) {
	cp := startControlPlane(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c, err := Open(cp.admin)
	if err != nil {
		t.Fatal(err)
	}
	o := testOptions()
	install := func(o Options, s Settings) (steps did, err error) {
		t.Helper()
		s.Report = func(s Step) { steps = append(steps, s) }
		err = c.Install(ctx, o, s)
		return steps, err
	}
	must := func(steps did, err error) did {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return steps
	}

	t.Run("what is missing is said before", func(t *testing.T) {
		err := c.CheckCluster(ctx, o)
		for _, want := range []string{"--etcd-members", "--etcd-storage-class"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
		}
		prepareCluster(t, c)
		if err := c.CheckCluster(ctx, o); err != nil {
			t.Error(err)
		}
		user := rest.CopyConfig(cp.admin)
		user.BearerToken = cp.userToken
		nobody, err := Open(user)
		if err != nil {
			t.Fatal(err)
		}
		if err := nobody.CheckCluster(ctx, o); err == nil || !strings.Contains(err.Error(), "we may not") || !strings.Contains(err.Error(), "patch daemonsets") {
			t.Errorf("a user who may nothing: %v", err)
		}
	})
	t.Run("ranges are detected", func(t *testing.T) {
		got := Options{Mode: ModeChained}
		if err := c.Detect(ctx, &got); err != nil || len(got.ServiceCIDRs) != 1 || got.ServiceCIDRs[0] != o.ServiceCIDRs[0] || len(got.PodCIDRs) != 0 {
			t.Errorf("got %v, %v", got, err)
		}
		kubeadm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kubeadm-config", Namespace: "kube-system"}, Data: map[string]string{
			"ClusterConfiguration": "kind: ClusterConfiguration\nnetworking:\n  podSubnet: 10.1.0.0/16,fd00:1::/48\n  serviceSubnet: 10.9.0.0/16\n",
		}}
		if _, err := c.client.CoreV1().ConfigMaps("kube-system").Create(ctx, kubeadm, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		got = Options{Mode: ModeChained}
		if err := c.Detect(ctx, &got); err != nil || len(got.PodCIDRs) != 2 || got.ServiceCIDRs[0] != o.ServiceCIDRs[0] {
			t.Errorf("got %v, %v", got, err)
		}
		if err := c.Detect(ctx, &Options{Mode: ModeCNI}); err == nil || !strings.Contains(err.Error(), "--api-server") {
			t.Errorf("an API server on the loopback: %v", err)
		}
	})
	t.Run("a dry run changes nothing", func(t *testing.T) {
		must(install(o, Settings{DryRun: true})).all(t, Created)
		if _, err := c.Installed(ctx, o.Namespace); !errors.Is(err, ErrNotInstalled) {
			t.Errorf("after a dry run: %v", err)
		}
	})
	t.Run("once, and again", func(t *testing.T) {
		must(install(o, Settings{})).all(t, Created)
		must(install(o, Settings{})).all(t, Unchanged)
		must(install(o, Settings{DryRun: true})).all(t, Unchanged)
		if got, err := c.Installed(ctx, o.Namespace); err != nil || got.values() != o.values() {
			t.Errorf("options are %+v, %v", got, err)
		}
	})
	t.Run("the controllers make pods of it", func(t *testing.T) {
		eventually(t, "the store's three pods", func() bool {
			pods, err := c.client.CoreV1().Pods(o.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labelComponent + "=" + storeComponent})
			return err == nil && len(pods.Items) == 3
		})
		eventually(t, "an agent a node", func() bool {
			pods, err := c.client.CoreV1().Pods(o.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labelComponent + "=" + agentComponent})
			return err == nil && len(pods.Items) == 3
		})
	})
	t.Run("agents may what they do", func(t *testing.T) { checkRights(t, c, cp.admin, o.Namespace) })
	t.Run("an upgrade changes what it must, and keeps the authority", func(t *testing.T) {
		secret := func() string {
			s, err := c.client.CoreV1().Secrets(o.Namespace).Get(ctx, AuthorityName, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			return string(s.Data[authorityKey])
		}
		before := secret()
		o.Image = "causeway/clustermesh:next"
		steps := must(install(o, Settings{}))
		for what, want := range map[string]string{
			"DaemonSet causeway-system/causeway-agent": Configured, "StatefulSet causeway-system/causeway-etcd": Configured,
			"ConfigMap causeway-system/causeway-agent": Unchanged, "ClusterRole causeway-agent": Unchanged,
		} {
			if got := steps.of(what); got != want {
				t.Errorf("%s: %s, want %s", what, got, want)
			}
		}
		if before != secret() {
			t.Error("the authority was replaced")
		}
		other := o
		other.ClusterName, other.StorageSize = "north", "3Gi"
		if _, err := install(other, Settings{}); err == nil || !strings.Contains(err.Error(), "--cluster-name") {
			t.Errorf("another name: %v", err)
		}
	})
	t.Run("fields of others are not taken by the way", func(t *testing.T) {
		patch, _ := json.Marshal(map[string]any{"rules": []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}}}})
		if _, err := c.client.RbacV1().ClusterRoles().Patch(ctx, AgentName, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "somebody"}); err != nil {
			t.Fatal(err)
		}
		o := o
		o.Image = "causeway/clustermesh:later"
		steps, err := install(o, Settings{})
		if err == nil || !strings.Contains(err.Error(), `"somebody"`) || !strings.Contains(err.Error(), "--force-conflicts") || len(steps) != 0 {
			t.Errorf("conflict: %v after %v", err, steps)
		}
		if got := must(install(o, Settings{ForceConflicts: true})).of("ClusterRole causeway-agent"); got != Configured {
			t.Errorf("forced: %s", got)
		}
	})
	t.Run("uninstalled, and installed again as the same cluster", func(t *testing.T) {
		var steps did
		report := func(s Step) { steps = append(steps, s) }
		if err := c.Uninstall(ctx, o.Namespace, false, report); err != nil {
			t.Fatal(err)
		}
		for what, want := range map[string]string{
			"DaemonSet causeway-system/causeway-agent": Deleted, "ClusterRole causeway-agent": Deleted, "Service causeway-system/causeway-etcd": Deleted,
			"Secret causeway-system/causeway-authority": Left, "PersistentVolumeClaim causeway-system/data-causeway-etcd-0": Left, "Namespace causeway-system": Left,
		} {
			if got := steps.of(what); got != want {
				t.Errorf("%s: %s, want %s", what, got, want)
			}
		}
		again := must(install(o, Settings{}))
		if again.of("Secret causeway-system/causeway-authority") != Unchanged || again.of("DaemonSet causeway-system/causeway-agent") != Created {
			t.Errorf("again: %v", again)
		}
	})
	t.Run("purged, nothing is left", func(t *testing.T) {
		if err := c.Uninstall(ctx, o.Namespace, true, func(Step) {}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.client.CoreV1().Namespaces().Get(ctx, o.Namespace, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("the namespace: %v", err)
		}
		ours := metav1.ListOptions{LabelSelector: labelPartOf + "=causeway"}
		roles, err := c.client.RbacV1().ClusterRoles().List(ctx, ours)
		if err != nil || len(roles.Items) != 0 {
			t.Errorf("roles: %v, %v", roles, err)
		}
		bindings, err := c.client.RbacV1().ClusterRoleBindings().List(ctx, ours)
		if err != nil || len(bindings.Items) != 0 {
			t.Errorf("bindings: %v, %v", bindings, err)
		}
		if err := c.Uninstall(ctx, o.Namespace, true, func(Step) {}); !errors.Is(err, ErrNotInstalled) {
			t.Errorf("again: %v", err)
		}
	})
}

// prepareCluster makes three nodes and a default StorageClass, as a cluster has them.
func prepareCluster(t *testing.T, c *Cluster) {
	t.Helper()
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "local", Annotations: map[string]string{defaultClass: "true"}}, Provisioner: "example.com/none"}
	if _, err := c.client.StorageV1().StorageClasses().Create(t.Context(), class, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"node1", "node2", "node3"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelOSStable: "linux"}}}
		if _, err := c.client.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOptionsSayWhatIsWrong(t *testing.T) {
	for want, change := range map[string]func(*Options){
		"--pod-cidr":             func(o *Options) { o.PodCIDRs = nil },
		"--service-cidr":         func(o *Options) { o.ServiceCIDRs = nil },
		"--cluster-name":         func(o *Options) { o.ClusterName = "East 1" },
		"--namespace":            func(o *Options) { o.Namespace = "a b" },
		"--image":                func(o *Options) { o.Image = "a b" },
		"--mode":                 func(o *Options) { o.Mode = "other" },
		"--encryption":           func(o *Options) { o.Encryption = "some" },
		"--api-server":           func(o *Options) { o.APIServer = "https://192.0.2.1:6443" },
		"--etcd-members 2":       func(o *Options) { o.Members = 2 },
		"--etcd-storage-size":    func(o *Options) { o.StorageSize = "much" },
		"--etcd-storage-class":   func(o *Options) { o.StorageClass = "Fast One" },
		"the store's token":      func(o *Options) { o.StoreToken = "$(x)" },
		"overlap":                func(o *Options) { o.ServiceCIDRs = o.PodCIDRs },
		"--etcd-members 0: want": func(o *Options) { o.Members = 0 },
	} {
		o := testOptions()
		change(&o)
		if err := o.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	o := testOptions()
	if err := o.Check(); err != nil {
		t.Error(err)
	}
}

func TestAPIServer(t *testing.T) {
	for host, want := range map[string]string{
		"https://192.0.2.1:6443": "192.0.2.1:6443", "https://api.east": "api.east:443", "https://[2001:db8::1]:6443": "[2001:db8::1]:6443",
		"https://127.0.0.1:6443": "", "https://localhost:6443": "", "": "", "https://[::1]": "",
	} {
		got, err := apiServer(host)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v, want %q", host, got, err, want)
		}
	}
}

// TestRulesAreTheLeast holds what an agent must never get: an extension of its rights has to be thought about here.
func TestRulesAreTheLeast(t *testing.T) {
	for _, rule := range AgentRules() {
		for _, never := range []string{"*", "secrets", "leases", "configmaps", "pods/exec", "serviceaccounts"} {
			if slices.Contains(slices.Concat(rule.APIGroups, rule.Resources, rule.Verbs), never) {
				t.Errorf("agents may %v %v", rule.Verbs, rule.Resources)
			}
		}
	}
}
