package lb

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of what annotations say.
const (
	maxClusters      = 255 // as many as there are cluster IDs
	maxClusterWeight = 1_000_000
	maxHealthPath    = 1024 // bytes
)

// token is what names of headers and cookies are made of: RFC 9110 section 5.6.2, RFC 6265 section 4.1.1.
var token = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$")

// grpcService is a service's full name in a protocol buffer, though servers may call theirs otherwise.
var grpcService = regexp.MustCompile(`^[A-Za-z0-9_./-]{1,256}$`)

// number reads a whole number with a unit into the field.
func number(lowest, highest uint64, unit string, field func(*L7Options) *int) l7Annotation {
	return func(o *L7Options, value string) error {
		digits, ok := strings.CutSuffix(value, unit)
		n, err := strconv.ParseUint(digits, 10, 32)
		if !ok || err != nil || n < lowest || n > highest {
			return fmt.Errorf("a whole number from %d%s to %d%s", lowest, unit, highest, unit)
		}
		*field(o) = int(n)
		return nil
	}
}

// duration reads a duration as Go writes them into the field; 0 is none, if that may be.
func duration(lowest, highest time.Duration, none bool, field func(*L7Options) *time.Duration) l7Annotation {
	return func(o *L7Options, value string) error {
		d, err := time.ParseDuration(value)
		if err == nil && none && d == 0 {
			*field(o) = 0
			return nil
		}
		if err != nil || d < lowest || d > highest {
			allowed := fmt.Sprintf("a duration from %s to %s, such as 500ms or 1m30s", lowest, highest)
			if none {
				allowed += "; 0s for none"
			}
			return errors.New(allowed)
		}
		*field(o) = d
		return nil
	}
}

// parseWeights reads "east=90,west=10".
func parseWeights(o *L7Options, value string) error {
	allowed := fmt.Errorf("CLUSTER=WEIGHT for each of 1 to %d different clusters, such as \"east=90,west=10\", with weights from 0 to %d that are not all 0", maxClusters, maxClusterWeight)
	parts := list(value)
	if len(parts) > maxClusters {
		return allowed
	}
	var weights []ClusterWeight
	sum := 0
	for _, part := range parts {
		cluster, text, _ := strings.Cut(part, "=")
		weight, err := strconv.ParseUint(text, 10, 32)
		if err != nil || weight > maxClusterWeight || CheckName("cluster", cluster) != nil {
			return allowed
		}
		if slices.ContainsFunc(weights, func(w ClusterWeight) bool { return w.Cluster == cluster }) {
			return allowed
		}
		weights = append(weights, ClusterWeight{cluster, int(weight)})
		sum += int(weight)
	}
	if sum == 0 {
		return allowed
	}
	slices.SortFunc(weights, func(a, b ClusterWeight) int { return cmp.Compare(a.Cluster, b.Cluster) })
	o.Weights = weights
	return nil
}

// parseFailover reads "east,west,north".
func parseFailover(o *L7Options, value string) error {
	allowed := fmt.Errorf("the names of 1 to %d different clusters in order, such as \"east,west,north\"", maxClusters)
	parts := list(value)
	if len(parts) > maxClusters {
		return allowed
	}
	for i, cluster := range parts {
		if CheckName("cluster", cluster) != nil || slices.Contains(parts[:i], cluster) {
			return allowed
		}
	}
	o.Failover = parts
	return nil
}

// parseHash reads "header:NAME" or "cookie:NAME".
func parseHash(o *L7Options, value string) error {
	kind, name, _ := strings.Cut(value, ":")
	if kind != "header" && kind != "cookie" || !token.MatchString(name) {
		return errors.New("header:NAME or cookie:NAME, with a name of at most 128 letters, digits and signs that HTTP allows in it")
	}
	o.Algorithm = Hashed
	if kind == "cookie" {
		o.HashCookie = name
	} else {
		o.HashHeader = strings.ToLower(name) // as HTTP/2 writes it
	}
	return nil
}

// parseHealth reads "http:/PATH", "grpc", "grpc:SERVICE" or "tcp".
func parseHealth(o *L7Options, value string) error {
	kind, what, more := strings.Cut(value, ":")
	switch {
	case kind == "http" && isPath(what):
		o.Health.Kind, o.Health.Path = HealthHTTP, what
	case kind == "grpc" && !more:
		o.Health.Kind = HealthGRPC
	case kind == "grpc" && grpcService.MatchString(what):
		o.Health.Kind, o.Health.Service = HealthGRPC, what
	case kind == "tcp" && !more:
		o.Health.Kind = HealthTCP
	default:
		return fmt.Errorf("http:/PATH, with a path as it stands in a request, of at most %d bytes, grpc, grpc:SERVICE or tcp", maxHealthPath)
	}
	return nil
}

// isPath tells whether p can be written into a request line as it is: the request's end or a header could hide in it else.
func isPath(p string) bool {
	if len(p) > maxHealthPath || !strings.HasPrefix(p, "/") {
		return false
	}
	for i := range len(p) {
		if p[i] <= ' ' || p[i] >= 0x7f || p[i] == '#' {
			return false
		}
	}
	_, err := url.ParseRequestURI(p)
	return err == nil
}
