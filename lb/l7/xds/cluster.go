package xds

import (
	"math"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	random "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/random/v3"
	robin "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/round_robin/v3"
	wrr "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/wrr_locality/v3"
	upstream "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	types "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"causeway/lb"
)

// connectTimeout bounds Envoy's wait for a connection.
const connectTimeout = 2 * time.Second

func clusterOf(r *lb.Route) *cluster.Cluster {
	o := r.Options
	c := &cluster.Cluster{
		Name:                 r.Port.String(),
		ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS},
		EdsClusterConfig:     &cluster.Cluster_EdsClusterConfig{EdsConfig: ads()},
		ConnectTimeout:       durationpb.New(connectTimeout),
		CircuitBreakers:      breakers(o),
		OutlierDetection:     outliers(o),
		HealthChecks:         checks(o.Health),
		CommonLbConfig: &cluster.Cluster_CommonLbConfig{
			// What is quarantined gets nothing, however much of a service is.
			HealthyPanicThreshold: &types.Percent{},
			LocalityConfigSpecifier: &cluster.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{
				LocalityWeightedLbConfig: &cluster.Cluster_CommonLbConfig_LocalityWeightedLbConfig{}},
		},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": packed(protocols(r.App))},
	}
	balance(c, o)
	return c
}

// balance sets the policy. Clients take the first that they know of a list; gRPC's know no random choice.
func balance(c *cluster.Cluster, o lb.L7Options) {
	switch o.Algorithm {
	case lb.LeastRequest:
		c.LbPolicy = cluster.Cluster_LEAST_REQUEST
	case lb.Hashed:
		c.LbPolicy = cluster.Cluster_RING_HASH
	case lb.Random:
		c.CommonLbConfig = nil // it belongs to LbPolicy
		c.LoadBalancingPolicy = policies(
			policy("envoy.load_balancing_policies.random", &random.Random{}),
			policy("envoy.load_balancing_policies.wrr_locality", &wrr.WrrLocality{
				EndpointPickingPolicy: policies(policy("envoy.load_balancing_policies.round_robin", &robin.RoundRobin{})),
			}))
	}
}

func policies(p ...*cluster.LoadBalancingPolicy_Policy) *cluster.LoadBalancingPolicy {
	return &cluster.LoadBalancingPolicy{Policies: p}
}

func policy(name string, config proto.Message) *cluster.LoadBalancingPolicy_Policy {
	return &cluster.LoadBalancingPolicy_Policy{TypedExtensionConfig: &core.TypedExtensionConfig{Name: name, TypedConfig: packed(config)}}
}

// protocols says what Envoy speaks to backends.
func protocols(app lb.AppProtocol) *upstream.HttpProtocolOptions {
	if app == lb.AppHTTP2 {
		return &upstream.HttpProtocolOptions{UpstreamProtocolOptions: &upstream.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &upstream.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &upstream.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{}}}}}
	}
	return &upstream.HttpProtocolOptions{UpstreamProtocolOptions: &upstream.HttpProtocolOptions_UseDownstreamProtocolConfig{
		UseDownstreamProtocolConfig: &upstream.HttpProtocolOptions_UseDownstreamHttpConfig{Http2ProtocolOptions: &core.Http2ProtocolOptions{}}}}
}

func breakers(o lb.L7Options) *cluster.CircuitBreakers {
	return &cluster.CircuitBreakers{
		Thresholds: []*cluster.CircuitBreakers_Thresholds{{
			MaxConnections:     wrapperspb.UInt32(math.MaxInt32),
			MaxPendingRequests: wrapperspb.UInt32(uint32(o.MaxPending)),
			MaxRequests:        wrapperspb.UInt32(math.MaxInt32), // no limit of ours; 1024 without this
			RetryBudget:        &cluster.CircuitBreakers_Thresholds_RetryBudget{BudgetPercent: &types.Percent{Value: float64(o.RetryBudget)}},
		}},
		PerHostThresholds: []*cluster.CircuitBreakers_Thresholds{{MaxConnections: wrapperspb.UInt32(uint32(o.MaxConnections))}},
	}
}

// outliers eject by failures in a row, and by nothing else that clients would do by default.
func outliers(o lb.L7Options) *cluster.OutlierDetection {
	if o.OutlierFailures == 0 || o.MaxEjected == 0 {
		return nil
	}
	failures := wrapperspb.UInt32(uint32(o.OutlierFailures))
	return &cluster.OutlierDetection{
		Consecutive_5Xx: failures, ConsecutiveGatewayFailure: failures,
		EnforcingConsecutiveGatewayFailure: wrapperspb.UInt32(100),
		BaseEjectionTime:                   durationpb.New(o.EjectFor),
		MaxEjectionTime:                    durationpb.New(max(o.EjectFor, 300*time.Second)),
		MaxEjectionPercent:                 wrapperspb.UInt32(uint32(o.MaxEjected)),
		EnforcingSuccessRate:               wrapperspb.UInt32(0),
	}
}

// checks are Envoy's to do; gRPC's clients do none of these.
func checks(h lb.HealthCheck) []*core.HealthCheck {
	check := &core.HealthCheck{
		Interval: durationpb.New(h.Interval), Timeout: durationpb.New(h.Timeout),
		UnhealthyThreshold: wrapperspb.UInt32(2), HealthyThreshold: wrapperspb.UInt32(2),
	}
	switch h.Kind {
	case lb.HealthHTTP:
		check.HealthChecker = &core.HealthCheck_HttpHealthCheck_{HttpHealthCheck: &core.HealthCheck_HttpHealthCheck{
			Path: h.Path, ExpectedStatuses: []*types.Int64Range{{Start: 200, End: 400}}}}
	case lb.HealthGRPC:
		check.HealthChecker = &core.HealthCheck_GrpcHealthCheck_{GrpcHealthCheck: &core.HealthCheck_GrpcHealthCheck{ServiceName: h.Service}}
	case lb.HealthTCP:
		check.HealthChecker = &core.HealthCheck_TcpHealthCheck_{TcpHealthCheck: &core.HealthCheck_TcpHealthCheck{}}
	default:
		return nil
	}
	return []*core.HealthCheck{check}
}
