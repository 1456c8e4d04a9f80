package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newTestbedScenarioCommand(e *env) *cobra.Command {
	var check bool
	o := testbed.ScenarioOptions{}
	cmd := &cobra.Command{
		Use:   "scenario FILE",
		Short: "Run a scenario: what happens to some clusters, and what is expected then",
		Long: `Bring up the clusters that FILE describes, do what it says line by line, and stop at the first line whose
expectation is not met, with what there was instead. Then take everything down again. The language is in
docs/scenarios.md, examples are in testbed/testdata/scenarios; a scenario that shows a fault makes a good test.

Unless --dir says otherwise it has a test-bed of its own beside the one of "testbed up".

Exit codes:
  0    all was as expected
  1    something was not, or could not be done; the error names the line
  2    wrong usage
  130  interrupted`,
		Example: `  clustermesh testbed scenario testbed/testdata/scenarios/node-kill.txt
  clustermesh testbed scenario mine.txt --keep     and look around with: --dir ` + testbed.ScenarioDir + `
  clustermesh testbed scenario mine.txt --check    only whether it can be read`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("name the scenario's file: %s", cmd.UseLine())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			o.File = args[0]
			if cmd.Flags().Changed("dir") {
				o.Dir = testbedDir(cmd)
			}
			if check {
				return checkScenario(cmd, o)
			}
			return e.scenario(cmd, o)
		},
	}
	cmd.Flags().BoolVar(&o.Soak, "soak", false, "take the longer durations, where a step has one for a soak")
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "leave the test-bed up at the end")
	cmd.Flags().BoolVar(&check, "check", false, "read the scenario, and run nothing")
	return cmd
}

func checkScenario(cmd *cobra.Command, o testbed.ScenarioOptions) error {
	s, err := testbed.ReadScenario(o.File, o.Soak)
	if err == nil {
		fmt.Fprintf(cmd.OutOrStdout(), "%s can be run; steps: %d\n", s.Name, s.Steps())
	}
	return err
}

func (e *env) scenario(cmd *cobra.Command, o testbed.ScenarioOptions) error {
	p, began := e.printer(), e.now()
	o.Report = func(event testbed.ScenarioEvent) { printScenarioEvent(p, event) }
	err := testbed.RunScenario(cmd.Context(), o)
	switch {
	case err == nil:
		p.printf("\n%s: all was as expected (%.1fs)\n", filepath.Base(o.File), e.now().Sub(began).Seconds())
	case errors.Is(err, context.Canceled) && cmd.Context().Err() != nil:
		return &exitError{exitInterrupted, fmt.Errorf("interrupted: %w", err)}
	}
	return showLog(cmd, err)
}

// printScenarioEvent prints a step that is done on a line of its own.
func printScenarioEvent(p *printer, e testbed.ScenarioEvent) {
	if !e.Done {
		return
	}
	line, verdict := "", p.paint(green, "ok    ")
	if e.Line > 0 {
		line = fmt.Sprint(e.Line)
	}
	if e.Err != nil {
		verdict = p.paint(red, "FAILED")
	}
	detail := ""
	if e.Detail != "" {
		detail = p.paint(faint, "  "+e.Detail)
	}
	p.printf("%s %7s  %4s  %s%s\n", verdict, e.Took.Round(10*time.Millisecond), line, printable(e.Step), detail)
}
