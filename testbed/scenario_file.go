package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// ScenarioDir is the directory of the test-bed that scenarios run on.
const ScenarioDir = "/run/causeway/scenario"

// ScenarioOptions say which scenario to run, and how.
type ScenarioOptions struct {
	// File in the language of docs/scenarios.md.
	File string
	// Dir of the scenario's own bed; empty: [ScenarioDir].
	Dir string
	// Soak takes the longer ones of the scenario's durations.
	Soak bool
	// Keep leaves the bed up at the end.
	Keep bool
	// Report, if set, is told what goes on, one call at a time.
	Report func(ScenarioEvent)
}

// ReadScenario is [ParseScenario] of a file.
func ReadScenario(file string, soak bool) (*Scenario, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return ParseScenario(filepath.Base(file), text, soak)
}

// RunScenario runs a scenario on a bed of its own, which is gone afterwards whatever happens, unless it is to be kept. The
// error is a [*StepError] if a step failed.
func RunScenario(ctx context.Context, o ScenarioOptions) error {
	s, err := ReadScenario(o.File, o.Soak)
	if err != nil {
		return err
	}
	if o.Dir == "" {
		o.Dir = ScenarioDir
	}
	if o.Report == nil {
		o.Report = func(ScenarioEvent) {}
	}
	var bed *Bed
	err = reported(o.Report, fmt.Sprintf("bring up %s of %d nodes", s.Setup.Clusters, s.Setup.Nodes), func() (err error) {
		bed, err = Up(ctx, Options{Dir: o.Dir, Clusters: s.Setup.clusters(), Nodes: s.Setup.Nodes, Ephemeral: !o.Keep})
		return err
	})
	if err != nil {
		return err
	}
	err = s.on(ctx, bed, o.Report)
	if o.Keep {
		return err
	}
	// Also when ctx has ended: Ctrl-C must not leave anything.
	return errors.Join(err, reported(o.Report, "take everything down", func() error { return bed.Down(context.WithoutCancel(ctx)) }))
}

// on puts the scenario's service on a fresh bed and runs the scenario.
func (s *Scenario) on(ctx context.Context, bed *Bed, report func(ScenarioEvent)) error {
	var w *bedWorld
	err := reported(report, fmt.Sprintf("run %s on every node", s.Setup.Service), func() (err error) {
		w, err = newBedWorld(ctx, bed, s.Setup)
		return err
	})
	if err != nil {
		return err
	}
	began := time.Now()
	if err := s.run(ctx, w, report); err != nil {
		return errors.Join(w.explain(err, began), w.close())
	}
	return w.close()
}

// explain adds what the agents have complained about since, which may be gone with the bed.
func (w *bedWorld) explain(err error, since time.Time) error {
	for _, n := range w.nodes() {
		for _, line := range complaints(w.bed.AgentLog(n.Cluster, n.Node)) {
			if loggedAt(line).Before(since) {
				continue
			}
			err = fmt.Errorf("%w\n  %v: %s", err, n, line)
		}
	}
	return err
}

// loggedAt returns the time of a line of an agent's log; the zero time if it has none.
func loggedAt(line string) time.Time {
	text, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
	at, _ := time.Parse(time.RFC3339Nano, text)
	return at
}

// reported does what is not in a scenario's file and reports it as a step.
func reported(report func(ScenarioEvent), text string, do func() error) error {
	began := time.Now()
	report(ScenarioEvent{Step: text})
	err := do()
	report(ScenarioEvent{Step: text, Done: true, Err: err, Took: time.Since(began)})
	return err
}
