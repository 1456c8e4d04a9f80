package agent

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"time"

	"causeway/agent/api"
	"causeway/identity"
)

// podSource knows the pods that Kubernetes has for this node.
type podSource interface {
	// PodLabels returns the labels that make a pod's identity. It waits for a pod that it does not know yet, and for one of that UID if the UID is not
	// empty, as long as ctx lasts; its error says then what is missing.
	PodLabels(ctx context.Context, namespace, name, uid string) (identity.Labels, error)
}

// podPatience is how long a request waits for the API server's word on its pod. A CNI plugin asks again.
const podPatience = 5 * time.Second

// relabelPause is the time after which an identity for a pod's new labels is asked for again.
var relabelPause = 5 * time.Second // a variable for tests

// containerID is what the CNI specification allows for CNI_CONTAINERID, within bounds.
var containerID = regexp.MustCompile(`^[A-Za-z0-9][-A-Za-z0-9_.]{0,255}$`)

// checkSandbox refuses what a pod of Kubernetes cannot be asked for with.
func checkSandbox(req api.EndpointRequest) error {
	switch {
	case !containerID.MatchString(req.Sandbox):
		return invalid("sandbox %q: want a container ID, 1 to 256 of letters, digits, \"-\", \"_\" and \".\"", req.Sandbox)
	case len(req.Labels) > 0:
		return invalid("endpoint %s/%s has both labels and a sandbox: the labels of a pod of Kubernetes are known to its API server", req.Namespace, req.Name)
	case req.State != "" && req.State != identity.EndpointReady:
		return invalid("state %q with a sandbox: EndpointSlices say whether a pod of Kubernetes is a backend", req.State)
	}
	return nil
}

// noKubernetes says why there are no pods of Kubernetes.
const noKubernetes = "this node's agent is in no Kubernetes cluster, so nobody knows a pod's labels; set kubernetes.kubeconfig or kubernetes.inCluster in its configuration"

// whyNoSandboxes says why no pod of Kubernetes could be added now; empty if one could.
func (e *endpoints) whyNoSandboxes() string {
	if e.source == nil {
		return noKubernetes
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.pools.next(new(identity.Endpoint)); err != nil {
		return err.Error()
	}
	return ""
}

// unavailable says that what was asked may be possible a little later.
func unavailable(format string, args ...any) error {
	return &failureOf{http.StatusServiceUnavailable, fmt.Errorf(format, args...)}
}

// addSandbox connects a pod of Kubernetes. The same sandbox again gets the same answer; another one takes the place of what had the name before, which is a pod
// that is gone: there is one of a name at a time.
func (e *endpoints) addSandbox(ctx context.Context, ep identity.Endpoint) (identity.Endpoint, error) {
	if e.source == nil {
		return ep, &failureOf{http.StatusNotImplemented, fmt.Errorf("pod %s: %s", ep.ID(), noKubernetes)}
	}
	old, had := e.get(ep.ID())
	switch {
	case had && old.Sandbox == "":
		return ep, conflict("endpoint %s exists already and is no pod of Kubernetes: somebody has added it at this agent, and has to delete it first", ep.ID())
	case had && old.Sandbox == ep.Sandbox:
		return e.addAgain(ctx, old, ep)
	}
	if err := checkNetNS(ep.NetNS); err != nil {
		return ep, err
	}
	labels, err := e.podLabels(ctx, ep)
	if err != nil {
		return ep, err
	}
	if had {
		e.log.Info("pod's sandbox is replaced", "endpoint", ep.ID(), "before", old.Sandbox, "now", ep.Sandbox)
		if err := e.DeleteSandbox(ctx, old.ID(), old.Sandbox); err != nil {
			return ep, fmt.Errorf("removing what was left of %s, sandbox %s: %w", old.ID(), old.Sandbox, err)
		}
	}
	ep.Labels = labels
	if ep, err = e.add(ctx, ep); err != nil {
		return ep, err
	}
	e.catchUp(ctx, ep)
	return ep, nil
}

// catchUp relabels an endpoint whose pod's labels changed before it was there to be relabelled. It looks until nothing has changed since: what changes from then on,
// Relabel is called for.
func (e *endpoints) catchUp(ctx context.Context, ep identity.Endpoint) {
	for said := ep.Labels; ; {
		now, err := e.podLabels(ctx, ep)
		if err != nil || maps.Equal(now, said) {
			return // without an answer the pod is gone, or about to be
		}
		e.Relabel(ep.Namespace, ep.Name, now)
		said = now
	}
}

// podLabels returns the labels of a pod of Kubernetes, within podPatience.
func (e *endpoints) podLabels(ctx context.Context, ep identity.Endpoint) (identity.Labels, error) {
	ctx, cancel := context.WithTimeout(ctx, podPatience)
	defer cancel()
	labels, err := e.source.PodLabels(ctx, ep.Namespace, ep.Name, ep.UID)
	if err != nil {
		return nil, unavailable("labels of pod %s are not known yet: %w", ep.ID(), err)
	}
	labels = withNamespace(labels, ep.Namespace)
	if err := identity.CheckLabels(labels); err != nil {
		return nil, invalid("pod %s: %w", ep.ID(), err)
	}
	return labels, nil
}

func withNamespace(labels identity.Labels, namespace string) identity.Labels {
	all := identity.Labels{identity.NamespaceLabel: namespace}
	maps.Copy(all, labels)
	all[identity.NamespaceLabel] = namespace
	return all
}

// addAgain is the answer to a sandbox that is connected already. Its link is made again if somebody has removed it.
func (e *endpoints) addAgain(ctx context.Context, old, ep identity.Endpoint) (identity.Endpoint, error) {
	if old.NetNS != ep.NetNS || old.Interface != ep.Interface {
		return ep, conflict("sandbox %s of pod %s is connected already, as %s in %s: a pod has one interface of Causeway's", ep.Sandbox, ep.ID(), old.Interface, old.NetNS)
	}
	ep, err := e.connectAgain(old)
	if err != nil {
		return ep, err
	}
	return ep, e.waitReconciled(ctx, ep)
}

func (e *endpoints) connectAgain(old identity.Endpoint) (identity.Endpoint, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ep, ok := e.byID[old.ID()]
	if !ok || ep.Sandbox != old.Sandbox {
		return ep, unavailable("endpoint %s was deleted meanwhile", old.ID())
	}
	link, err := e.links.Create(ep)
	if err != nil {
		return ep, err
	}
	if ep.IfIndex == link.IfIndex && ep.HostMAC == link.HostMAC && ep.MAC == link.MAC {
		return ep, nil
	}
	ep.IfIndex, ep.HostMAC, ep.MAC = link.IfIndex, link.HostMAC, link.MAC
	e.byID[ep.ID()] = ep
	if err := e.save(); err != nil {
		return ep, err
	}
	return ep, e.insert(ep)
}

// DeleteSandbox disconnects a pod of Kubernetes if it is there and of that sandbox; otherwise there is nothing to do.
func (e *endpoints) DeleteSandbox(ctx context.Context, id, sandbox string) error {
	e.mu.Lock()
	ep, ok := e.byID[id]
	if !ok || ep.Sandbox != sandbox {
		e.mu.Unlock()
		return nil
	}
	err := e.disconnect(ep)
	e.mu.Unlock()
	e.release(ctx, ep.Labels)
	return err
}

// relabelling are labels that an endpoint has now and has no identity for yet.
type relabelling struct {
	labels identity.Labels
	err    error
}

// Relabel says which labels a pod of Kubernetes has now. If they are others than before it gets their identity from Run, without any interruption. It does not
// wait, and may be called for all pods at the start. Endpoints that are no pods of Kubernetes are left alone.
func (e *endpoints) Relabel(namespace, name string, labels identity.Labels) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := namespace + "/" + name
	ep, ok := e.byID[id]
	if !ok || ep.Sandbox == "" {
		return
	}
	labels = withNamespace(labels, namespace)
	if maps.Equal(labels, ep.Labels) {
		delete(e.relabelled, id) // they have changed back
		return
	}
	e.relabelled[id] = relabelling{labels: labels}
	wakeUp(e.relabel)
}

// Run gives endpoints whose labels have changed the identity of those, until ctx ends.
func (e *endpoints) Run(ctx context.Context) error {
	for {
		var again <-chan time.Time
		if !e.relabelAll(ctx) {
			again = time.After(relabelPause)
		}
		select {
		case <-e.relabel:
		case <-again:
		case <-ctx.Done():
			return nil
		}
	}
}

// relabelAll tells whether all endpoints have the identity of their labels.
func (e *endpoints) relabelAll(ctx context.Context) bool {
	e.mu.Lock()
	pending := maps.Clone(e.relabelled)
	e.mu.Unlock()
	all := true
	for id, want := range pending {
		number, err := e.allocate(ctx, want.labels)
		if err == nil {
			err = e.switchIdentity(ctx, id, want.labels, number)
		}
		if err != nil && ctx.Err() == nil {
			all = false
			e.relabelFailed(id, want.labels, err)
		}
	}
	return all
}

// switchIdentity gives an endpoint other labels and their identity, of which one use is counted already. That of the former ones is given back, or, if the labels
// have changed again or the endpoint is gone, this one.
func (e *endpoints) switchIdentity(ctx context.Context, id string, labels identity.Labels, number identity.Number) error {
	e.mu.Lock()
	ep, ok := e.byID[id]
	want, wanted := e.relabelled[id]
	if !ok || !wanted || !maps.Equal(want.labels, labels) {
		e.mu.Unlock()
		e.release(ctx, labels)
		return nil
	}
	former := ep.Labels
	delete(e.relabelled, id)
	e.log.Info("pod's labels have changed", "endpoint", id, "labels", labels.String(), "identity", number, "before", ep.Identity)
	ep.Labels, ep.Identity = labels, number
	e.byID[id] = ep
	err := e.insert(ep)
	if failed := e.save(); failed != nil {
		// After a restart the source says again which labels it has.
		e.log.Error("pod's labels have changed, and that will not survive a restart", "endpoint", id, "error", failed)
	}
	e.mu.Unlock()
	e.release(ctx, former)
	return err
}

func (e *endpoints) relabelFailed(id string, labels identity.Labels, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now, ok := e.relabelled[id]
	if !ok || !maps.Equal(now.labels, labels) {
		return
	}
	if now.err == nil {
		e.log.Warn("pod keeps the identity of its former labels for now, will be retried", "endpoint", id, "error", err)
	}
	now.err = err
	e.relabelled[id] = now
}

// labelProblems tells which pods have the identity of labels that they have no more. Needs mu.
func (e *endpoints) labelProblems() (problems []string) {
	for _, id := range slices.Sorted(maps.Keys(e.relabelled)) {
		if failed := e.relabelled[id].err; failed != nil {
			problems = append(problems, fmt.Sprintf("endpoint %s keeps the identity of its former labels for now: %v", id, failed))
		}
	}
	return problems
}
