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
func convert(s *corev1.Service) (lb.Service, error) {
	if err := checkSupported(&s.Spec); err != nil {
		return lb.Service{}, err
	}
	name, err := serviceName(s)
	if err != nil {
		return lb.Service{}, err
	}
	options, err := lb.ParseAnnotations(s.Annotations)
	if err != nil {
		return lb.Service{}, err
	}
	if err := checkSelector(s.Spec.Selector); err != nil {
		return lb.Service{}, err
	}
	ports, err := convertPorts(s.Spec.Ports)
	if err != nil {
		return lb.Service{}, err
	}
	ips, err := clusterIPs(&s.Spec)
	if err != nil {
		return lb.Service{}, err
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
	return service, checkStorable(service)
}

// checkStorable refuses what is too large to be stored in any cluster.
func checkStorable(s lb.Service) error {
	s.Cluster, s.ClusterID = strings.Repeat("c", 63), 255
	if len(s.ClusterIPs) == 0 {
		s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{100, 127, 255, 255})}
	}
	return lb.CheckService(s)
}

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
	if err := checkFamilies(spec); err != nil {
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

func checkFamilies(spec *corev1.ServiceSpec) error {
	for _, f := range spec.IPFamilies {
		if f != corev1.IPv4Protocol {
			return fmt.Errorf("spec.ipFamilies has %.80q: services have IPv4 addresses only in this version", f)
		}
	}
	if len(spec.IPFamilies) > 1 {
		return errors.New("spec.ipFamilies has IPv4 twice")
	}
	if p := spec.IPFamilyPolicy; p != nil && *p != corev1.IPFamilyPolicySingleStack && *p != corev1.IPFamilyPolicyPreferDualStack {
		return fmt.Errorf("spec.ipFamilyPolicy %.80q: services have IPv4 addresses only in this version, write SingleStack", *p)
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
	return lb.ServicePort{Name: p.Name, Protocol: protocol, Port: port, TargetPort: target}, nil
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

// clusterIPs returns the address that the manifest asks for, none if it leaves the choice to the cluster.
func clusterIPs(spec *corev1.ServiceSpec) ([]netip.Addr, error) {
	wanted := spec.ClusterIP
	switch {
	case len(spec.ClusterIPs) > 1:
		return nil, fmt.Errorf("spec.clusterIPs has %d addresses: a service has one in this version", len(spec.ClusterIPs))
	case len(spec.ClusterIPs) == 1 && wanted == "":
		wanted = spec.ClusterIPs[0]
	case len(spec.ClusterIPs) == 1 && wanted != spec.ClusterIPs[0]:
		return nil, fmt.Errorf("spec.clusterIP %.80q and spec.clusterIPs %.80q differ", wanted, spec.ClusterIPs[0])
	}
	switch wanted {
	case "":
		return nil, nil
	case corev1.ClusterIPNone:
		return nil, errors.New("spec.clusterIP None (a headless Service) has no address to balance, which Causeway does not serve")
	}
	ip, err := netip.ParseAddr(wanted)
	if err == nil && !ip.Is4() {
		err = errors.New("services have IPv4 addresses only in this version")
	}
	if err == nil {
		err = lb.CheckAddress(ip)
	}
	if err != nil {
		return nil, fmt.Errorf("spec.clusterIP %.80q: %w", wanted, err)
	}
	return []netip.Addr{ip}, nil
}
