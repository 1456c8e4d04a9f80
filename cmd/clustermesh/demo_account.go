package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"causeway/testbed"
)

// account tells what the demo does while it does it: a line for each step, with its time. On a
// terminal the line is there from the step's beginning.
type account struct {
	mu   sync.Mutex
	p    *printer
	live bool
	open bool // a line has begun and not ended
}

func (a *account) step(e testbed.DemoEvent) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e.Done {
		a.done(e)
	} else if a.live {
		a.begin(e)
	}
}

// begin writes the line of a step that is going on, perhaps again.
func (a *account) begin(e testbed.DemoEvent) {
	a.clear()
	text := e.Step + " …"
	if e.Detail != "" {
		text += " " + e.Detail
	}
	a.p.printf("%10s%s", "", text)
	a.open = true
}

// done writes the line of a step that has ended.
func (a *account) done(e testbed.DemoEvent) {
	a.clear()
	text := e.Step
	switch {
	case errors.Is(e.Err, context.Canceled):
		text = "not done: " + text
	case e.Err != nil:
		text = a.p.paint(red, "failed: ") + text
	}
	a.p.printf("%7.1fs  %s\n", e.Took.Seconds(), text)
	if e.Detail != "" && e.Err == nil {
		a.p.printf("%10s%s\n", "", a.p.paint(faint, e.Detail))
	}
}

// clear takes away a line that has begun and not ended.
func (a *account) clear() {
	if a.open {
		a.p.printf("\r\x1b[K")
		a.open = false
	}
}

// interrupted is called when the demo was told to end early.
func (a *account) interrupted() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clear()
	a.p.printf("%10sinterrupted: everything is taken down\n", "")
}

// summary says at the end what was shown.
func (a *account) summary(r testbed.DemoResult, took time.Duration) {
	a.p.printf("\nWho answered whom:\n\n")
	a.p.table(trafficTable(r.Traffic))
	a.p.printf("\nShown in %.0f s: %d pods on %d nodes of %d clusters as one network, one service with servers in both.\n",
		took.Seconds(), r.Pods, r.Nodes, r.Clusters)
	a.p.printf("It answered %.1f s after the start, and every request of every phase after that.\n", float64(r.SetupMS)/1000)
	a.p.printf("A new endpoint of west was in east's kernel within %.1f ms (p50), %.1f ms (p99).\n", r.Propagation.P50, r.Propagation.P99)
}

func trafficTable(traffic []testbed.DemoTraffic) *table {
	t := newTable("PHASE", "CLIENT", "REQUESTS", "FAILED", "BY EAST", "BY WEST")
	for _, row := range traffic {
		t.add(row.Phase, fmt.Sprintf("in %s", row.Client), row.Requests, row.Failed, row.By["east"], row.By["west"])
	}
	return t
}
