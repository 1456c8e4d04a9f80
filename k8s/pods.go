package k8s

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"causeway/identity"
)

// passing are labels that differ between pods of one workload, or change with each of its revisions: an identity is of the workload. What they are is
// in https://kubernetes.io/docs/reference/labels-annotations-taints/.
var passing = map[string]bool{
	"pod-template-hash":                        true,
	"controller-revision-hash":                 true,
	"pod-template-generation":                  true,
	"statefulset.kubernetes.io/pod-name":       true,
	"apps.kubernetes.io/pod-index":             true,
	"batch.kubernetes.io/job-completion-index": true,
	"batch.kubernetes.io/job-name":             true,
	"batch.kubernetes.io/controller-uid":       true,
	"job-name":                                 true,
	"controller-uid":                           true,
}

// podLabels returns the labels that a pod's identity is of. The error is a sentence for the pod's author.
func podLabels(pod *corev1.Pod) (identity.Labels, error) {
	labels := identity.Labels{identity.NamespaceLabel: pod.Namespace}
	for key, value := range pod.Labels {
		if key == identity.NamespaceLabel && value != pod.Namespace {
			return nil, fmt.Errorf("label %s is %q, but the pod's namespace is %s; remove the label", key, value, pod.Namespace)
		}
		if !passing[key] {
			labels[key] = value
		}
	}
	return labels, identity.CheckLabels(labels)
}

// pods are those of this node. Needs Source.mu.
type pods struct {
	*Source
	known map[types.NamespacedName]knownPod
	// changed is closed when a pod is seen, or seen with other labels.
	changed chan struct{}
	told    func(namespace, name string, labels identity.Labels)
}

type knownPod struct {
	uid    types.UID
	labels identity.Labels
	err    error // why there are no labels
}

func newPods(s *Source) *pods {
	return &pods{Source: s, known: map[types.NamespacedName]knownPod{}, changed: make(chan struct{})}
}

// OnPodLabels has f called for each pod of this node when it is seen first, and when its labels have become others. To be called before Run; f must not block.
func (s *Source) OnPodLabels(f func(namespace, name string, labels identity.Labels)) { s.pods.told = f }

// PodLabels returns the labels that the identity of a pod of this node is of: the pod's, less those that differ between pods of one workload, and its
// namespace. It waits until the pod is known, with the given UID unless that is "", for as long as ctx allows. It refuses labels that cannot be an
// identity's, see identity.CheckLabels.
func (s *Source) PodLabels(ctx context.Context, namespace, name, uid string) (identity.Labels, error) {
	key := types.NamespacedName{Namespace: namespace, Name: name}
	for {
		s.mu.Lock()
		pod, ok := s.pods.known[key]
		changed := s.pods.changed
		s.mu.Unlock()
		switch {
		case ok && uid != "" && string(pod.uid) != uid: // an earlier one of this name, or a later one
		case ok && pod.err != nil:
			return nil, fmt.Errorf("pod %s: %w", key, pod.err)
		case ok:
			return maps.Clone(pod.labels), nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, s.unknownPod(key, uid, ok, ctx.Err())
		}
	}
}

// unknownPod says why a pod's labels are not known.
func (s *Source) unknownPod(key types.NamespacedName, uid string, other bool, err error) error {
	var why []string
	if uid != "" {
		why = append(why, "UID "+uid)
	}
	if other {
		why = append(why, "another pod of that name is known")
	}
	if status := s.Status(); !status.Connected {
		why = append(why, "the API server does not answer: "+status.LastError)
	}
	text := ""
	if len(why) > 0 {
		text = " (" + strings.Join(why, "; ") + ")"
	}
	return fmt.Errorf("pod %s%s is not known to be on node %s: %w", key, text, s.cfg.Node, err)
}

func (p *pods) all(_ statedb.WriteTxn, objects []*corev1.Pod) error {
	gone := maps.Clone(p.known)
	for _, object := range objects {
		delete(gone, types.NamespacedName{Namespace: object.Namespace, Name: object.Name})
		if err := p.put(nil, object); err != nil {
			return err
		}
	}
	for key := range gone {
		delete(p.known, key)
	}
	return nil
}

func (p *pods) put(_ statedb.WriteTxn, object *corev1.Pod) error {
	key := types.NamespacedName{Namespace: object.Namespace, Name: object.Name}
	labels, err := podLabels(object)
	old, had := p.known[key]
	if had && old.uid == object.UID && old.err == nil && err == nil && maps.Equal(old.labels, labels) {
		return nil
	}
	p.known[key] = knownPod{uid: object.UID, labels: labels, err: err}
	close(p.changed)
	p.changed = make(chan struct{})
	switch {
	case err != nil:
		p.cfg.Log.Warn("a pod's labels cannot be an identity's", "pod", key, "reason", err)
	case p.told != nil:
		p.told(key.Namespace, key.Name, maps.Clone(labels))
	}
	return nil
}

func (p *pods) drop(_ statedb.WriteTxn, object *corev1.Pod) error {
	delete(p.known, types.NamespacedName{Namespace: object.Namespace, Name: object.Name})
	return nil
}
