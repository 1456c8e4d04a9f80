package lb

import (
	"fmt"
	"strings"
	"time"
)

// Annotations of a Service that is balanced at L7, beside Cilium's.
const (
	AnnotationClusters          = "causeway.io/clusters"
	AnnotationFailover          = "causeway.io/failover"
	AnnotationL7Hash            = "causeway.io/l7-hash"
	AnnotationL7Health          = "causeway.io/l7-health"
	AnnotationL7HealthInterval  = "causeway.io/l7-health-interval"
	AnnotationL7HealthTimeout   = "causeway.io/l7-health-timeout"
	AnnotationL7Retries         = "causeway.io/l7-retries"
	AnnotationL7RetryBudget     = "causeway.io/l7-retry-budget"
	AnnotationL7TryTimeout      = "causeway.io/l7-try-timeout"
	AnnotationL7Timeout         = "causeway.io/l7-timeout"
	AnnotationL7MaxConnections  = "causeway.io/l7-max-connections"
	AnnotationL7MaxPending      = "causeway.io/l7-max-pending"
	AnnotationL7OutlierFailures = "causeway.io/l7-outlier-failures"
	AnnotationL7EjectFor        = "causeway.io/l7-eject-for"
	AnnotationL7MaxEjected      = "causeway.io/l7-max-ejected"
	AnnotationL7SlowStart       = "causeway.io/l7-slow-start"
)

// What a health check has that says nothing else.
const (
	defaultHealthInterval = 2 * time.Second
	defaultHealthTimeout  = time.Second
)

// l7Annotation reads one annotation into options. An error says what is allowed, for "…, allowed is …".
type l7Annotation func(o *L7Options, value string) error

// l7Annotations are ours, which have no effect without AnnotationL7.
var l7Annotations = map[string]l7Annotation{
	AnnotationClusters: parseWeights,
	AnnotationFailover: parseFailover,
	AnnotationL7Hash:   parseHash,
	AnnotationL7Health: parseHealth,
	AnnotationL7HealthInterval: duration(100*time.Millisecond, 5*time.Minute, false, func(o *L7Options) *time.Duration {
		return &o.Health.Interval
	}),
	AnnotationL7HealthTimeout: duration(10*time.Millisecond, 5*time.Minute, false, func(o *L7Options) *time.Duration {
		return &o.Health.Timeout
	}),
	AnnotationL7Retries:         number(0, 10, "", func(o *L7Options) *int { return &o.Retries }),
	AnnotationL7RetryBudget:     number(0, 100, "%", func(o *L7Options) *int { return &o.RetryBudget }),
	AnnotationL7TryTimeout:      duration(time.Millisecond, 24*time.Hour, true, func(o *L7Options) *time.Duration { return &o.TryTimeout }),
	AnnotationL7Timeout:         duration(time.Millisecond, 24*time.Hour, true, func(o *L7Options) *time.Duration { return &o.Timeout }),
	AnnotationL7MaxConnections:  number(1, 1_000_000, "", func(o *L7Options) *int { return &o.MaxConnections }),
	AnnotationL7MaxPending:      number(0, 1_000_000, "", func(o *L7Options) *int { return &o.MaxPending }),
	AnnotationL7OutlierFailures: number(0, 1000, "", func(o *L7Options) *int { return &o.OutlierFailures }),
	AnnotationL7EjectFor:        duration(100*time.Millisecond, time.Hour, false, func(o *L7Options) *time.Duration { return &o.EjectFor }),
	AnnotationL7MaxEjected:      number(0, 100, "%", func(o *L7Options) *int { return &o.MaxEjected }),
	AnnotationL7SlowStart:       duration(time.Millisecond, time.Hour, true, func(o *L7Options) *time.Duration { return &o.SlowStart }),
}

// checkL7Annotation holds one of ours to its values, and to there being an AnnotationL7.
func checkL7Annotation(annotations map[string]string, key string) error {
	var o L7Options
	if err := l7Annotations[key](&o, annotations[key]); err != nil {
		return fmt.Errorf("annotation %s has the value %s, allowed is %w", key, quote(annotations[key]), err)
	}
	if _, ok := annotations[AnnotationL7]; !ok {
		return fmt.Errorf("annotation %s: %s has no effect without %s: enabled; write that too, or remove this one", key, quote(annotations[key]), AnnotationL7)
	}
	return nil
}

// parseL7 returns what annotations that were checked one by one say together.
func parseL7(annotations map[string]string, affinity Affinity) (L7Options, error) {
	o := DefaultL7Options()
	o.Affinity = affinity
	for key, parse := range l7Annotations {
		if value, ok := annotations[key]; ok {
			if err := parse(&o, value); err != nil {
				return L7Options{}, fmt.Errorf("annotation %s: allowed is %w", key, err)
			}
		}
	}
	if algorithm, ok := annotations[AnnotationL7Algorithm]; ok && o.Algorithm != Hashed {
		o.Algorithm = L7Algorithm(algorithm)
	}
	if err := checkTogether(annotations, o); err != nil {
		return L7Options{}, err
	}
	return withHealthDefaults(annotations, o)
}

// checkTogether refuses annotations that contradict each other: either would silently win.
func checkTogether(annotations map[string]string, o L7Options) error {
	both := func(a, b string) error {
		return fmt.Errorf("annotations %s: %s and %s: %s contradict each other; remove one", a, quote(annotations[a]), b, quote(annotations[b]))
	}
	has := func(key string) bool { _, ok := annotations[key]; return ok }
	switch {
	case has(AnnotationL7Hash) && has(AnnotationL7Algorithm):
		return both(AnnotationL7Hash, AnnotationL7Algorithm)
	case has(AnnotationClusters) && has(AnnotationFailover):
		return both(AnnotationClusters, AnnotationFailover)
	case has(AnnotationClusters) && o.Affinity != AffinityNone:
		return both(AnnotationClusters, AnnotationAffinity)
	case has(AnnotationFailover) && o.Affinity != AffinityNone:
		return both(AnnotationFailover, AnnotationAffinity)
	case o.Timeout > 0 && o.TryTimeout > o.Timeout:
		return fmt.Errorf("annotation %s: %s is longer than %s: %s; make it shorter", AnnotationL7TryTimeout, quote(annotations[AnnotationL7TryTimeout]),
			AnnotationL7Timeout, quote(annotations[AnnotationL7Timeout]))
	}
	return nil
}

func withHealthDefaults(annotations map[string]string, o L7Options) (L7Options, error) {
	if o.Health.Kind == HealthNone {
		for _, key := range []string{AnnotationL7HealthInterval, AnnotationL7HealthTimeout} {
			if value, ok := annotations[key]; ok {
				return L7Options{}, fmt.Errorf("annotation %s: %s has no effect without %s; write that too, or remove this one", key, quote(value), AnnotationL7Health)
			}
		}
		return o, nil
	}
	if o.Health.Interval == 0 {
		o.Health.Interval = max(defaultHealthInterval, o.Health.Timeout)
	}
	if o.Health.Timeout == 0 {
		o.Health.Timeout = min(defaultHealthTimeout, o.Health.Interval)
	}
	if o.Health.Timeout > o.Health.Interval {
		return L7Options{}, fmt.Errorf("annotation %s: %s is longer than %s: %s; a check must end before the next one begins", AnnotationL7HealthTimeout,
			quote(annotations[AnnotationL7HealthTimeout]), AnnotationL7HealthInterval, quote(annotations[AnnotationL7HealthInterval]))
	}
	return o, nil
}

// list cuts "a, b" into its parts.
func list(value string) []string {
	parts := strings.Split(value, ",")
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return parts
}
