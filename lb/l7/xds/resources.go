package xds

import (
	"fmt"
	"slices"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"causeway/lb"
)

// Set holds resources by type and name.
type Set map[resource.Type]map[string]types.Resource

// kinds are the types that are served, in the order in which new ones are made known: what is referred to comes first.
var kinds = []resource.Type{resource.ClusterType, resource.EndpointType, resource.RouteType, resource.ListenerType}

// Resources returns what clients are told: for each port that is balanced at L7 and not passed on as TCP a route configuration, a cluster and
// its endpoints, named as lb.PortKey writes it, and listeners NAMESPACE/NAME:PORT, by the port's number and by its name. They
// lead to backends of IPv4 where there is a choice.
func Resources(rows Rows) Set {
	set := Set{}
	for _, kind := range kinds {
		set[kind] = map[string]types.Resource{}
	}
	byPort := map[lb.PortKey][]lb.Target{}
	for _, t := range rows.Targets {
		byPort[t.Port] = append(byPort[t.Port], t)
	}
	routes := slices.Clone(rows.Routes)
	slices.SortFunc(routes, func(a, b lb.Route) int { return strings.Compare(a.Port.String(), b.Port.String()) }) // "…/TCP" before "…/TCP/IPv6"
	for i := range routes {
		r := &routes[i]
		if r.App == lb.AppTCP {
			continue
		}
		name := r.Port.String()
		set[resource.ClusterType][name] = clusterOf(r)
		set[resource.EndpointType][name] = endpointsOf(&rows, r, byPort[r.Port])
		set[resource.RouteType][name] = routeOf(r)
		for _, port := range []string{r.Port.Port, fmt.Sprint(r.Number)} {
			address := r.Port.Service.String() + ":" + port
			if set[resource.ListenerType][address] == nil {
				set[resource.ListenerType][address] = listenerOf(address, name)
			}
		}
	}
	return set
}

// ads says that a resource comes over the same stream.
func ads() *core.ConfigSource {
	return &core.ConfigSource{ResourceApiVersion: core.ApiVersion_V3, ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}}
}

func listenerOf(address, routes string) *listener.Listener {
	manager := &hcm.HttpConnectionManager{
		StatPrefix:     "causeway",
		RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{ConfigSource: ads(), RouteConfigName: routes}},
		HttpFilters:    []*hcm.HttpFilter{{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed(&router.Router{})}}},
	}
	return &listener.Listener{Name: address, ApiListener: &listener.ApiListener{ApiListener: packed(manager)}}
}

func routeOf(r *lb.Route) *route.RouteConfiguration {
	o := r.Options
	action := &route.RouteAction{
		ClusterSpecifier: &route.RouteAction_Cluster{Cluster: r.Port.String()},
		Timeout:          durationpb.New(o.Timeout), // 0 is none, to Envoy too
	}
	if o.Timeout > 0 { // gRPC's clients read this one
		action.MaxStreamDuration = &route.RouteAction_MaxStreamDuration{MaxStreamDuration: durationpb.New(o.Timeout)}
	}
	if o.Retries > 0 {
		// What no backend has begun to work on, which is safe to repeat whatever it is.
		action.RetryPolicy = &route.RetryPolicy{RetryOn: "connect-failure,refused-stream,unavailable", NumRetries: wrapperspb.UInt32(uint32(o.Retries))}
		if o.TryTimeout > 0 {
			action.RetryPolicy.PerTryTimeout = durationpb.New(o.TryTimeout)
		}
	}
	if o.HashHeader != "" {
		action.HashPolicy = []*route.RouteAction_HashPolicy{{PolicySpecifier: &route.RouteAction_HashPolicy_Header_{
			Header: &route.RouteAction_HashPolicy_Header{HeaderName: o.HashHeader}}}}
	}
	if o.HashCookie != "" {
		action.HashPolicy = []*route.RouteAction_HashPolicy{{PolicySpecifier: &route.RouteAction_HashPolicy_Cookie_{
			Cookie: &route.RouteAction_HashPolicy_Cookie{Name: o.HashCookie}}}}
	}
	return &route.RouteConfiguration{Name: r.Port.String(), VirtualHosts: []*route.VirtualHost{{
		Name: r.Port.String(), Domains: []string{"*"},
		Routes: []*route.Route{{
			Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{}},
			Action: &route.Route_Route{Route: action},
		}},
	}}}
}

func endpointsOf(rows *Rows, r *lb.Route, targets []lb.Target) *endpoint.ClusterLoadAssignment {
	usable := slices.ContainsFunc(targets, func(t lb.Target) bool { return !t.Quarantined })
	out := &endpoint.ClusterLoadAssignment{ClusterName: r.Port.String()}
	for _, l := range localities(rows, r.Options, targets) {
		group := &endpoint.LocalityLbEndpoints{
			Locality: &core.Locality{Region: "causeway", Zone: l.cluster},
			Priority: uint32(l.priority), LoadBalancingWeight: wrapperspb.UInt32(uint32(l.weight)),
		}
		for _, t := range l.targets {
			e := &endpoint.LbEndpoint{
				HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: &core.Address{Address: &core.Address_SocketAddress{
					SocketAddress: &core.SocketAddress{Address: t.Address.String(), PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(t.Number)}}}}}},
				HealthStatus: core.HealthStatus_HEALTHY,
			}
			if t.Quarantined && usable { // better those than none
				e.HealthStatus = core.HealthStatus_UNHEALTHY
			}
			group.LbEndpoints = append(group.LbEndpoints, e)
		}
		out.Endpoints = append(out.Endpoints, group)
	}
	return out
}

// packed packs a message of ours, which cannot fail.
func packed(m proto.Message) *anypb.Any {
	a, err := anypb.New(m)
	if err != nil {
		panic(fmt.Sprintf("xds: %T does not marshal: %v", m, err))
	}
	return a
}
