package lb

import (
	"slices"
	"testing"
)

func TestMirroredClusters(t *testing.T) {
	says := func(value string) func(*Service) {
		return func(s *Service) { s.Annotations = map[string]string{AnnotationSyncSlices: value} }
	}
	headless := func(s *Service) { s.Headless, s.ClusterIPs = true, nil }
	for _, test := range []struct {
		name string
		view ServiceView
		want []string
	}{
		{"asked for", inEast(declared(3), declared(1, says("true")), declared(2)), []string{"west", "north"}},
		{"not asked for", inEast(declared(1), declared(2, says("true"))), nil},
		{"one does not share", inEast(declared(1, says("true")), declared(2, unshared), declared(3)), []string{"north"}},
		{"one is not global", inEast(declared(1, says("true")), declared(2, private), declared(3)), []string{"north"}},
		{"headless", inEast(declared(1, headless), declared(2)), []string{"west"}},
		{"headless, and not wanted", inEast(declared(1, headless, says("false")), declared(2)), nil},
		{"headless, but not global", inEast(declared(1, headless, private), declared(2)), nil},
		{"not declared here", inEast(declared(2, says("true")), declared(3)), nil},
	} {
		if got := MirroredClusters(test.view); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}
