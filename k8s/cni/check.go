package cni

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"causeway/agent/api"
)

// anew says what to do about a pod that is not as it was made: nobody repairs it while it runs.
const anew = "delete the pod to have it made anew"

// check compares what a pod got with what the agent and the kernel have of it. Others of a chain may have added to it.
func (p *Plugin) check(ctx context.Context, c *call) error {
	got, err := c.previous()
	if err != nil {
		return err
	}
	ep, err := c.reconciled(ctx)
	if err != nil {
		return err
	}
	if all := differences(got, ep); len(all) > 0 {
		return types.NewError(types.ErrInternal, fmt.Sprintf("pod %s: %s", ep.ID(), strings.Join(all, "; ")), anew)
	}
	there, err := p.Look(c.Netns, c.IfName)
	if err != nil {
		return types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("pod %s: %v", ep.ID(), err), "")
	}
	if all := faults(there, ep); len(all) > 0 {
		return types.NewError(types.ErrInternal, fmt.Sprintf("pod %s: %s in %s %s", ep.ID(), c.IfName, c.Netns, strings.Join(all, ", ")), anew)
	}
	return nil
}

// previous returns the result of the ADD.
func (c *call) previous() (*types100.Result, error) {
	if c.conf.RawPrevResult == nil {
		return nil, badConfig("prevResult is missing: there is nothing to check")
	}
	if err := version.ParsePrevResult(&c.conf.PluginConf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: %v", err), "")
	}
	got, err := types100.NewResultFromResult(c.conf.PrevResult)
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: %v", err), "")
	}
	return got, nil
}

// reconciled returns what the agent has of the pod, once its kernel has it too.
func (c *call) reconciled(ctx context.Context) (*api.Endpoint, error) {
	for endpoints, err := range c.client.WatchEndpoints(ctx) {
		if err != nil {
			return nil, err
		}
		ep, err := c.endpoint(endpoints)
		if err != nil {
			return nil, err
		}
		switch ep.Status.Kind {
		case "done":
			return ep, nil
		case "error":
			return nil, types.NewError(types.ErrInternal, fmt.Sprintf("pod %s is not connected: %s", ep.ID(), ep.Status.Error), "")
		}
	}
	return nil, context.Cause(ctx)
}

// differences says in what a pod is not any more what the runtime was told.
func differences(got *types100.Result, ep *api.Endpoint) (all []string) {
	want := resultOf(ep, types.DNS{})
	for _, w := range want.Interfaces {
		same := func(i *types100.Interface) bool { return i.Name == w.Name && i.Sandbox == w.Sandbox && i.Mac == w.Mac }
		if !slices.ContainsFunc(got.Interfaces, same) {
			all = append(all, fmt.Sprintf("its interface %s (%s) is not what the runtime was told", w.Name, w.Mac))
		}
	}
	for _, w := range want.IPs {
		same := func(ip *types100.IPConfig) bool { return ip.Address.String() == w.Address.String() }
		if !slices.ContainsFunc(got.IPs, same) {
			all = append(all, fmt.Sprintf("its address %s is not what the runtime was told", w.Address.IP))
		}
	}
	return all
}

// faults says in what the kernel's interface is not as the agent made it. Whoever comes later in a chain may have given it a smaller MTU, more addresses, other routes.
func faults(there Interface, ep *api.Endpoint) (all []string) {
	if !there.Up {
		all = append(all, "is not up")
	}
	if there.MAC != ep.MAC {
		all = append(all, fmt.Sprintf("has the MAC %s, want %s", there.MAC, ep.MAC))
	}
	if there.MTU > ep.MTU {
		all = append(all, fmt.Sprintf("has an MTU of %d bytes, the mesh carries %d", there.MTU, ep.MTU))
	}
	for _, a := range ep.Addresses() {
		if !slices.Contains(there.Addresses, a) {
			all = append(all, "has lost the address "+a.String())
		}
		if !slices.ContainsFunc(there.Gateways, func(g netip.Addr) bool { return g.Is6() == a.Is6() }) {
			all = append(all, "has lost the default route for "+a.String())
		}
	}
	return all
}

// status tells whether a pod could be added now.
func (p *Plugin) status(ctx context.Context, c *call) error {
	state, err := c.client.CNI(ctx)
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, refusal(err).Error(), "")
	}
	if !state.Ready {
		return types.NewError(types.ErrPluginNotAvailable, state.Reason, "")
	}
	return nil
}
