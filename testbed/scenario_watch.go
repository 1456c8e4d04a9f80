package testbed

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// watch looks again and again whether the conditions of a step hold, and fails the run if one does not.
type watch struct {
	step  step
	began time.Time
	stop  context.CancelFunc
	group sync.WaitGroup
	looks atomic.Int64
}

// watch begins to look. What is read at different costs is read at different intervals.
func (r *scenarioRun) watch(ctx context.Context, st step) *watch {
	ctx, stop := context.WithCancel(ctx)
	w := &watch{step: st, began: time.Now(), stop: stop}
	since := w.began
	for _, what := range []looks{lookKernels, lookViews, lookStatus} {
		var list []condition
		for _, c := range st.conditions {
			if c.needs == what {
				list = append(list, c)
			}
		}
		if len(list) > 0 {
			w.group.Go(func() { r.keepLooking(ctx, w, list, what, since) })
		}
	}
	return w
}

// end stops looking, after a last look, and says how often it was looked.
func (w *watch) end() string {
	w.stop()
	w.group.Wait()
	text := fmt.Sprintf("%d looks in %.1f s", w.looks.Load(), time.Since(w.began).Seconds())
	if d := time.Since(w.began); d >= time.Minute {
		// Of something that did not happen in a time t the rate is below 3/t with a certainty of 95 %.
		text += fmt.Sprintf("; 0 times in %v means less than once in %v, with a certainty of 95 %%", d.Round(time.Second), (d / 3).Round(time.Second))
	}
	return text
}

func (r *scenarioRun) keepLooking(ctx context.Context, w *watch, list []condition, what looks, since time.Time) {
	told := false
	for {
		next := time.Now().Add(intervalOf(what))
		ended := ctx.Err() != nil
		problem, silent := r.confirmed(context.WithoutCancel(ctx), w, list, what, since)
		told = told || !silent
		if ended && !told {
			problem = "no agent has ever told its view"
		}
		if problem != "" {
			r.fail(r.unexpected(w.step, fmt.Sprintf("%.2f s later %s", time.Since(w.began).Seconds(), problem)))
			return
		}
		if ended {
			return
		}
		_ = pause(ctx, time.Until(next))
	}
}

// confirmLooks in a row must show a problem: a listing of a map that is being written may miss an entry.
const confirmLooks = 3

// confirmed looks for a problem; silent is true if no agent has told its view. An agent that is being started, or a machine that
// is too busy to answer, is no news of others.
func (r *scenarioRun) confirmed(ctx context.Context, w *watch, list []condition, what looks, since time.Time) (problem string, silent bool) {
	for range confirmLooks {
		w.looks.Add(1)
		s := r.world.look(ctx, what)
		if what&lookViews != 0 && len(s.views) == 0 {
			return "", true
		}
		s.since = since
		if problem = firstProblem(list, s, false); problem == "" {
			return "", false
		}
		what |= lookAgain
	}
	return problem, false
}
