package kvstore

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// BenchmarkPutToWatch measures the time from a Put until another client's watch delivers it.
func BenchmarkPutToWatch(b *testing.B) {
	server := startProcess(b)
	s, observer := server.dial(b, nil), server.dial(b, nil)
	w := observer.Watch(b.Context(), "p/")
	<-w
	took := make([]time.Duration, 0, b.N)
	i := 0
	for b.Loop() {
		start := time.Now()
		value := fmt.Append(nil, i)
		go func() {
			if err := s.Put(b.Context(), "p/a", value, Leased); err != nil {
				b.Error(err)
			}
		}()
		<-w
		took = append(took, time.Since(start))
		i++
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
