package k8s

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"causeway/lb"
)

// defaultNamespace is where an object without a namespace goes, as with kubectl.
const defaultNamespace = "default"

// convert turns a Service into ours, or tells which field it cannot honour.
func convert(s *corev1.Service) (Declaration, error) {
	if err := checkSupported(&s.Spec); err != nil {
		return Declaration{}, err
	}
	name, err := serviceName(s)
	if err != nil {
		return Declaration{}, err
	}
	options, err := lb.ParseAnnotations(s.Annotations)
	if err != nil {
		return Declaration{}, err
	}
	if err := checkSelector(s.Spec.Selector); err != nil {
		return Declaration{}, err
	}
	ports, err := convertPorts(s.Spec.Ports)
	if err != nil {
		return Declaration{}, err
	}
	ips, err := clusterIPs(&s.Spec)
	if err != nil {
		return Declaration{}, err
	}
	families, err := convertFamilies(&s.Spec, ips)
	if err != nil {
		return Declaration{}, err
	}
	service := lb.Service{
		Name:        name,
		Global:      options.Global,
		Shared:      options.Shared,
		Affinity:    options.Affinity,
		ClusterIPs:  ips,
		Ports:       ports,
		Selector:    s.Spec.Selector,
		Annotations: s.Annotations,
	}
	return Declaration{Service: service, Families: families}, checkStorable(service)
}

// checkStorable refuses what is too large to be stored in any cluster.
func checkStorable(s lb.Service) error {
	s.Cluster, s.ClusterID = strings.Repeat("c", 63), 255
	if len(s.ClusterIPs) < 2 { // more may be allocated
		s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{100, 127, 255, 255}), longAddress}
	}
	return lb.CheckService(s)
}

// longAddress takes as many bytes to write as any.
var longAddress = netip.MustParseAddr("fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")

func serviceName(s *corev1.Service) (lb.Name, error) {
	if s.Name == "" && s.GenerateName != "" {
		return lb.Name{}, errors.New("metadata.generateName is not supported: give it a metadata.name")
	}
	if problems := validation.IsDNS1035Label(s.Name); len(problems) > 0 {
		return lb.Name{}, fmt.Errorf("metadata.name %.80q: %s", s.Name, strings.Join(problems, ", "))
	}
	namespace := s.Namespace
	if namespace == "" {
		namespace = defaultNamespace
	}
	if problems := validation.IsDNS1123Label(namespace); len(problems) > 0 {
		return lb.Name{}, fmt.Errorf("metadata.namespace %.80q: %s", namespace, strings.Join(problems, ", "))
	}
	return lb.Name{Namespace: namespace, Name: s.Name}, nil
}

// checkSupported refuses fields that would have no effect. Fields that only say what is
// the case anyway, as the API server fills them in, pass.
func checkSupported(spec *corev1.ServiceSpec) error {
	if err := checkType(spec); err != nil {
		return err
	}
	if a := spec.SessionAffinity; a != "" && a != corev1.ServiceAffinityNone {
		return fmt.Errorf("spec.sessionAffinity %.80q is not available in this version, only None is", a)
	}
	if p := spec.InternalTrafficPolicy; p != nil && *p != corev1.ServiceInternalTrafficPolicyCluster {
		return fmt.Errorf("spec.internalTrafficPolicy %.80q is not available in this version, only Cluster is", *p)
	}
	if spec.PublishNotReadyAddresses {
		return errors.New("spec.publishNotReadyAddresses is not available in this version: only ready endpoints are backends")
	}
	if d := spec.TrafficDistribution; d != nil {
		return fmt.Errorf("spec.trafficDistribution %.80q is not available in this version; annotation %s chooses between clusters", *d, lb.AnnotationAffinity)
	}
	return nil
}

func checkType(spec *corev1.ServiceSpec) error {
	switch spec.Type {
	case "", corev1.ServiceTypeClusterIP:
	case corev1.ServiceTypeExternalName:
		return errors.New("spec.type ExternalName is a DNS alias without backends, which Causeway does not serve")
	case corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer:
		return fmt.Errorf("spec.type %s is not available in this version, only ClusterIP is", spec.Type)
	default:
		return fmt.Errorf("spec.type %.80q is not known, only ClusterIP is available", spec.Type)
	}
	for _, field := range []struct {
		name string
		set  bool
	}{
		{"externalName", spec.ExternalName != ""},
		{"externalIPs", len(spec.ExternalIPs) > 0},
		{"externalTrafficPolicy", spec.ExternalTrafficPolicy != ""},
		{"loadBalancerIP", spec.LoadBalancerIP != ""},
		{"loadBalancerClass", spec.LoadBalancerClass != nil},
		{"loadBalancerSourceRanges", len(spec.LoadBalancerSourceRanges) > 0},
		{"allocateLoadBalancerNodePorts", spec.AllocateLoadBalancerNodePorts != nil},
		{"healthCheckNodePort", spec.HealthCheckNodePort != 0},
	} {
		if field.set {
			return fmt.Errorf("spec.%s has no effect on a Service of type ClusterIP: remove it", field.name)
		}
	}
	return nil
}

func checkSelector(selector map[string]string) error {
	if len(selector) == 0 {
		return errors.New("spec.selector is missing: backends are the endpoints that it selects, EndpointSlices written by hand are not read in this version")
	}
	if len(selector) > lb.MaxSelector {
		return fmt.Errorf("spec.selector has %d labels, at most %d are allowed", len(selector), lb.MaxSelector)
	}
	for key, value := range selector {
		problems := append(validation.IsQualifiedName(key), validation.IsValidLabelValue(value)...)
		if len(problems) > 0 {
			return fmt.Errorf("spec.selector %.80q: %.80q: %s", key, value, strings.Join(problems, ", "))
		}
	}
	return nil
}

func convertPorts(ports []corev1.ServicePort) ([]lb.ServicePort, error) {
	if len(ports) == 0 {
		return nil, errors.New("spec.ports is missing")
	}
	converted := make([]lb.ServicePort, len(ports))
	for i, p := range ports {
		port, err := convertPort(p)
		if err != nil {
			return nil, fmt.Errorf("spec.ports[%d]: %w", i, err)
		}
		converted[i] = port
	}
	if err := lb.CheckPorts(converted); err != nil {
		return nil, fmt.Errorf("spec.ports: %w", err)
	}
	return converted, nil
}

func convertPort(p corev1.ServicePort) (lb.ServicePort, error) {
	protocol, err := convertProtocol(p.Protocol)
	if err != nil {
		return lb.ServicePort{}, err
	}
	port, err := portNumber("port", p.Port)
	if err != nil {
		return lb.ServicePort{}, err
	}
	if p.NodePort != 0 {
		return lb.ServicePort{}, errors.New("nodePort has no effect on a Service of type ClusterIP: remove it")
	}
	target := port
	switch zero := (intstr.IntOrString{}); {
	case p.TargetPort == zero: // the same as port
	case p.TargetPort.Type == intstr.String:
		return lb.ServicePort{}, fmt.Errorf("targetPort %.80q is a name: write the number, there are no containers to look it up in", p.TargetPort.StrVal)
	default:
		if target, err = portNumber("targetPort", p.TargetPort.IntVal); err != nil {
			return lb.ServicePort{}, err
		}
	}
	converted := lb.ServicePort{Name: p.Name, Protocol: protocol, Port: port, TargetPort: target}
	if p.AppProtocol != nil {
		if problems := validation.IsQualifiedName(*p.AppProtocol); len(problems) > 0 {
			return lb.ServicePort{}, fmt.Errorf("appProtocol %.80q: %s", *p.AppProtocol, strings.Join(problems, ", "))
		}
		converted.AppProtocol = *p.AppProtocol
	}
	return converted, nil
}

func convertProtocol(p corev1.Protocol) (lb.Protocol, error) {
	switch p {
	case "", corev1.ProtocolTCP:
		return lb.TCP, nil
	case corev1.ProtocolUDP:
		return lb.UDP, nil
	case corev1.ProtocolSCTP:
		return "", errors.New("protocol SCTP is not available in this version, only TCP and UDP are")
	}
	return "", fmt.Errorf("protocol %.80q is not one of TCP, UDP", p)
}

func portNumber(field string, n int32) (uint16, error) {
	if problems := validation.IsValidPortNum(int(n)); len(problems) > 0 {
		return 0, fmt.Errorf("%s %d: %s", field, n, strings.Join(problems, ", "))
	}
	return uint16(n), nil
}
