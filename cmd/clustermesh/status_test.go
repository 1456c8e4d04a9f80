package main

import (
	"testing"
	"time"

	"causeway/agent/api"
)

func TestWhoPublishesForOtherClustersIsShown(t *testing.T) {
	now := time.Date(2026, 10, 1, 12, 0, 0, 0, time.UTC)
	for want, e := range map[string]*api.Exporter{
		"": nil,
		"services for other clusters: no node publishes them":                             {LastError: "away"},
		"services for other clusters: node2 publishes them, for 3m now":                   {Leader: "node2", Since: now.Add(-3 * time.Minute)},
		"services for other clusters: this node publishes them, for 1m now, in 7 entries": {Leader: "node1", Self: true, Since: now.Add(-time.Minute), Keys: 7},
	} {
		if got := exporterText(&printer{now: now}, e); got != want {
			t.Errorf("%+v is shown as %q, want %q", e, got, want)
		}
	}
}
