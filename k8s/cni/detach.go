package cni

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/pkg/types"

	"causeway/agent/api"
)

// del disconnects a pod. What is gone already was deleted well.
//
// A node without an agent must be able to end pods, or it could not be given a new agent when it is full. So the plugin removes the interface
// itself then: the link is all that outlives an agent, and one that starts forgets the endpoints whose links are gone.
func (p *Plugin) del(ctx context.Context, c *call) error {
	ours := func(a types.GCAttachment) bool { return a == c.attachment() }
	err := removeEndpoints(ctx, c, ours)
	if !errors.Is(err, api.ErrNoAgent) {
		return err
	}
	if c.Netns != "" {
		if err := p.Remove(c.Netns, c.IfName); err != nil {
			return types.NewError(types.ErrTryAgainLater, "there is no agent, and the pod's interface cannot be removed without one: "+err.Error(), "")
		}
	}
	// An agent that has started meanwhile may have seen the link. One that starts from now on will not: it opens its socket before it looks.
	if err = removeEndpoints(ctx, c, ours); errors.Is(err, api.ErrNoAgent) {
		c.log.Info("there is no agent: the pod's interface is removed, and the next agent forgets the pod", "netns", c.Netns)
		return nil
	}
	return err
}

// gc disconnects the pods of all sandboxes that the runtime does not have any more.
func (p *Plugin) gc(ctx context.Context, c *call) error {
	valid := map[types.GCAttachment]bool{}
	for _, a := range c.conf.ValidAttachments {
		valid[a] = true
	}
	return removeEndpoints(ctx, c, func(a types.GCAttachment) bool { return !valid[a] })
}

// removeEndpoints has the agent remove those of its pods that came from a runtime and are gone.
func removeEndpoints(ctx context.Context, c *call, gone func(types.GCAttachment) bool) error {
	endpoints, err := c.client.Endpoints(ctx)
	if err != nil {
		return err
	}
	var failed error
	for _, ep := range endpoints {
		if ep.Sandbox == "" || !gone(attachmentOf(ep)) {
			continue
		}
		c.log.Info("pod is disconnected", "pod", ep.ID(), "sandbox", ep.Sandbox)
		failed = errors.Join(failed, c.client.DeleteSandbox(ctx, ep.Namespace, ep.Name, ep.Sandbox))
	}
	return failed
}
