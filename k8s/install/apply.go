package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// FieldManager owns the fields that are applied (server-side apply).
const FieldManager = "causeway"

// Cluster is a Kubernetes cluster, by its API server.
type Cluster struct {
	host    string
	client  kubernetes.Interface
	dynamic dynamic.Interface
}

// Open makes a client; nothing is connected to.
func Open(cfg *rest.Config) (*Cluster, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.UserAgent = "clustermesh"
	cfg.QPS, cfg.Burst = 50, 100 // some forty requests in a row, once
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	d, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return &Cluster{host: cfg.Host, client: client, dynamic: d}, nil
}

// What became of an object.
const (
	Created    = "created"
	Configured = "configured"
	Unchanged  = "unchanged"
	Deleted    = "deleted"
	Left       = "left"
	Ready      = "ready"
	Waiting    = "waiting"
)

// Step is what became of one object, for people.
type Step struct {
	// Object is its kind and name, "DaemonSet causeway-system/causeway-agent".
	Object string `json:"object"`
	Did    string `json:"did"`
	// Text says more, if there is more to say.
	Text string `json:"text,omitempty"`
}

// entry is an object as the API server is told it.
type entry struct {
	*unstructured.Unstructured
}

// entries turns typed objects into what is sent: without status and times that nobody has set.
func entries(objects []runtime.Object) (out []entry, err error) {
	for _, object := range objects {
		fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
		if err != nil {
			return nil, fmt.Errorf("install: %w", err)
		}
		tidy(fields)
		out = append(out, entry{&unstructured.Unstructured{Object: fields}})
	}
	return out, nil
}

// tidy removes what typed objects write although it is nothing.
func tidy(fields map[string]any) {
	delete(fields, "status")
	for _, path := range [][]string{
		{"metadata", "creationTimestamp"}, {"spec", "template", "metadata", "creationTimestamp"},
	} {
		unstructured.RemoveNestedField(fields, path...)
	}
	claims, _, _ := unstructured.NestedSlice(fields, "spec", "volumeClaimTemplates")
	for _, claim := range claims {
		if claim, ok := claim.(map[string]any); ok {
			delete(claim, "status")
			unstructured.RemoveNestedField(claim, "metadata", "creationTimestamp")
		}
	}
	if claims != nil {
		_ = unstructured.SetNestedSlice(fields, claims, "spec", "volumeClaimTemplates") // it was one
	}
}

func (e entry) String() string {
	if e.GetNamespace() == "" {
		return e.GetKind() + " " + e.GetName()
	}
	return e.GetKind() + " " + e.GetNamespace() + "/" + e.GetName()
}

func (e entry) resource() schema.GroupVersionResource {
	plural, _ := meta.UnsafeGuessKindToResource(e.GroupVersionKind()) // right for all kinds that are installed
	return plural
}

func (c *Cluster) of(e entry) dynamic.ResourceInterface {
	if e.GetNamespace() == "" {
		return c.dynamic.Resource(e.resource())
	}
	return c.dynamic.Resource(e.resource()).Namespace(e.GetNamespace())
}

// apply has the cluster have all objects, and tells what became of each. Conflicts, with who else owns a field, are found before anything is changed; force takes the
// fields over. With dry nothing is changed at all.
func (c *Cluster) apply(ctx context.Context, all []entry, force, dry bool, report func(Step)) error {
	before := make([]*unstructured.Unstructured, len(all))
	var conflicts error
	for i, e := range all {
		has, err := c.of(e).Get(ctx, e.GetName(), metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			continue
		case err != nil:
			return c.explain(e, err)
		case has.GetDeletionTimestamp() != nil:
			return fmt.Errorf("%s is being deleted: try again when it is gone", e)
		}
		before[i] = has
		after, err := c.of(e).Apply(ctx, e.GetName(), e.Unstructured, options(force, true))
		if err != nil {
			conflicts = errors.Join(conflicts, c.explain(e, err))
			continue
		}
		if dry {
			report(Step{Object: e.String(), Did: changed(has, after)})
		}
	}
	if conflicts != nil {
		return conflicts
	}
	for i, e := range all {
		if dry {
			if before[i] == nil {
				report(Step{Object: e.String(), Did: Created})
			}
			continue
		}
		after, err := c.of(e).Apply(ctx, e.GetName(), e.Unstructured, options(force, false))
		if err != nil {
			return c.explain(e, err)
		}
		step := Step{Object: e.String(), Did: Created}
		if before[i] != nil {
			step.Did = changed(before[i], after)
		}
		report(step)
	}
	return nil
}

func options(force, dry bool) metav1.ApplyOptions {
	o := metav1.ApplyOptions{FieldManager: FieldManager, Force: force}
	if dry {
		o.DryRun = []string{metav1.DryRunAll}
	}
	return o
}

// changed compares an object with what became of it, but for what controllers write there meanwhile.
func changed(before, after *unstructured.Unstructured) string {
	strip := func(u *unstructured.Unstructured) string {
		u = u.DeepCopy()
		u.SetManagedFields(nil)
		u.SetResourceVersion("")
		delete(u.Object, "status")
		text, err := json.Marshal(u.Object)
		if err != nil {
			return err.Error()
		}
		return string(text)
	}
	if strip(before) == strip(after) {
		return Unchanged
	}
	return Configured
}

// explain adds to an API server's error which object it is about, and what to do.
func (c *Cluster) explain(e entry, err error) error {
	var status apierrors.APIStatus
	switch {
	case apierrors.IsConflict(err) && errors.As(err, &status) && status.Status().Details != nil:
		var owners []string
		for _, cause := range status.Status().Details.Causes {
			if cause.Type == metav1.CauseTypeFieldManagerConflict {
				owners = append(owners, strings.TrimPrefix(cause.Message, "conflict with ")+" has "+cause.Field)
			}
		}
		if len(owners) > 0 {
			return fmt.Errorf("%s: others have set fields that an installation sets: %s; have them give up the fields, or take them over with --force-conflicts", e, strings.Join(owners, ", "))
		}
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s: %w: it takes a user who may, such as one with the ClusterRole cluster-admin", e, err)
	case apierrors.IsInvalid(err):
		return fmt.Errorf("%s: the API server refuses it: %w", e, err)
	}
	return fmt.Errorf("%s at %s: %w", e, c.host, err)
}
