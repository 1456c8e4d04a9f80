// Package k8s is the only place that knows Kubernetes' types: it reads ordinary Service manifests, and is the source that follows an API server (Source).
package k8s

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"causeway/lb"
)

// MaxManifest bounds a file of manifests, in bytes.
const MaxManifest = 1 << 20

// ParseServices reads a file of Kubernetes manifests, YAML documents or JSON: Services of apiVersion v1 and
// Lists of them. It refuses the whole file if it cannot honour all of it, so that no
// field is silently without effect; the error names the document, the Service and the field.
//
// In what it returns Cluster and ClusterID are for the cluster to fill in, and ClusterIPs has the addresses that the
// manifest asks for, which may be fewer than its families want: the others are the cluster's to choose.
func ParseServices(data []byte) ([]Declaration, error) {
	if len(data) > MaxManifest {
		return nil, fmt.Errorf("the file has %d bytes, at most %d are allowed", len(data), MaxManifest)
	}
	documents, err := split(data)
	if err != nil {
		return nil, err
	}
	var services []Declaration
	for i, document := range documents {
		found, err := parseDocument(document)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		services = append(services, found...)
	}
	if len(services) == 0 {
		return nil, errors.New("the file has no Service")
	}
	if err := checkUnique(services); err != nil {
		return nil, err
	}
	return services, nil
}

// Declaration is a Service as a manifest has it, before its cluster gives it addresses.
type Declaration struct {
	lb.Service
	// Families of the cluster IPs that it wants.
	Families lb.FamilyRequest
}

// checkUnique refuses a Service that the file has twice: which of them is meant?
func checkUnique(services []Declaration) error {
	seen := map[lb.Name]bool{}
	for _, s := range services {
		if seen[s.Name] {
			return fmt.Errorf("the file has service %s twice", s.Name)
		}
		seen[s.Name] = true
	}
	return nil
}

// split returns the documents of a file as JSON, without empty ones.
func split(data []byte) ([][]byte, error) {
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return splitJSON(data)
	}
	var documents [][]byte
	reader := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for {
		raw, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return documents, nil
		}
		if err != nil {
			return nil, fmt.Errorf("after document %d: %w", len(documents), err)
		}
		document, err := yaml.YAMLToJSONStrict(raw)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", len(documents)+1, err)
		}
		if string(document) != "null" {
			documents = append(documents, document)
		}
	}
}

// splitJSON reads JSON objects that follow each other, as "kubectl get -o json" and jq write them.
func splitJSON(data []byte) ([][]byte, error) {
	var documents [][]byte
	decoder := json.NewDecoder(bytes.NewReader(data))
	for {
		var document json.RawMessage
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return documents, nil
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", len(documents)+1, err)
		}
		documents = append(documents, document)
	}
}

// parseDocument reads one object: a Service or a list of them.
func parseDocument(document []byte) ([]Declaration, error) {
	var kind metav1.TypeMeta
	if err := json.Unmarshal(document, &kind); err != nil {
		return nil, fmt.Errorf("it is not a Kubernetes object: %w", err)
	}
	switch {
	case kind.Kind == "":
		return nil, errors.New("it has no kind")
	case kind.APIVersion == "v1" && kind.Kind == "Service":
		s, err := parseService(document)
		return []Declaration{s}, err
	case kind.APIVersion == "v1" && (kind.Kind == "List" || kind.Kind == "ServiceList"):
		return parseList(document)
	}
	return nil, fmt.Errorf("kind %q of apiVersion %q is not known here, only Service and List of apiVersion v1 are: leave it to Kubernetes", kind.Kind, kind.APIVersion)
}

// list is a List whose items keep their own kinds.
type list struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []json.RawMessage `json:"items"`
}

func parseList(document []byte) ([]Declaration, error) {
	var l list
	if err := strict(document, &l); err != nil {
		return nil, err
	}
	var services []Declaration
	for i, item := range l.Items {
		var kind metav1.TypeMeta
		if err := json.Unmarshal(item, &kind); err != nil {
			return nil, fmt.Errorf("item %d is not a Kubernetes object: %w", i+1, err)
		}
		itemless := l.Kind == "ServiceList" && kind.Kind == "" && kind.APIVersion == ""
		if !itemless && (kind.Kind != "Service" || kind.APIVersion != "v1") {
			return nil, fmt.Errorf("item %d: kind %q of apiVersion %q is not known here, only Service of apiVersion v1 is", i+1, kind.Kind, kind.APIVersion)
		}
		s, err := parseService(item)
		if err != nil {
			return nil, fmt.Errorf("item %d: %w", i+1, err)
		}
		services = append(services, s)
	}
	return services, nil
}

func parseService(document []byte) (Declaration, error) {
	var service corev1.Service
	if err := strict(document, &service); err != nil {
		return Declaration{}, err
	}
	s, err := convert(&service)
	if err != nil {
		return Declaration{}, fmt.Errorf("service %s: %w", displayName(&service), err)
	}
	return s, nil
}

// strict decodes as Kubernetes' API server does with strict field validation: a field that is
// unknown, misspelt or given twice is an error.
func strict(document []byte, v any) error {
	problems, err := strictjson.UnmarshalStrict(document, v)
	if err != nil {
		return err
	}
	return errors.Join(problems...)
}

func displayName(s *corev1.Service) string {
	name := s.Namespace + "/" + s.Name
	if len(name) > 320 {
		name = name[:320] + "…"
	}
	return strings.TrimPrefix(name, "/")
}
