package cni

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"causeway/agent/api"
)

// add connects a pod: the first plugin of a chain makes its interface.
func (p *Plugin) add(ctx context.Context, c *call) error {
	if c.conf.RawPrevResult != nil {
		return badConfig("prevResult is set: %s does not follow another plugin, it makes the pod's interface itself; put it first in the list of plugins", Name)
	}
	pod, err := podOf(c.Args)
	if err != nil {
		return err
	}
	result, err := c.attach(ctx, pod)
	if err != nil {
		return err
	}
	return types.PrintResult(result, c.conf.CNIVersion)
}

// attach has the agent make the pod's interface.
func (c *call) attach(ctx context.Context, pod *pod) (result *types100.Result, err error) {
	req := api.EndpointRequest{
		Namespace: string(pod.K8S_POD_NAMESPACE), Name: string(pod.K8S_POD_NAME), UID: string(pod.K8S_POD_UID),
		Sandbox: c.ContainerID, NetNS: c.Netns, Interface: c.IfName,
	}
	err = c.persist(ctx, func() error {
		ep, err := c.client.AddEndpoint(ctx, req)
		if err == nil {
			result = resultOf(ep, c.conf.DNS)
		}
		return err
	})
	return result, err
}

// resultOf returns a pod as the specification has it: the node's end of its link, then the pod's, and addresses of the latter.
func resultOf(ep *api.Endpoint, dns types.DNS) *types100.Result {
	result := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{
			{Name: ep.HostLink, Mac: ep.HostMAC, Mtu: ep.MTU},
			{Name: ep.Interface, Mac: ep.MAC, Mtu: ep.MTU, Sandbox: ep.NetNS},
		},
		DNS: dns,
	}
	for i, a := range ep.Addresses() {
		var gateway net.IP
		if i < len(ep.Gateways) {
			gateway = ep.Gateways[i].AsSlice()
		}
		everything := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if a.Is6() {
			everything = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		result.IPs = append(result.IPs, &types100.IPConfig{
			Interface: types100.Int(1), Address: prefixNet(netip.PrefixFrom(a, a.BitLen())), Gateway: gateway,
		})
		result.Routes = append(result.Routes, &types.Route{Dst: prefixNet(everything), GW: gateway})
	}
	return result
}

func prefixNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// attachmentOf returns which sandbox an endpoint is of, and which interface in it, as runtimes name it.
func attachmentOf(ep api.Endpoint) types.GCAttachment {
	return types.GCAttachment{ContainerID: ep.Sandbox, IfName: ep.Interface}
}

func (c *call) attachment() types.GCAttachment {
	return types.GCAttachment{ContainerID: c.ContainerID, IfName: c.IfName}
}

// endpoint returns what the agent has of the call's attachment, or an error of the code for one that it does not know.
func (c *call) endpoint(endpoints []api.Endpoint) (*api.Endpoint, error) {
	for _, ep := range endpoints {
		if attachmentOf(ep) == c.attachment() {
			return &ep, nil
		}
	}
	return nil, types.NewError(types.ErrUnknownContainer, fmt.Sprintf("the agent has no pod of sandbox %s with an interface %s", c.ContainerID, c.IfName), "")
}
