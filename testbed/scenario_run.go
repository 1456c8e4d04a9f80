package testbed

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"causeway/identity"
)

// world is what a scenario acts on and looks at: a bed, or a fake of one.
type world interface {
	// kill returns the moment just before anything was taken away.
	kill(context.Context, Victim) (time.Time, error)
	// start tells begun when the links are up, or the process is there, and returns when all is well.
	start(ctx context.Context, v Victim, begun func(time.Time)) error
	partition(context.Context, Partition) error
	lose(ctx context.Context, percent float64) error
	mtu(context.Context, PathMTU) error
	clock(ctx context.Context, place string, offset time.Duration) error
	heal(context.Context) error
	flap(context.Context, identity.NodeName, FlapOptions) error
	// runServer returns when the server is a backend on its own node.
	runServer(ctx context.Context, node identity.NodeName, name string) error
	deleteServer(ctx context.Context, name string) error
	// traffic sends requests from a cluster's client until stop, which returns nil if the client was killed.
	traffic(ctx context.Context, cluster string, rate float64) (stop func() (*LoadResult, error), err error)
	// look takes a sight, of what is asked for alone. Unless it is to be a new one, it may be half a kernelInterval old.
	look(context.Context, looks) *sight
}

// How often a bed is looked at, by what is looked at: reading nine kernels costs about 1 ms.
const (
	kernelInterval = 8 * time.Millisecond
	viewInterval   = 50 * time.Millisecond
	statusInterval = 100 * time.Millisecond
)

// ScenarioEvent tells that a step of a scenario begins, or how it ended.
type ScenarioEvent struct {
	// Line of the file; 0 for what is not in it.
	Line int
	// Step is the line's text.
	Step string
	Done bool
	Err  error
	// Detail says what came out of it.
	Detail string
	Took   time.Duration
}

// scenarioRun is a run of a scenario.
type scenarioRun struct {
	scenario *Scenario
	world    world
	report   func(ScenarioEvent)
	fail     context.CancelCauseFunc
	// since is when the last action took effect; faults are those that did.
	since   time.Time
	faults  []interval
	pending *pendingAction
	// watches of "from here on", not ended yet.
	watches []*watch
	sending map[string]func() (*LoadResult, error)
	traffic map[string]*LoadResult

	mu    sync.Mutex
	extra []string // servers that the scenario has run and not deleted
	churn *churn
}

// pendingAction has taken effect and goes on in the background.
type pendingAction struct {
	step step
	done chan error
}

// run does the steps of a scenario. The error is a *StepError, unless ctx has ended.
func (s *Scenario) run(ctx context.Context, w world, report func(ScenarioEvent)) (err error) {
	if report == nil {
		report = func(ScenarioEvent) {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r := &scenarioRun{
		scenario: s, world: w, report: report, fail: cancel, since: time.Now(),
		sending: map[string]func() (*LoadResult, error){}, traffic: map[string]*LoadResult{},
	}
	err = r.steps(ctx)
	// What a watch has seen comes before what it interrupted.
	var seen *StepError
	if cause := context.Cause(ctx); errors.As(cause, &seen) {
		err = seen
	}
	return errors.Join(err, r.end(err != nil))
}

func (r *scenarioRun) steps(ctx context.Context) error {
	steps := r.scenario.steps
	for len(steps) > 0 {
		n := 1
		// Expectations of the same moment are looked at together, so that none is late because of another.
		for steps[0].mode == within && n < len(steps) && steps[n].mode == within {
			n++
		}
		if err := r.together(ctx, steps[:n]); err != nil {
			return err
		}
		steps = steps[n:]
	}
	if err := r.join(ctx); err != nil {
		return err
	}
	return r.endWatches(ctx)
}

func (r *scenarioRun) together(ctx context.Context, steps []step) error {
	if steps[0].mode == within {
		return r.within(ctx, steps)
	}
	st, began := steps[0], time.Now()
	r.report(ScenarioEvent{Line: st.line, Step: st.text})
	detail, err := r.step(ctx, st)
	r.report(ScenarioEvent{Line: st.line, Step: st.text, Done: true, Err: err, Detail: detail, Took: time.Since(began)})
	return err
}

func (r *scenarioRun) step(ctx context.Context, st step) (detail string, err error) {
	switch st.mode {
	case doing:
		return "", r.act(ctx, st)
	case now:
		return "", r.now(ctx, st)
	case lasting:
		return r.lasting(ctx, st)
	case fromHere:
		r.watches = append(r.watches, r.watch(ctx, st))
		return "", nil
	}
	return "", r.endWatches(ctx)
}

// act does an action and returns when it has taken effect. What goes on then is waited for before the next action.
func (r *scenarioRun) act(ctx context.Context, st step) error {
	if err := r.join(ctx); err != nil {
		return err
	}
	from := time.Now()
	begun, done := make(chan time.Time, 1), make(chan error, 1)
	go func() {
		done <- st.action.do(ctx, r, func(at time.Time) { begun <- at })
	}()
	r.pending = &pendingAction{st, done}
	select {
	case r.since = <-begun:
	case err := <-done:
		r.pending = nil
		if err != nil {
			return r.stepError(ctx, st, err)
		}
		r.since = time.Now()
		select { // it has returned as well
		case r.since = <-begun:
		default:
		}
	}
	if st.action.fault {
		r.faults = append(r.faults, interval{from, r.since})
	}
	return nil
}

// join waits for an action that goes on in the background.
func (r *scenarioRun) join(ctx context.Context) error {
	if r.pending == nil {
		return nil
	}
	p := r.pending
	r.pending = nil
	if err := <-p.done; err != nil {
		return r.stepError(ctx, p.step, err)
	}
	return nil
}

// stepError says that a step could not be done, unless it was interrupted.
func (r *scenarioRun) stepError(ctx context.Context, st step, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return &StepError{File: r.scenario.Name, Line: st.line, Step: st.text, Err: err}
}

// unexpected says that a step's expectation was not met.
func (r *scenarioRun) unexpected(st step, actual string) *StepError {
	return &StepError{File: r.scenario.Name, Line: st.line, Step: st.text, Actual: actual}
}

// look takes a sight and adds what the run itself knows.
func (r *scenarioRun) look(ctx context.Context, what looks, since time.Time) *sight {
	s := r.world.look(ctx, what)
	s.since, s.traffic, s.faults = since, r.traffic, r.faults
	return s
}

// needs of several conditions.
func needs(list []condition) (all looks) {
	for _, c := range list {
		all |= c.needs
	}
	return all
}

// firstProblem returns that of the first condition that does not hold. In a strict sight an agent that does not answer is a problem.
func firstProblem(list []condition, s *sight, strict bool) string {
	if strict && len(s.silent) > 0 && needs(list)&lookViews != 0 {
		return "does not answer: " + s.silent[0]
	}
	for _, c := range list {
		if p := c.problem(s); p != "" {
			return p
		}
	}
	return ""
}

func (r *scenarioRun) now(ctx context.Context, st step) error {
	if p := firstProblem(st.conditions, r.look(ctx, needs(st.conditions), r.since), true); p != "" {
		return r.unexpected(st, p)
	}
	return nil
}

// lasting looks all the time for the step's duration.
func (r *scenarioRun) lasting(ctx context.Context, st step) (string, error) {
	w := r.watch(ctx, st)
	err := pause(ctx, st.duration)
	detail := w.end()
	if ctx.Err() != nil {
		return detail, context.Cause(ctx)
	}
	return detail, err
}

func (r *scenarioRun) endWatches(ctx context.Context) error {
	var detail string
	for _, w := range r.watches {
		detail = w.end()
		r.report(ScenarioEvent{Line: w.step.line, Step: w.step.text, Done: true, Detail: detail, Took: time.Since(w.began), Err: seenBy(ctx, w)})
	}
	r.watches = nil
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// seenBy returns the failure of the run if it is this watch's.
func seenBy(ctx context.Context, w *watch) error {
	var seen *StepError
	if errors.As(context.Cause(ctx), &seen) && seen.Line == w.step.line {
		return seen
	}
	return nil
}

// end lets nothing of the run go on.
func (r *scenarioRun) end(failed bool) error {
	for _, w := range r.watches {
		w.end()
	}
	if r.pending != nil {
		<-r.pending.done
	}
	err := r.stopChurn()
	for _, stop := range r.sending {
		_, stopErr := stop()
		err = errors.Join(err, stopErr)
	}
	if failed {
		return nil // that is what there is to say
	}
	return err
}

// within looks until the conditions of the steps have held, each once, in time after the last action.
func (r *scenarioRun) within(ctx context.Context, steps []step) error {
	var waiting []*awaited
	for _, st := range steps {
		r.report(ScenarioEvent{Line: st.line, Step: st.text})
		waiting = append(waiting, &awaited{step: st, left: st.conditions})
	}
	for {
		next := time.Now().Add(kernelInterval)
		for _, what := range []looks{lookKernels, lookViews, lookStatus} {
			if err := r.lookFor(ctx, waiting, what); err != nil {
				return err
			}
		}
		if allMet(waiting) {
			return nil
		}
		if err := pause(ctx, time.Until(next)); err != nil {
			return context.Cause(ctx)
		}
	}
}

// awaited is a step of which conditions have not held yet.
type awaited struct {
	step    step
	left    []condition
	problem string
	looked  map[looks]time.Time
}

func allMet(waiting []*awaited) bool {
	for _, a := range waiting {
		if len(a.left) > 0 {
			return false
		}
	}
	return true
}

// intervalOf says how often something is looked at.
func intervalOf(what looks) time.Duration {
	switch {
	case what&lookKernels != 0:
		return kernelInterval
	case what&lookViews != 0:
		return viewInterval
	}
	return statusInterval
}

// lookFor looks at one kind of thing, if anything waits for it and it is time, and settles what it tells.
func (r *scenarioRun) lookFor(ctx context.Context, waiting []*awaited, what looks) error {
	var s *sight
	for _, a := range waiting {
		if needs(a.left)&what == 0 || time.Since(a.looked[what]) < intervalOf(what) {
			continue
		}
		if s == nil {
			s = r.look(ctx, what, r.since)
		}
		if err := r.settle(ctx, a, what, s); err != nil {
			return err
		}
	}
	return nil
}

// settle takes off the conditions that a sight shows to hold, and fails a step whose time is over.
func (r *scenarioRun) settle(ctx context.Context, a *awaited, what looks, s *sight) error {
	if a.looked == nil {
		a.looked = map[looks]time.Time{}
	}
	a.looked[what] = time.Now()
	took := s.at.Sub(r.since)
	if took < 0 {
		return nil // it was seen before the last action
	}
	var left []condition
	for _, c := range a.left {
		if c.needs != what || took > a.step.duration {
			left = append(left, c)
		} else if p := firstProblem([]condition{c}, s, true); p != "" {
			left, a.problem = append(left, c), p
		}
	}
	a.left = left
	event := ScenarioEvent{Line: a.step.line, Step: a.step.text, Done: true, Took: took}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case len(left) == 0:
		event.Detail = fmt.Sprintf("after %.2f s", took.Seconds())
		r.report(event)
	case took > a.step.duration:
		if a.problem == "" {
			a.problem = fmt.Sprintf("%q was not looked at in time", left[0].text)
		}
		err := r.unexpected(a.step, fmt.Sprintf("after %v %s", a.step.duration, a.problem))
		event.Err = err
		r.report(event)
		return err
	}
	return nil
}
