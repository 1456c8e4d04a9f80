package k8s

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"causeway/identity"
)

func newPod(name, node string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
}

func testPods(t *testing.T, shared *harness) {
	namespace := shared.namespace("pods")
	pods := shared.api.client.CoreV1().Pods(namespace)
	h := newHarness(t, shared.api, shared.api.kubeconfig(t, adminToken))
	told := make(chan string, 100)
	h.OnPodLabels(func(namespace, name string, labels identity.Labels) {
		told <- namespace + "/" + name + " " + labels.String()
	})
	h.run().waitSynced()
	create := func(pod *corev1.Pod) *corev1.Pod {
		t.Helper()
		pod, err := pods.Create(t.Context(), pod, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return pod
	}

	// Who asks first waits.
	type answer struct {
		labels identity.Labels
		err    error
	}
	asked := make(chan answer, 1)
	go func() {
		labels, err := h.PodLabels(t.Context(), namespace, "shop", "")
		asked <- answer{labels, err}
	}()
	create(newPod("elsewhere", "node2", map[string]string{"app": "other"}))
	shop := create(newPod("shop", "node1", map[string]string{"app": "shop", "pod-template-hash": "abc", "statefulset.kubernetes.io/pod-name": "shop"}))
	want := identity.Labels{"app": "shop", identity.NamespaceLabel: namespace}
	select {
	case got := <-asked:
		if got.err != nil || !reflect.DeepEqual(got.labels, want) {
			t.Fatalf("got %v, %v, want %v", got.labels, got.err, want)
		}
	case <-time.After(patience):
		t.Fatal("no answer although the pod is there")
	}
	if got := <-told; got != namespace+"/shop "+want.String() {
		t.Errorf("told of %s", got)
	}

	// A label that is no matter, and one that is.
	shop.Labels["controller-revision-hash"] = "x"
	shop, err := pods.Update(t.Context(), shop, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	shop.Labels["tier"] = "front"
	if shop, err = pods.Update(t.Context(), shop, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	want["tier"] = "front"
	if got := <-told; got != namespace+"/shop "+want.String() {
		t.Errorf("told of %s, want %s", got, want)
	}
	if got, err := h.PodLabels(t.Context(), namespace, "shop", string(shop.UID)); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v", got, err)
	}

	// A pod of another UID, and one of another node, are not it.
	short, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = h.PodLabels(short, namespace, "shop", "another")
	if err == nil || !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "another pod of that name is known") {
		t.Errorf("got %v", err)
	}
	if _, err = h.PodLabels(short, namespace, "elsewhere", ""); err == nil || !strings.Contains(err.Error(), "is not known to be on node node1") {
		t.Errorf("got %v", err)
	}

	// Labels that no identity can have.
	many := map[string]string{}
	for i := range identity.MaxLabels {
		many[fmt.Sprintf("label-%d", i)] = "x"
	}
	create(newPod("many", "node1", many))
	if _, err = h.PodLabels(t.Context(), namespace, "many", ""); err == nil || !strings.Contains(err.Error(), "65 labels, 1 to 64 are allowed") {
		t.Errorf("got %v", err)
	}

	// It is deleted, and another one of the name comes.
	if err := pods.Delete(t.Context(), "shop", metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
		t.Fatal(err)
	}
	again := create(newPod("shop", "node1", map[string]string{"app": "new"}))
	got, err := h.PodLabels(t.Context(), namespace, "shop", string(again.UID))
	if err != nil || got["app"] != "new" {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestPodLabels(t *testing.T) {
	base := map[string]string{"app": "shop", "example.org/tier": "front"}
	for _, key := range []string{
		"pod-template-hash", "controller-revision-hash", "pod-template-generation", "statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index",
		"batch.kubernetes.io/job-completion-index", "batch.kubernetes.io/job-name", "batch.kubernetes.io/controller-uid", "job-name", "controller-uid",
	} {
		pod := newPod("shop", "node1", maps.Clone(base))
		pod.Namespace, pod.Labels[key] = "web", "x"
		want := identity.Labels{"app": "shop", "example.org/tier": "front", identity.NamespaceLabel: "web"}
		if got, err := podLabels(pod); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("with %s: %v, %v", key, got, err)
		}
	}
	pod := newPod("shop", "node1", map[string]string{identity.NamespaceLabel: "kube-system"})
	pod.Namespace = "web"
	if _, err := podLabels(pod); err == nil {
		t.Error("a pod may call another namespace its own")
	}
}

// testRefused has a source that may read nothing.
func testRefused(t *testing.T, api *apiServer) {
	h := newHarness(t, api, api.kubeconfig(t, guestToken)).run()
	deadline := time.After(patience)
	for {
		problems := strings.Join(h.Problems(), "\n")
		if h.Status().Connected && strings.Contains(problems, "services cannot be read") && strings.Contains(problems, "forbidden") {
			break
		}
		select {
		case <-deadline:
			t.Fatalf("%+v, problems: %s", h.Status(), problems)
		case <-time.After(10 * time.Millisecond): // nothing tells of it but asking
		}
	}
	if h.Status().Synced || strings.Contains(h.Status().LastError, guestToken) {
		t.Errorf("%+v", h.Status())
	}
}
