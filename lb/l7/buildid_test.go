package l7_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"causeway/lb/l7"
)

// TestBuildIDTellsProgramsApart: also if the linker was told to say nothing of them, and wherever they are.
func TestBuildIDTellsProgramsApart(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	ids := map[string]string{}
	for name, how := range map[string]struct {
		text  string
		flags []string
	}{
		"one":           {text: "one"},
		"other":         {text: "other"},
		"one, unsaid":   {text: "one", flags: []string{"-ldflags=-buildid="}},
		"other, unsaid": {text: "other", flags: []string{"-ldflags=-buildid="}},
	} {
		if err := os.WriteFile(source, []byte("package main\n\nfunc main() { println(\""+how.text+"\") }\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		program := filepath.Join(dir, name)
		if out, err := exec.Command("go", append(append([]string{"build", "-o", program}, how.flags...), source)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		id, err := l7.BuildIDOf(program)
		if err != nil {
			t.Fatal(err)
		}
		copied := program + " again"
		if err := os.Rename(program, copied); err != nil {
			t.Fatal(err)
		}
		if again, err := l7.BuildIDOf(copied); err != nil || again != id {
			t.Errorf("%s: at another place it is %s (%v), not %s", name, again, err, id)
		}
		if same, ok := ids[id]; ok {
			t.Errorf("%s has the ID of %s", name, same)
		}
		ids[id] = name
	}
	if _, err := l7.BuildIDOf(filepath.Join(dir, "none")); err == nil {
		t.Error("a program that is not there has an ID")
	}
}
