package install

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// Wait returns when all pods of an installation are ready and of its newest version, or with an error that says what was waited for when ctx ends.
func (c *Cluster) Wait(ctx context.Context, o Options, report func(Step)) error {
	v := o.values()
	// The store first: no agent gets ready without it.
	for _, object := range []runtime.Object{v.store(), v.agent()} {
		setKind(object)
		all, err := entries([]runtime.Object{object})
		if err != nil {
			return err
		}
		if err := c.waitFor(ctx, all[0], report); err != nil {
			return err
		}
	}
	return nil
}

// waitFor watches one object until its pods are ready.
func (c *Cluster) waitFor(ctx context.Context, e entry, report func(Step)) error {
	said := ""
	err := c.watch(ctx, e, func(object *unstructured.Unstructured) (bool, error) {
		if object == nil {
			return false, fmt.Errorf("%s was deleted while its pods were waited for", e)
		}
		text, done, err := progress(object)
		if err != nil || done {
			report(Step{Object: e.String(), Did: Ready, Text: text})
			return done, err
		}
		if text != said {
			said = text
			report(Step{Object: e.String(), Did: Waiting, Text: text})
		}
		return false, nil
	})
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s: not ready in time (%s): see why with kubectl -n %s describe pods -l %s=%s", e, said, e.GetNamespace(), labelComponent, e.GetLabels()[labelComponent])
	}
	return err
}

// progress tells how many pods of a DaemonSet or StatefulSet are as they should be.
func progress(object *unstructured.Unstructured) (text string, done bool, err error) {
	var want, updated, ready int32
	var seen bool
	switch object.GetKind() {
	case "DaemonSet":
		var d appsv1.DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &d); err != nil {
			return "", false, err
		}
		s := d.Status
		want, updated, ready, seen = s.DesiredNumberScheduled, s.UpdatedNumberScheduled, s.NumberReady, s.ObservedGeneration >= d.Generation
	case "StatefulSet":
		var d appsv1.StatefulSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &d); err != nil {
			return "", false, err
		}
		s := d.Status
		want, updated, ready, seen = *d.Spec.Replicas, s.UpdatedReplicas, s.ReadyReplicas, s.ObservedGeneration >= d.Generation
		if s.UpdateRevision == s.CurrentRevision {
			updated = s.Replicas
		}
	}
	if !seen {
		return "its controller has not seen it yet", false, nil
	}
	return fmt.Sprintf("%d of %d pods updated, %d ready", updated, want, ready), updated >= want && ready >= want, nil
}

// watch calls seen with an object as it is and whenever it changes, nil if there is none, until seen says that it is done or fails, or ctx ends.
func (c *Cluster) watch(ctx context.Context, e entry, seen func(*unstructured.Unstructured) (done bool, err error)) error {
	only := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", e.GetName()).String()}
	for {
		list, err := c.of(e).List(ctx, only)
		if err != nil {
			return c.explain(e, err)
		}
		var object *unstructured.Unstructured
		if len(list.Items) > 0 {
			object = &list.Items[0]
		}
		if done, err := seen(object); done || err != nil {
			return err
		}
		from := only
		from.ResourceVersion = list.GetResourceVersion()
		w, err := c.of(e).Watch(ctx, from)
		if err != nil {
			return c.explain(e, err)
		}
		done, err := follow(w, seen)
		w.Stop()
		if done || err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// follow returns when the watch ends, as they do from time to time, or seen is done.
func follow(w watch.Interface, seen func(*unstructured.Unstructured) (bool, error)) (done bool, err error) {
	for event := range w.ResultChan() {
		object, ok := event.Object.(*unstructured.Unstructured)
		switch {
		case event.Type == watch.Error:
			if err := apierrors.FromObject(event.Object); !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
				return false, err
			}
			return false, nil
		case event.Type == watch.Bookmark || !ok:
			continue
		case event.Type == watch.Deleted:
			object = nil
		}
		if done, err := seen(object); done || err != nil {
			return done, err
		}
	}
	return false, nil
}
