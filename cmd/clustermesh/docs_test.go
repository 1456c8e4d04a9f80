package main

import (
	"io"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// commandLine matches a line of a document or an example that begins with one of our commands.
var commandLine = regexp.MustCompile(`(?m)^\s*(?:sudo )?(?:clustermesh|go run \./cmd/clustermesh) (.*)$`)

// explanation is what may follow a command on its line: a comment, words set off by blanks, another
// command that it is piped to.
var explanation = regexp.MustCompile(`(  +|\s#|\s[|<>]).*$`)

// continued is where a command goes on on the next line.
var continued = regexp.MustCompile(`\s*\\\n\s*`)

// TestCommandsInDocsAreValid has each command of the README and of every help's examples accepted by
// the command line's parser; it runs none.
func TestCommandsInDocsAreValid(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{"README.md": string(readme)}
	root, _ := newRootCommand(testEnv(io.Discard, io.Discard, nil))
	eachCommand(root, func(c *cobra.Command) { texts[c.CommandPath()+" --help"] = continued.ReplaceAllString(c.Example, " ") })
	n := 0
	for where, text := range texts {
		for _, m := range commandLine.FindAllStringSubmatch(text, -1) {
			args := strings.Fields(explanation.ReplaceAllString(m[1], ""))
			if err := accept(args); err != nil {
				t.Errorf("%s: clustermesh %s: %v", where, strings.Join(args, " "), err)
			}
			n++
		}
	}
	if n < 50 {
		t.Errorf("found only %d commands", n)
	}
}

func eachCommand(c *cobra.Command, visit func(*cobra.Command)) {
	visit(c)
	for _, sub := range c.Commands() {
		eachCommand(sub, visit)
	}
}

// accept parses a command line, as far as cobra does before the command runs.
func accept(args []string) error {
	root, _ := newRootCommand(testEnv(io.Discard, io.Discard, nil))
	cmd, rest, err := root.Find(args)
	if err != nil {
		return err
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	if err := cmd.ValidateRequiredFlags(); err != nil {
		return err
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}
