package k8s

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"causeway/lb"
)

// labelServiceProxyName names a Service that a proxy of its own serves (https://kubernetes.io/docs/reference/labels-annotations-taints/#servicekubernetesioservice-proxy-name).
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// Reasons of the Events that a Service may get.
const (
	// ReasonInvalidAnnotation: an annotation is refused, and with it all of the Service's that are ours.
	ReasonInvalidAnnotation = "InvalidAnnotation"
	// ReasonNotGlobal: the Service is as it should be in its own cluster, but cannot be told to others.
	ReasonNotGlobal = "NotGlobal"
	// ReasonUnsupported: a part of the Service has no effect.
	ReasonUnsupported = "Unsupported"
	// ReasonNoHealthyBackend: no cluster has a backend for the global Service; ReasonHealthyBackend: one has again.
	ReasonNoHealthyBackend = "NoHealthyBackend"
	ReasonHealthyBackend   = "HealthyBackend"
	// ReasonConflict: what clusters declare of the global Service contradicts each other.
	ReasonConflict = "ConflictBetweenClusters"
)

// remark is what of a Service could not be honoured.
type remark struct {
	reason, message string
}

// refused tells whether the author has to change something; else it is Causeway that cannot do it.
func (r remark) refused() bool { return r.reason != ReasonUnsupported }

// serviceRow turns a Service, as the API server has it, into a row of the services table without its cluster. ok is false for one that is not
// Causeway's to serve: ExternalName, which is a matter of DNS, and one that another proxy serves.
//
// Causeway's annotations count together or not at all. If one is refused, the Service goes on as it was before, former (nil if it is new, which then is
// neither global nor balanced at L7); what it is in Kubernetes' own terms always follows its spec. A row has no selector: EndpointSlices say which
// its backends are.
func serviceRow(s *corev1.Service, former *lb.Service) (row lb.Service, remarks []remark, ok bool) {
	if s.Spec.Type == corev1.ServiceTypeExternalName || s.Labels[labelServiceProxyName] != "" {
		return lb.Service{}, nil, false
	}
	row = lb.Service{
		Name:          lb.Name{Namespace: s.Namespace, Name: s.Name},
		Affinity:      lb.AffinityNone,
		Headless:      s.Spec.ClusterIP == corev1.ClusterIPNone,
		InternalLocal: s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		ExternalLocal: s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal,

		HealthCheckNodePort: uint16(s.Spec.HealthCheckNodePort),
		SessionAffinity:     sessionAffinity(&s.Spec),
	}
	unsupported := func(format string, args ...any) {
		remarks = append(remarks, remark{ReasonUnsupported, fmt.Sprintf(format, args...)})
	}
	for _, p := range s.Spec.Ports {
		port, supported := rowPort(p)
		if !supported {
			unsupported("port %d/%s has no effect: only TCP and UDP are balanced", p.Port, p.Protocol)
			continue
		}
		row.Ports = append(row.Ports, port)
	}
	if !row.Headless {
		row.ClusterIPs = parseAddresses(s.Spec.ClusterIPs, "clusterIPs", unsupported)
		row.ExternalIPs = externalIPs(s, unsupported)
	}
	remarks = append(remarks, annotate(&row, s.Annotations, former)...)
	return row, remarks, true
}

func sessionAffinity(spec *corev1.ServiceSpec) uint32 {
	if spec.SessionAffinity != corev1.ServiceAffinityClientIP {
		return 0
	}
	if c := spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		return uint32(*c.ClientIP.TimeoutSeconds)
	}
	return uint32(corev1.DefaultClientIPServiceAffinitySeconds)
}

func rowPort(p corev1.ServicePort) (lb.ServicePort, bool) {
	protocol, err := convertProtocol(p.Protocol)
	if err != nil {
		return lb.ServicePort{}, false
	}
	port := lb.ServicePort{Name: p.Name, Protocol: protocol, Port: uint16(p.Port), NodePort: uint16(p.NodePort)}
	if p.AppProtocol != nil {
		port.AppProtocol = *p.AppProtocol
	}
	switch {
	case p.TargetPort.Type == intstr.String: // slices have its number
	case p.TargetPort.IntVal != 0:
		port.TargetPort = uint16(p.TargetPort.IntVal)
	default: // a headless Service's may be missing
		port.TargetPort = port.Port
	}
	return port, true
}

// externalIPs are those that a load balancer leads to the nodes unchanged, and spec.externalIPs.
func externalIPs(s *corev1.Service, unsupported func(string, ...any)) []netip.Addr {
	addresses := parseAddresses(s.Spec.ExternalIPs, "externalIPs", unsupported)
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return addresses
	}
	var texts []string
	for _, ingress := range s.Status.LoadBalancer.Ingress {
		if ingress.IP != "" && (ingress.IPMode == nil || *ingress.IPMode == corev1.LoadBalancerIPModeVIP) {
			texts = append(texts, ingress.IP)
		}
	}
	if len(texts) > 0 && len(s.Spec.LoadBalancerSourceRanges) > 0 {
		// Everybody would be let in where some are meant.
		unsupported("the load balancer's addresses %s are not served: spec.loadBalancerSourceRanges cannot be enforced; remove it, or have the load balancer enforce it and lead to node ports",
			strings.Join(texts, ", "))
		return addresses
	}
	for _, a := range parseAddresses(texts, "loadBalancer.ingress", unsupported) {
		if !slices.Contains(addresses, a) {
			addresses = append(addresses, a)
		}
	}
	return addresses
}

// parseAddresses reads the addresses of a field, less those that cannot be a service's.
func parseAddresses(texts []string, field string, unsupported func(string, ...any)) (addresses []netip.Addr) {
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err == nil {
			a = a.Unmap()
			err = lb.CheckAddress(a)
		}
		switch {
		case err != nil:
			unsupported("%s %.80q is not served: %v", field, text, err)
		case !slices.Contains(addresses, a):
			addresses = append(addresses, a)
		}
	}
	return addresses
}

// annotate adds what a Service's annotations say, or what they said before if they are refused.
func annotate(row *lb.Service, annotations map[string]string, former *lb.Service) (remarks []remark) {
	ours := ourAnnotations(annotations)
	switch options, err := lb.ParseAnnotations(ours); {
	case err == nil:
		row.Global, row.Shared, row.Affinity, row.Annotations = options.Global, options.Shared, options.Affinity, ours
	case former == nil:
		remarks = append(remarks, remark{ReasonInvalidAnnotation, fmt.Sprintf("%v; until that is changed, none of the Service's annotations counts", err)})
	default:
		row.Global, row.Shared, row.Affinity, row.Annotations = former.Global, former.Shared, former.Affinity, former.Annotations
		remarks = append(remarks, remark{ReasonInvalidAnnotation, fmt.Sprintf("%v; until that is changed, the Service's former annotations count", err)})
	}
	if !row.Global {
		return remarks
	}
	stored := *row
	stored.Cluster, stored.ClusterID = strings.Repeat("c", 63), 255
	if err := lb.CheckService(stored); err != nil {
		row.Global, row.Shared = false, false
		remarks = append(remarks, remark{ReasonNotGlobal, fmt.Sprintf("the Service is not global: %v", err)})
	}
	return remarks
}

// ourAnnotations are those that mean something to Causeway, or are meant to.
func ourAnnotations(annotations map[string]string) map[string]string {
	var ours map[string]string
	for key, value := range annotations {
		if strings.HasPrefix(key, "service.cilium.io/") || strings.HasPrefix(key, "io.cilium/") || strings.HasPrefix(key, "causeway.io/") {
			if ours == nil {
				ours = map[string]string{}
			}
			ours[key] = value
		}
	}
	return ours
}
