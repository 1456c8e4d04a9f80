package agent

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"causeway/clustermesh"
	"causeway/k8s"
	"causeway/lb"
)

// TestAuthorsAreToldWhatIsWrongAcrossClusters: once each time, not of what passes, and by who leads alone.
func TestAuthorsAreToldWhatIsWrongAcrossClusters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tables := newTables(t)
		b, _ := startBalance(t, tables, nil)
		var told []string
		lead := func() (end func()) {
			f := &findings{tables: tables, view: b.view, grace: findingGrace, tell: func(service lb.Name, kind k8s.EventKind, reason, message string) {
				told = append(told, fmt.Sprintf("%s %s %s: %s", service.Name, kind, reason, message))
			}}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- f.Run(ctx) }()
			return func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
		want := func(when string, events ...string) {
			t.Helper()
			synctest.Wait()
			ok := len(told) == len(events)
			for i := range min(len(told), len(events)) {
				ok = ok && strings.HasPrefix(told[i], events[i])
			}
			if !ok {
				t.Fatalf("%s: told %q, want %q", when, told, events)
			}
			told = nil
		}
		const none, again, conflict = "shop Warning NoHealthyBackend: none of the clusters east, west has a healthy backend since ", "shop Normal HealthyBackend: ", "shop Warning ConflictBetweenClusters: "
		well := backend("west", 2, "10.2.0.5")
		ends := well
		ends.Terminating = true
		put(t, tables, tables.Services, shop("east", 1, "100.64.0.9"), shop("west", 2, "100.64.64.9"))
		put(t, tables, tables.Backends, well)
		end := lead()
		time.Sleep(time.Minute)
		want("all is well")
		put(t, tables, tables.Backends, ends)
		time.Sleep(findingGrace - time.Millisecond)
		put(t, tables, tables.Backends, well)
		time.Sleep(time.Minute)
		want("it has passed")
		put(t, tables, tables.Backends, ends)
		time.Sleep(findingGrace)
		want("the only one terminates", none)
		remove(t, tables, tables.Backends, clustermesh.BackendKey(ends))
		time.Sleep(time.Minute)
		want("it is gone")
		put(t, tables, tables.Backends, well)
		want("it is back", again)
		remove(t, tables, tables.Backends, clustermesh.BackendKey(well))
		time.Sleep(findingGrace)
		want("gone another time", none)

		end()
		put(t, tables, tables.Services, shop("west", 2, "100.64.64.9", func(s *lb.Service) { s.Ports[0].Protocol = lb.UDP }))
		time.Sleep(time.Minute)
		want("nobody leads")
		end = lead()
		remove(t, tables, tables.Services, "west/default/shop")
		time.Sleep(findingGrace)
		want("another leads", "shop Warning NoHealthyBackend: cluster east has no healthy backend")
		put(t, tables, tables.Services, shop("west", 2, "100.64.64.9", func(s *lb.Service) { s.Ports[0].Port = 81 }))
		time.Sleep(findingGrace)
		want("the ports differ", none, conflict+"the port without a name is 80/TCP in cluster east and 81/TCP in cluster west")
		remove(t, tables, tables.Services, "east/default/shop")
		remove(t, tables, tables.Services, "west/default/shop")
		time.Sleep(time.Minute)
		want("there is no such service any more")
		end()
	})
}
