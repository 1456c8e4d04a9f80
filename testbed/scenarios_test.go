package testbed

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// soaking takes the longer ones of the scenarios' durations; see: go tool task soak.
var soaking = os.Getenv("CAUSEWAY_SOAK") == "1"

// TestScenarios runs the files of testdata/scenarios, each as a test of its name, with the program that users run. Those on
// alike beds share one, as long as each leaves it as it was.
func TestScenarios(t *testing.T) {
	needRoot(t)
	program, err := realBinary()
	if err != nil {
		t.Fatal(err)
	}
	beds := &sharedBeds{T: t, program: program}
	for _, file := range scenarioFiles(t) {
		t.Run(file.Name, func(t *testing.T) {
			// A bed that did not come back to be well is of no use to the next.
			if !t.Run("run", func(t *testing.T) { beds.run(t, file) }) || !t.Run("restore", func(t *testing.T) { beds.restore(t, file) }) {
				beds.drop(file.Setup)
			}
		})
	}
	beds.dropAll()
}

func scenarioFiles(t *testing.T) (list []*Scenario) {
	t.Helper()
	files, err := filepath.Glob("testdata/scenarios/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios, %v", err)
	}
	for _, file := range files {
		s, err := ReadScenario(file, soaking)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, s)
	}
	return list
}

// sharedBeds has a bed for each setup that scenarios ask for.
type sharedBeds struct {
	*testing.T
	program string
	worlds  map[Setup]*bedWorld
}

func (s *sharedBeds) world(t *testing.T, setup Setup) *bedWorld {
	t.Helper()
	if w := s.worlds[setup]; w != nil {
		return w
	}
	// Its directory is removed when all scenarios have run.
	bed := mustUp(s.T, Options{Dir: bedDir(s.T), Clusters: setup.clusters(), Nodes: setup.Nodes, Binary: s.program})
	w, err := newBedWorld(t.Context(), bed, setup)
	if err != nil {
		t.Fatal(err)
	}
	if s.worlds == nil {
		s.worlds = map[Setup]*bedWorld{}
	}
	s.worlds[setup] = w
	return w
}

func (s *sharedBeds) run(t *testing.T, scenario *Scenario) {
	w, began := s.world(t, scenario.Setup), time.Now()
	err := scenario.run(t.Context(), w, func(e ScenarioEvent) {
		if e.Done {
			t.Logf("%3d  %-80s %6.2fs  %s", e.Line, e.Step, e.Took.Seconds(), e.Detail)
		}
	})
	if err != nil {
		t.Error(w.explain(err, began))
	}
}

func (s *sharedBeds) restore(t *testing.T, scenario *Scenario) {
	if err := s.worlds[scenario.Setup].restore(t.Context(), scenario); err != nil {
		t.Errorf("the bed does not come back to be well after %s: %v", scenario.Name, err)
	}
}

func (s *sharedBeds) drop(setup Setup) {
	w := s.worlds[setup]
	if w == nil {
		return
	}
	delete(s.worlds, setup)
	if err := w.close(); err != nil {
		s.Error(err)
	}
	if err := w.bed.Down(s.Context()); err != nil {
		s.Error(err)
	}
}

func (s *sharedBeds) dropAll() {
	for setup := range s.worlds {
		s.drop(setup)
	}
}
