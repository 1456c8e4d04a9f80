package testbed

import (
	"fmt"
	"os"
	"strings"
)

// logTailLines is how much of a log a [ProcessError] shows.
const logTailLines = 15

// ProcessError is the failure of a process that the bed runs, with what that process last said.
type ProcessError struct {
	Err error
	// Log is the path of the process's output, Tail its last lines.
	Log  string
	Tail []string
}

func (e *ProcessError) Error() string {
	if len(e.Tail) == 0 {
		return fmt.Sprintf("%v (it said nothing in %s)", e.Err, e.Log)
	}
	return fmt.Sprintf("%v; it last said %q in %s", e.Err, e.Tail[len(e.Tail)-1], e.Log)
}

func (e *ProcessError) Unwrap() error { return e.Err }

// withLog adds what a process last said to an error about it.
func withLog(err error, log string) error {
	return &ProcessError{Err: err, Log: log, Tail: logTail(log, logTailLines)}
}

func logTail(path string, lines int) []string {
	b, err := os.ReadFile(path)
	text := strings.TrimRight(string(b), "\n")
	if err != nil || text == "" {
		return nil
	}
	all := strings.Split(text, "\n")
	return all[max(0, len(all)-lines):]
}
