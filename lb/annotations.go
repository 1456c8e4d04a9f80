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
	AnnotationSyncSlices  = "service.cilium.io/global-sync-endpoint-slices"
)

// annotationValues lists the known keys with the values that each may have.
var annotationValues = map[string][]string{
	AnnotationGlobal:      {"true", "false"},
	AnnotationShared:      {"true", "false"},
	AnnotationAffinity:    {string(AffinityNone), string(AffinityLocal), string(AffinityRemote), string(AffinityNearest)},
	AnnotationSyncSlices:  {"true", "false"},
	AnnotationL7:          {"enabled", "disabled"},
	AnnotationL7Algorithm: {string(RoundRobin), string(LeastRequest), string(Random)},
}

// annotationPrefixes begin the names of all annotations that have a meaning here.
var annotationPrefixes = []string{"service.cilium.io/", "causeway.io/"}

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
	// L7: requests are balanced instead of connections, as Route says.
	L7    bool
	Route L7Options
}

// ParseAnnotations reads a service's annotations. It skips those of others, and refuses what begins with
// "service.cilium.io/" or "causeway.io/" and isn't known, and values that aren't: a misspelt annotation must not
// silently do nothing. The error is a sentence for the manifest's author.
func ParseAnnotations(annotations map[string]string) (Options, error) {
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if err := checkAnnotation(annotations, key); err != nil {
			return Options{}, err
		}
	}
	options := Options{Affinity: AffinityNone}
	options.Global = annotations[AnnotationGlobal] == "true"
	if annotations[AnnotationSyncSlices] == "true" && !options.Global {
		return Options{}, fmt.Errorf("annotation %s: true is allowed with %s: true only: the endpoints are those of the same service in other clusters", AnnotationSyncSlices, AnnotationGlobal)
	}
	options.Shared = options.Global && annotations[AnnotationShared] != "false"
	if affinity, ok := annotations[AnnotationAffinity]; ok {
		options.Affinity = Affinity(affinity)
	}
	return options.withL7(annotations)
}

// withL7 adds what a service says of balancing at L7. Where that is switched off for a while, options of it are held to the same
// rules, so that switching it on brings no surprise, but have no effect.
func (o Options) withL7(annotations map[string]string) (Options, error) {
	o.L7 = annotations[AnnotationL7] == "enabled"
	if o.Affinity == AffinityNearest && !o.L7 {
		return Options{}, fmt.Errorf("annotation %s has the value %s, which is allowed with %s: enabled only; without it allowed are none, local, remote",
			AnnotationAffinity, quote(string(o.Affinity)), AnnotationL7)
	}
	route, err := parseL7(annotations, o.Affinity)
	if err != nil {
		return Options{}, err
	}
	if o.L7 {
		o.Route = route
	}
	return o, nil
}

func checkAnnotation(annotations map[string]string, key string) error {
	value := annotations[key]
	if now, ok := oldAnnotations[key]; ok {
		return fmt.Errorf("annotation %s is Cilium's former name of %s, write that", key, now)
	}
	if _, ours := l7Annotations[key]; ours {
		return checkL7Annotation(annotations, key)
	}
	allowed, known := annotationValues[key]
	if !known {
		for _, prefix := range annotationPrefixes {
			if strings.HasPrefix(key, prefix) {
				return fmt.Errorf("annotation %s is not known; known of %s are %s", quote(key), prefix, strings.Join(knownAnnotations(prefix), ", "))
			}
		}
		return nil
	}
	if !slices.Contains(allowed, value) {
		return fmt.Errorf("annotation %s has the value %s, allowed are %s", key, quote(value), strings.Join(allowed, ", "))
	}
	return nil
}

// knownAnnotations lists the names that may follow the prefix.
func knownAnnotations(prefix string) []string {
	var known []string
	for _, key := range append(slices.Collect(maps.Keys(annotationValues)), slices.Collect(maps.Keys(l7Annotations))...) {
		if name, ok := strings.CutPrefix(key, prefix); ok {
			known = append(known, name)
		}
	}
	slices.Sort(known)
	return known
}
