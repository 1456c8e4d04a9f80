package identity

import (
	"maps"
	"slices"
	"strings"
)

// NamespaceLabel is the label that carries an endpoint's namespace, so that the same labels
// in two namespaces are two identities. It is Kubernetes' own name for it.
const NamespaceLabel = "io.kubernetes.pod.namespace"

// Labels of an endpoint; together they make its identity.
type Labels map[string]string

// String returns the labels sorted, "a=1,b=2": the canonical form that is compared and hashed.
func (l Labels) String() string {
	parts := make([]string, 0, len(l))
	for _, k := range slices.Sorted(maps.Keys(l)) {
		parts = append(parts, k+"="+l[k])
	}
	return strings.Join(parts, ",")
}

// Matches tells whether every pair of selector is among the labels; an empty selector matches nothing,
// as in a Kubernetes Service.
func (l Labels) Matches(selector map[string]string) bool {
	if len(selector) == 0 {
		return false
	}
	for k, v := range selector {
		if got, ok := l[k]; !ok || got != v {
			return false
		}
	}
	return true
}
