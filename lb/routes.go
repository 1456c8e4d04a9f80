package lb

import (
	"cmp"
	"fmt"
	"slices"
)

// governing returns the declaration that says how the service is balanced at L7, and whether clients stay with a backend: the own cluster's if there is one, since who
// calls decides, else that of the lowest cluster ID among those that take part; nil if none does.
func (v ServiceView) governing() *Service {
	if local := v.local(); local != nil {
		return local
	}
	var first *Service
	for i := range v.Declared {
		s := &v.Declared[i]
		if v.merged(s) && (first == nil || compareOwners(v.Self, s.ClusterID, s.Cluster, first.ClusterID, first.Cluster) < 0) {
			first = s
		}
	}
	return first
}

// Problem is what a service asks for and does not get.
type Problem struct {
	Cluster string // whose declaration it is
	What    string // as in "L7 of service web/shop"
	Reason  string
}

// Problems returns what the service asks for in vain.
func (v ServiceView) Problems() []Problem {
	_, on, problem := v.L7()
	if problem != nil {
		return []Problem{*problem}
	}
	s := v.governing()
	if !on || s.SessionAffinity == 0 || !slices.ContainsFunc(s.Ports, func(p ServicePort) bool { return p.Protocol == TCP }) {
		return nil
	}
	return []Problem{{s.Cluster, "session affinity", fmt.Sprintf("sessionAffinity ClientIP has no effect on TCP ports while annotation %s is enabled, since requests are balanced instead of connections; "+
		"say %s to have requests of a client go to one backend, or sessionAffinity None", AnnotationL7, AnnotationL7Hash)}}
}

// L7 returns how the service is balanced at L7, and whether it is. Stored annotations that do not parse, which an agent of another
// version may have written, are a problem, and the service is balanced at L4: connections are better than none.
func (v ServiceView) L7() (options L7Options, on bool, problem *Problem) {
	s := v.governing()
	if s == nil {
		return L7Options{}, false, nil
	}
	if value, asked := s.Annotations[AnnotationL7]; !asked || value == "disabled" {
		return L7Options{}, false, nil
	}
	parsed, err := ParseAnnotations(s.Annotations)
	if err != nil {
		return L7Options{}, false, &Problem{s.Cluster, "L7", fmt.Sprintf("it is balanced at L4, because its declaration in cluster %s can't be followed: %v", s.Cluster, err)}
	}
	return parsed.Route, parsed.L7, nil
}

// Routes returns how each TCP port that a frontend of the service leads to is balanced at L7, ordered by port; none if the service is not.
func Routes(view ServiceView) []Route {
	options, on, _ := view.L7()
	if !on {
		return nil
	}
	frontends, _ := Frontends(view, nil)
	var routes []Route
	done := map[PortKey]bool{}
	for _, f := range frontends {
		if !f.L7 || done[f.Target] {
			continue
		}
		done[f.Target] = true
		routes = append(routes, Route{Port: f.Target, Number: f.Port, App: view.app(f.Target), Options: options})
	}
	slices.SortFunc(routes, func(a, b Route) int { return cmp.Compare(a.Port.String(), b.Port.String()) })
	return routes
}

// app returns what a port speaks: as the own cluster says, else as the lowest ID's does of those that say something known.
func (v ServiceView) app(key PortKey) AppProtocol {
	var says *Service
	app := AppUnknown
	for i := range v.Declared {
		s := &v.Declared[i]
		if !v.merged(s) || says != nil && compareOwners(v.Self, s.ClusterID, s.Cluster, says.ClusterID, says.Cluster) > 0 {
			continue
		}
		for _, p := range s.Ports {
			if p.key() != key.Port || p.Protocol != key.Protocol {
				continue
			}
			if known := ParseAppProtocol(p.AppProtocol); known != AppUnknown {
				says, app = s, known
			}
		}
	}
	return app
}

// l4Affinity is what a frontend has of an affinity: the nearest cluster is known at L7 only.
func l4Affinity(a Affinity) Affinity {
	if a == AffinityNearest {
		return AffinityNone
	}
	return a
}
