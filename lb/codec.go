package lb

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Bounds of stored services and slices.
const (
	MaxPorts       = 64  // of a service
	MaxClusterIPs  = 8   // of a service
	MaxExternalIPs = 64  // of a service
	MaxSelector    = 32  // pairs of a service's selector
	MaxAnnotations = 128 // of a service
)

// MaxSessionAffinity is the longest time, in seconds, that a client may stay with its backend after its last connection: a day, as in Kubernetes.
const MaxSessionAffinity = 24 * 60 * 60

// EncodeService returns the stored form of s, for ServiceKey.
func EncodeService(s Service) []byte { return encode(s) }

// DecodeService reads the declaration of a service stored under key. What it returns has passed
// CheckService, and its key says the same as its fields. The error is a sentence for people.
func DecodeService(key string, value []byte) (Service, error) {
	s, err := decodeService(key, value)
	if err != nil {
		return Service{}, fmt.Errorf("service entry %s: %w", entryName(key, "services"), err)
	}
	return s, nil
}

func decodeService(key string, value []byte) (Service, error) {
	parts, err := splitKey(key, "services", 3)
	if err != nil {
		return Service{}, err
	}
	var s Service
	if err := Unmarshal(value, &s); err != nil {
		return Service{}, err
	}
	if err := CheckService(s); err != nil {
		return Service{}, err
	}
	if want := (Name{parts[1], parts[2]}); s.Cluster != parts[0] || s.Name != want {
		return Service{}, fmt.Errorf("value is of %s in cluster %s, but the key of %s in cluster %s", s.Name, s.Cluster, want, parts[0])
	}
	return s, nil
}

// CheckService tells what is wrong with a declaration, before it is stored and after it was read.
func CheckService(s Service) error {
	if err := checkOwner(s.Cluster, s.ClusterID, s.Name); err != nil {
		return err
	}
	switch s.Affinity {
	case AffinityNone, AffinityLocal, AffinityRemote, AffinityNearest:
	default:
		return fmt.Errorf("affinity %s is not one of none, local, remote, nearest", quote(string(s.Affinity)))
	}
	if s.Shared && !s.Global {
		return errors.New("it is shared but not global")
	}
	if err := checkReached(s); err != nil {
		return err
	}
	if s.SessionAffinity > MaxSessionAffinity {
		return fmt.Errorf("session affinity of %d s, at most %d are allowed", s.SessionAffinity, MaxSessionAffinity)
	}
	if len(s.Selector) > MaxSelector {
		return fmt.Errorf("selector has %d labels, at most %d are allowed", len(s.Selector), MaxSelector)
	}
	if len(s.Annotations) > MaxAnnotations {
		return fmt.Errorf("%d annotations, at most %d are allowed", len(s.Annotations), MaxAnnotations)
	}
	if size := len(encode(s)); size > MaxValue {
		return fmt.Errorf("it takes %d bytes, at most %d are allowed: shorten its annotations", size, MaxValue)
	}
	return nil
}

// checkReached checks what a service is reached by: addresses and ports.
func checkReached(s Service) error {
	switch {
	case s.Headless && len(s.ClusterIPs) > 0:
		return fmt.Errorf("it is headless, but has %d cluster IPs", len(s.ClusterIPs))
	case !s.Headless && len(s.ClusterIPs) == 0, len(s.ClusterIPs) > MaxClusterIPs:
		return fmt.Errorf("%d cluster IPs, 1 to %d are allowed", len(s.ClusterIPs), MaxClusterIPs)
	case len(s.ExternalIPs) > MaxExternalIPs:
		return fmt.Errorf("%d external IPs, at most %d are allowed", len(s.ExternalIPs), MaxExternalIPs)
	}
	if err := checkAddresses("cluster IP", s.ClusterIPs); err != nil {
		return err
	}
	if err := checkAddresses("external IP", s.ExternalIPs); err != nil {
		return err
	}
	if !s.Headless || len(s.Ports) > 0 { // Names alone lead to a headless service's backends.
		if err := CheckPorts(s.Ports); err != nil {
			return err
		}
	}
	for _, p := range s.Ports {
		if p.Protocol == TCP && p.NodePort != 0 && p.NodePort == s.HealthCheckNodePort {
			return fmt.Errorf("node port %d of port %d/%s is that of the health check too", p.NodePort, p.Port, p.Protocol)
		}
	}
	return nil
}

// checkAddresses refuses what can't be a service's, and duplicates; what says in the error which addresses they are.
func checkAddresses(what string, ips []netip.Addr) error {
	seen := make(map[netip.Addr]bool, len(ips))
	for _, ip := range ips {
		if err := CheckAddress(ip); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if seen[ip] {
			return fmt.Errorf("%s %s is given twice", what, ip)
		}
		seen[ip] = true
	}
	return nil
}

// CheckPorts holds a service to Kubernetes' rules: several ports have names, and both names and
// numbers are unique, numbers by protocol, those of nodes too. A port without a target port is one whose backends' slices say it.
func CheckPorts(ports []ServicePort) error {
	if len(ports) == 0 || len(ports) > MaxPorts {
		return fmt.Errorf("%d ports, 1 to %d are allowed", len(ports), MaxPorts)
	}
	type number struct {
		protocol Protocol
		port     uint16
	}
	names, numbers, nodePorts := map[string]bool{}, map[number]bool{}, map[number]bool{}
	for _, p := range ports {
		if err := checkPort(p.Name, p.Protocol, p.Port); err != nil {
			return err
		}
		if err := checkAppProtocol(p); err != nil {
			return err
		}
		if len(ports) > 1 && p.Name == "" {
			return fmt.Errorf("port %d/%s needs a name, because the service has several ports", p.Port, p.Protocol)
		}
		n := number{p.Protocol, p.Port}
		if names[p.Name] || numbers[n] {
			return fmt.Errorf("port %s %d/%s is declared twice", quote(p.Name), p.Port, p.Protocol)
		}
		names[p.Name], numbers[n] = true, true
		onNodes := number{p.Protocol, p.NodePort}
		if p.NodePort != 0 && nodePorts[onNodes] {
			return fmt.Errorf("node port %d/%s is declared twice", p.NodePort, p.Protocol)
		}
		nodePorts[onNodes] = true
	}
	return nil
}

func checkPort(name string, protocol Protocol, port uint16) error {
	if name != "" {
		if err := CheckName("port name", name); err != nil {
			return err
		}
	}
	if protocol != TCP && protocol != UDP {
		return fmt.Errorf("protocol %s is not one of TCP, UDP", quote(string(protocol)))
	}
	if port == 0 {
		return fmt.Errorf("port %s has no number", quote(name))
	}
	return nil
}

func checkOwner(cluster string, id uint8, service Name) error {
	if err := CheckName("cluster", cluster); err != nil {
		return err
	}
	if id == 0 {
		return errors.New("cluster ID is missing")
	}
	if err := CheckName("service's namespace", service.Namespace); err != nil {
		return err
	}
	return CheckName("service's name", service.Name)
}

// EncodeSlice returns the stored form of s, for its Key. That of the cluster's is compressed: a full one has 10 KB as JSON, and about 2 KB so.
func EncodeSlice(s Slice) []byte {
	if s.OfCluster() {
		return compress(encode(s))
	}
	return encode(s)
}

// DecodeSlice reads the slice stored under key. What it returns is complete and bounded, and its key says the
// same as its fields. The error is a sentence for people.
func DecodeSlice(key string, value []byte) (Slice, error) {
	s, err := decodeSlice(key, value)
	if err != nil {
		return Slice{}, fmt.Errorf("slice entry %s: %w", entryName(key, "slices"), err)
	}
	return s, nil
}

func decodeSlice(key string, value []byte) (Slice, error) {
	parts, err := splitKey(key, "slices", 4)
	if err != nil {
		return Slice{}, err
	}
	if value, err = Expand(value); err != nil {
		return Slice{}, err
	}
	var s Slice
	if err := Unmarshal(value, &s); err != nil {
		return Slice{}, err
	}
	if err := CheckSlice(s); err != nil {
		return Slice{}, err
	}
	if s.Key() != key {
		return Slice{}, fmt.Errorf("value is of slice %s of %s in cluster %s, but the key of %s of %s/%s in cluster %s",
			s.Slice, s.Service, s.Cluster, parts[3], parts[1], parts[2], parts[0])
	}
	return s, nil
}

// CheckSlice tells what is wrong with a slice by itself, before it is stored and after it was read.
func CheckSlice(s Slice) error {
	if err := checkOwner(s.Cluster, s.ClusterID, s.Service); err != nil {
		return err
	}
	if err := checkSliceName(s); err != nil {
		return err
	}
	if s.Incarnation == 0 {
		return errors.New("incarnation is missing")
	}
	if err := checkBackendPorts(s.Ports); err != nil {
		return err
	}
	return checkBackends(s)
}

func checkSliceName(s Slice) error {
	if s.OfCluster() {
		name, marked := strings.CutPrefix(s.Slice, clusterSliceMark)
		if !marked || !isSubdomain(name) {
			return fmt.Errorf("slice name %s of no node's is not \"_\" and a DNS subdomain (1 to 253 of a-z, 0-9, \"-\" and \".\")", quote(s.Slice))
		}
		return nil
	}
	if err := CheckName("node", s.Node); err != nil {
		return err
	}
	if _, ok := sliceIndex(s.Node, s.Slice); !ok {
		return fmt.Errorf("slice name %s is neither %s nor %s.NUMBER", quote(s.Slice), s.Node, s.Node)
	}
	return nil
}

func checkBackendPorts(ports []BackendPort) error {
	if len(ports) > MaxPorts { // None: of a headless service.
		return fmt.Errorf("%d ports, at most %d are allowed", len(ports), MaxPorts)
	}
	names := map[string]bool{}
	for _, p := range ports {
		if err := checkPort(p.Name, p.Protocol, p.Port); err != nil {
			return err
		}
		if names[p.Name] {
			return fmt.Errorf("port %s is declared twice", quote(p.Name))
		}
		names[p.Name] = true
	}
	return nil
}

func checkBackends(s Slice) error {
	if len(s.Backends) == 0 || len(s.Backends) > MaxSliceBackends {
		return fmt.Errorf("%d backends, 1 to %d are allowed", len(s.Backends), MaxSliceBackends)
	}
	seen := make(map[netip.Addr]bool, len(s.Backends))
	for _, b := range s.Backends {
		if err := CheckAddress(b.Address); err != nil {
			return fmt.Errorf("backend: %w", err)
		}
		if seen[b.Address] {
			return fmt.Errorf("backend %s is given twice", b.Address)
		}
		seen[b.Address] = true
		if err := checkBackend(s, b); err != nil {
			return fmt.Errorf("backend %s: %w", b.Address, err)
		}
	}
	return nil
}

func checkBackend(s Slice, b SliceBackend) error {
	if b.Endpoint != "" {
		if err := CheckEndpoint(b.Endpoint); err != nil {
			return err
		}
	}
	if b.Hostname != "" {
		if err := CheckName("hostname", b.Hostname); err != nil {
			return err
		}
	}
	switch {
	case b.Node == "" || b.Node == s.Node:
		return nil
	case !s.OfCluster():
		return fmt.Errorf("it is said to be on node %s, in a slice of node %s's", quote(b.Node), s.Node)
	}
	return CheckName("node", b.Node)
}

// entryName is the part of a key that tells the entry from others of its kind, for errors.
func entryName(key, kind string) string {
	rest, found := strings.CutPrefix(key, keyPrefix+kind+"/")
	if !found || len(rest) > 200 {
		return quote(key)
	}
	return rest
}

// encode marshals rows of strings, numbers and addresses, which cannot fail.
func encode(row any) []byte {
	value, err := json.Marshal(row)
	if err != nil {
		panic(fmt.Sprintf("lb: %T does not marshal: %v", row, err))
	}
	return value
}
