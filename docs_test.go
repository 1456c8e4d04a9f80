package causeway_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

var (
	link     = regexp.MustCompile(`\]\(([^)#]+)`)
	fileName = regexp.MustCompile("`([a-z0-9_./-]+\\.(?:go|c|h|md|yml))`")

	testFunction = regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	testName     = regexp.MustCompile("`(Test[A-Z][^`]*)`")
)

// TestDocsNameWhatExists follows the links of the documentation, and looks for the files that it names.
func TestDocsNameWhatExists(t *testing.T) {
	docs, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range append(docs, "README.md") {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(doc), m[1])); err != nil {
				t.Errorf("%s links to %s, which does not exist", doc, m[1])
			}
		}
		for _, m := range fileName.FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(m[1]); err != nil {
				t.Errorf("%s names %s, which does not exist", doc, m[1])
			}
		}
	}
}

// TestServicesTestsExist looks for the tests that docs/services.md names as `TestName/subtest/…`: the function is in one package alone, and each part of the subtest's name is a string of its tests.
func TestServicesTestsExist(t *testing.T) {
	functions, texts := map[string][]string{}, map[string]string{} // packages by function, tests' texts by package
	err := filepath.WalkDir(".", func(file string, e fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(file, "_test.go") {
			return err
		}
		text, err := os.ReadFile(file)
		folder := filepath.Dir(file)
		texts[folder] += string(text)
		for _, m := range testFunction.FindAllStringSubmatch(string(text), -1) {
			functions[m[1]] = append(functions[m[1]], folder)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("docs/services.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(doc)) {
		row, named := strings.HasPrefix(line, "| ") && !strings.HasSuffix(line, "| tests |\n"), testName.FindAllStringSubmatch(line, -1)
		if row && len(named) == 0 {
			t.Errorf("no test shows %s", line)
		}
		for _, m := range named {
			parts := strings.Split(m[1], "/")
			in := functions[parts[0]]
			if len(in) != 1 {
				t.Errorf("%s is in the packages %q, want one", parts[0], in)
				continue
			}
			for _, part := range parts[1:] {
				if !strings.Contains(texts[in[0]], strconv.Quote(part)) {
					t.Errorf("%s: the tests of %s have no subtest %q", m[1], in[0], part)
				}
			}
		}
	}
}
