package lb

import (
	"os"
	"reflect"
	"strings"
	"testing"
)

func TestParseAnnotations(t *testing.T) {
	for _, test := range []struct {
		name        string
		annotations map[string]string
		want        Options
		err         string
	}{
		{name: "none", want: Options{Affinity: AffinityNone}},
		{name: "another's", annotations: map[string]string{"prometheus.io/scrape": "yes"}, want: Options{Affinity: AffinityNone}},
		{name: "global is shared", annotations: map[string]string{AnnotationGlobal: "true"}, want: Options{Global: true, Shared: true, Affinity: AffinityNone}},
		{name: "not shared", annotations: map[string]string{AnnotationGlobal: "true", AnnotationShared: "false"}, want: Options{Global: true, Affinity: AffinityNone}},
		{name: "shared without global is nothing", annotations: map[string]string{AnnotationShared: "true"}, want: Options{Affinity: AffinityNone}},
		{name: "local", annotations: map[string]string{AnnotationGlobal: "true", AnnotationAffinity: "local"}, want: Options{Global: true, Shared: true, Affinity: AffinityLocal}},
		{name: "remote", annotations: map[string]string{AnnotationGlobal: "true", AnnotationAffinity: "remote"}, want: Options{Global: true, Shared: true, Affinity: AffinityRemote}},
		{name: "L7 off", annotations: map[string]string{AnnotationL7: "disabled", AnnotationL7Algorithm: "least_request"}, want: Options{Affinity: AffinityNone}},
		{name: "L7", annotations: map[string]string{AnnotationL7: "enabled"}, want: Options{Affinity: AffinityNone, L7: true, Route: DefaultL7Options()}},

		{name: "mirrored", annotations: map[string]string{AnnotationGlobal: "true", AnnotationSyncSlices: "true"}, want: Options{Global: true, Shared: true, Affinity: AffinityNone}},
		{name: "not mirrored", annotations: map[string]string{AnnotationSyncSlices: "false"}, want: Options{Affinity: AffinityNone}},

		{name: "mirrored without global", annotations: map[string]string{AnnotationSyncSlices: "true"}, err: "global-sync-endpoint-slices: true is allowed with service.cilium.io/global: true only"},
		{name: "mirrored value", annotations: map[string]string{AnnotationGlobal: "true", AnnotationSyncSlices: "yes"}, err: `has the value "yes", allowed are true, false`},
		{name: "L7 value", annotations: map[string]string{AnnotationL7: "true"}, err: `has the value "true", allowed are enabled, disabled`},
		{name: "algorithm", annotations: map[string]string{AnnotationL7Algorithm: "fastest"}, err: "round_robin, least_request, random"},
		{name: "affinity value", annotations: map[string]string{AnnotationAffinity: "nearest"}, err: `service.cilium.io/affinity has the value "nearest", which is allowed with service.cilium.io/lb-l7: enabled only`},
		{name: "affinity empty", annotations: map[string]string{AnnotationAffinity: ""}, err: "allowed are none, local, remote, nearest"},
		{name: "boolean", annotations: map[string]string{AnnotationGlobal: "yes"}, err: `has the value "yes", allowed are true, false`},
		{name: "boolean case", annotations: map[string]string{AnnotationGlobal: "True"}, err: "allowed are true, false"},
		{name: "misspelt", annotations: map[string]string{"service.cilium.io/globl": "true"}, err: "known of service.cilium.io/ are affinity, global, global-sync-endpoint-slices, lb-l7, "},
		{name: "ours", annotations: map[string]string{"causeway.io/weight": "3"}, err: `"causeway.io/weight" is not known`},
		{name: "former", annotations: map[string]string{"io.cilium/global-service": "true"}, err: "write that"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := ParseAnnotations(test.annotations)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("got %v, want … %s …", err, test.err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %+v, %v, want %+v", got, err, test.want)
			}
		})
	}
}

// TestEveryAnnotationIsDocumented: docs/services.md says of each annotation what comes of it.
func TestEveryAnnotationIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/services.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, prefix := range annotationPrefixes {
		for _, name := range knownAnnotations(prefix) {
			if !strings.Contains(string(doc), "`"+prefix+name+"`") {
				t.Errorf("docs/services.md has no line on %s%s", prefix, name)
			}
		}
	}
}
