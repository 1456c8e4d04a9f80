package install

import (
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
)

// Uninstall deletes an installation, in the reverse of the order in which it was made, and waits until each object is gone. The store's volumes, the authority, the options and the namespace
// are left, so that a later install is the same cluster for its peers; with purge they go too. It tells what became of each object.
func (c *Cluster) Uninstall(ctx context.Context, namespace string, purge bool, report func(Step)) error {
	o, err := c.Installed(ctx, namespace)
	if err != nil {
		return err
	}
	objects, err := Objects(*o)
	if err != nil {
		return err
	}
	all, err := entries(objects)
	if err != nil {
		return err
	}
	keep, remove := all[:2], all[2:]
	slices.Reverse(remove)
	for _, e := range remove {
		if err := c.delete(ctx, e, report); err != nil {
			return err
		}
	}
	kept, err := c.kept(ctx, o.values())
	if err != nil {
		return err
	}
	slices.Reverse(keep) // the namespace last
	for _, e := range slices.Concat(kept, keep) {
		if !purge {
			report(Step{Object: e.String(), Did: Left, Text: "--purge deletes it"})
			continue
		}
		if err := c.delete(ctx, e, report); err != nil {
			return err
		}
	}
	return nil
}

// kept are the objects that outlive an installation, but for the options and the namespace.
func (c *Cluster) kept(ctx context.Context, v values) (out []entry, err error) {
	claims, err := c.client.CoreV1().PersistentVolumeClaims(v.namespace).List(ctx, metav1.ListOptions{LabelSelector: labelComponent + "=" + storeComponent})
	if err != nil {
		return nil, err
	}
	var objects []runtime.Object
	for i := range claims.Items {
		objects = append(objects, &claims.Items[i])
	}
	objects = append(objects, &corev1.Secret{ObjectMeta: v.meta(AuthorityName, "")})
	for _, object := range objects {
		setKind(object)
	}
	return entries(objects)
}

// delete deletes an object with what belongs to it, and returns when it is gone.
func (c *Cluster) delete(ctx context.Context, e entry, report func(Step)) error {
	how := metav1.DeletePropagationBackground
	if kind := e.GetKind(); kind == "DaemonSet" || kind == "StatefulSet" {
		how = metav1.DeletePropagationForeground // it goes when its pods have gone
	}
	err := c.of(e).Delete(ctx, e.GetName(), metav1.DeleteOptions{PropagationPolicy: &how})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return c.explain(e, err)
	}
	if err := c.watch(ctx, e, func(object *unstructured.Unstructured) (bool, error) { return object == nil, nil }); err != nil {
		return err
	}
	report(Step{Object: e.String(), Did: Deleted})
	return nil
}

// setKind writes into an object what kind it is, as only a scheme knows it.
func setKind(object runtime.Object) {
	kinds, _, err := scheme.Scheme.ObjectKinds(object)
	if err != nil {
		panic(err) // a type that is not among Kubernetes' own
	}
	object.GetObjectKind().SetGroupVersionKind(kinds[0])
}
