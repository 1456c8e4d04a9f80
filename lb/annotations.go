package lb

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Annotations of a Service, with Cilium's meanings (https://docs.cilium.io/en/stable/network/clustermesh/services/).
const (
	AnnotationGlobal      = "service.cilium.io/global"
	AnnotationShared      = "service.cilium.io/shared"
	AnnotationAffinity    = "service.cilium.io/affinity"
	AnnotationL7          = "service.cilium.io/lb-l7"
	AnnotationL7Algorithm = "service.cilium.io/lb-l7-algorithm"
)

// annotationValues lists the known keys with the values that each may have.
var annotationValues = map[string][]string{
	AnnotationGlobal:      {"true", "false"},
	AnnotationShared:      {"true", "false"},
	AnnotationAffinity:    {string(AffinityNone), string(AffinityLocal), string(AffinityRemote)},
	AnnotationL7:          {"enabled", "disabled"},
	AnnotationL7Algorithm: {"round_robin", "least_request", "random"},
}

// oldAnnotations are names that Cilium once had for the known keys.
var oldAnnotations = map[string]string{
	"io.cilium/global-service":   AnnotationGlobal,
	"io.cilium/shared-service":   AnnotationShared,
	"io.cilium/service-affinity": AnnotationAffinity,
}

// Options are what a service's annotations say.
type Options struct {
	Global   bool
	Shared   bool // true by default if Global, never without it
	Affinity Affinity
}

// ParseAnnotations reads a service's annotations. It skips those of others, and refuses what begins with
// "service.cilium.io/" or "causeway.io/" and isn't known, and values that aren't: a misspelt annotation must not
// silently do nothing. The error is a sentence for the manifest's author.
func ParseAnnotations(annotations map[string]string) (Options, error) {
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if err := checkAnnotation(key, annotations[key]); err != nil {
			return Options{}, err
		}
	}
	options := Options{Affinity: AffinityNone}
	options.Global = annotations[AnnotationGlobal] == "true"
	options.Shared = options.Global && annotations[AnnotationShared] != "false"
	if affinity, ok := annotations[AnnotationAffinity]; ok {
		options.Affinity = Affinity(affinity)
	}
	return options, nil
}

func checkAnnotation(key, value string) error {
	if now, ok := oldAnnotations[key]; ok {
		return fmt.Errorf("annotation %s is Cilium's former name of %s, write that", key, now)
	}
	allowed, known := annotationValues[key]
	if !known {
		if strings.HasPrefix(key, "service.cilium.io/") || strings.HasPrefix(key, "causeway.io/") {
			return fmt.Errorf("annotation %s is not known; known are %s", quote(key), strings.Join(slices.Sorted(maps.Keys(annotationValues)), ", "))
		}
		return nil
	}
	if !slices.Contains(allowed, value) {
		return fmt.Errorf("annotation %s has the value %s, allowed are %s", key, quote(value), strings.Join(allowed, ", "))
	}
	if key == AnnotationL7 && value == "enabled" {
		return fmt.Errorf("annotation %s: balancing at L7 is not available in this version; remove the annotation or write \"disabled\"", key)
	}
	return nil
}
