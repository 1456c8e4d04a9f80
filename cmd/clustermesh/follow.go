package main

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"time"
	"unicode/utf8"

	"causeway/agent/api"
)

// How long a stream may be silent before a person is told what is being waited for, and how long again after that.
const (
	silence      = time.Second
	silenceAgain = 5 * time.Second
)

// follow calls got with everything that a stream yields until it ends, and waiting, with the time since the beginning, when nothing has come for
// a while. The stream has ended when it returns.
func follow[T any](ctx context.Context, open func(context.Context) iter.Seq2[T, error], got func(T) error, waiting func(time.Duration)) error {
	type item struct {
		v   T
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	items := make(chan item)
	go func() {
		defer close(items)
		for v, err := range open(ctx) {
			select {
			case items <- item{v, err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	defer func() {
		cancel()
		for range items {
		}
	}()
	began := time.Now()
	timer := time.NewTimer(silence)
	defer timer.Stop()
	for {
		select {
		case it, ok := <-items:
			if !ok {
				return ctx.Err()
			}
			if it.err != nil {
				return it.err
			}
			if err := got(it.v); err != nil {
				return err
			}
			timer.Reset(silence)
		case <-timer.C:
			waiting(time.Since(began))
			timer.Reset(silenceAgain)
		}
	}
}

// checkWidth is that of the words before a check: its outcome, or the stage of a connect.
const checkWidth = 9

// checkWord returns the outcome of a check in a column of its own.
func (p *printer) checkWord(c *api.Check) string {
	switch c.Outcome {
	case "failed":
		return p.paint(red, pad("FAILED", checkWidth))
	case "skipped":
		return p.paint(yellow, pad("skipped", checkWidth))
	}
	return pad(c.Outcome, checkWidth)
}

// checkText says what was tried, how long it took and what came of it.
func checkText(c *api.Check) string {
	took := ""
	if c.Outcome != "skipped" {
		took = millis(c.Took)
	}
	return strings.TrimRight(fmt.Sprintf("%s  %s  %8s  %s", pad(c.Name, 15), pad(c.Target, 24), took, printable(c.Detail)), " ")
}

// millis returns milliseconds in the unit that suits them.
func millis(ms float64) string {
	if ms < 1000 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.1f s", ms/1000)
}

// direction of a check.
func direction(c *api.Check) string { return c.From + " → " + c.To }

// pad makes s printable, and fills it up with blanks.
func pad(s string, width int) string {
	s = printable(s)
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}
