package http1

import (
	"errors"
	"net/http"
	"time"

	"causeway/lb/l7/balance"
)

// safe to repeat: the method is idempotent (RFC 9110, 9.2.2) and the body is there to be sent again.
func (x *transfer) safe() bool {
	if !x.whole {
		return false
	}
	switch string(x.req.method) {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// run sends the request to a backend, to others if that is in vain and may be repeated, and passes an answer on.
func (x *transfer) run() {
	c, port := x.c, x.c.client.Port
	options := &port.Route().Options
	x.limit = after(x.record.Began, options.Timeout)
	fresh := false
	for tries := 0; ; tries++ {
		e := x.next
		x.next = nil
		if e == nil {
			var err error
			if e, err = port.Pick(&x.query); err != nil {
				x.giveUp()
				return
			}
		}
		x.record.Endpoint = e
		x.record.Retries = tries
		e.Begin()
		u, err := c.connect(e, fresh, x.waitLimit(options.TryTimeout))
		if err != nil {
			if !x.connectAgain(e, err) {
				return
			}
			continue
		}
		c.use(u)
		x.armTry(options.TryTimeout)
		if x.safe() && !e.Target().Quarantined {
			c.asked.Store(e)
		}
		if err = u.ask(x, x.out.bytes()); err == nil {
			err = x.passInforming(u)
		}
		c.asked.Store(nil)
		if err == nil {
			if x.answerAgain(e, u) {
				continue
			}
			e.End(x.pass(e, u))
			return
		}
		again, stale := x.askAgain(e, u, err)
		if !again {
			return
		}
		// A kept connection that was closed says that its like may be, too.
		fresh = fresh || stale
	}
}

// giveUp answers why there is no backend to turn to.
func (x *transfer) giveUp() {
	f := x.failed
	if f == nil {
		f = noBackend
	}
	x.local(f.status, f.text)
}

func (x *transfer) waitLimit(try time.Duration) time.Time {
	if try <= 0 && x.limit.IsZero() {
		try = x.c.env.Limits.BodyTimeout
	}
	if try <= 0 {
		return x.limit
	}
	return sooner(x.limit, time.Now().Add(try))
}

// armTry bounds the wait for an answer. While the request's body is under way, it is bounded only to move.
func (x *transfer) armTry(try time.Duration) {
	if !x.whole {
		x.armBody(boundBoth)
		return
	}
	at := x.limit
	if try > 0 {
		at = sooner(at, time.Now().Add(try))
	}
	x.c.arm(at, boundTry)
}

// connectAgain: a request that could not be sent is sent to another endpoint in any case.
func (x *transfer) connectAgain(e *balance.Endpoint, err error) bool {
	c := x.c
	if c.ctx.Err() != nil {
		e.End(balance.Neutral)
		x.record.Local = "proxy ends"
		c.cutOff()
		return false
	}
	x.failed = connectFailed
	outcome := balance.Failure
	if errors.Is(err, errOverflow) {
		x.failed, outcome = overflow, balance.Neutral
	}
	e.End(outcome)
	x.query.Tried = append(x.query.Tried, e)
	if !x.limit.IsZero() && time.Now().After(x.limit) {
		x.failed = tooLate
		x.giveUp()
		return false
	}
	return true
}

// askAgain says whether a request is sent again that no answer came to, or a wrong one; stale: because a kept connection was closed. If not, it has answered the client.
func (x *transfer) askAgain(e *balance.Endpoint, u *upstream, err error) (again, stale bool) {
	c := x.c
	late := c.timedOut()
	x.awaitUploadOf(err)
	began := x.answer != nil && x.answer.len() > 0 || x.record.Status != 0
	untouched := u.sent == 0
	c.arm(time.Time{}, boundTry)
	c.use(nil)
	u.close()
	x.answer.release()
	x.answer = nil
	if c.ctx.Err() != nil || errors.Is(err, errClientGone) {
		e.End(balance.Neutral)
		x.record.Local = "client gone"
		if c.ctx.Err() != nil {
			x.record.Local = "proxy ends"
		}
		c.cutOff()
		return false, false
	}
	if p, gone := x.uploadFault(); p != nil || gone {
		e.End(balance.Neutral)
		if p != nil {
			x.local(p.status, p.text)
		} else {
			x.record.Local = "client gone"
			c.cutOff()
		}
		return false, false
	}
	if errors.Is(err, errStale) || !late && !began && u.used && (untouched || x.safe()) {
		e.End(balance.Neutral)
		return true, true
	}
	e.End(balance.Failure)
	x.failed = failureOf(err)
	if late {
		x.failed = tooLate
		if x.uploading() {
			x.failed = &failure{http.StatusRequestTimeout, "body timeout"}
		}
	}
	inTime := x.limit.IsZero() || time.Now().Before(x.limit)
	if !began && x.failed != malformed && inTime && x.safe() && x.mayRepeat() {
		x.query.Tried = append(x.query.Tried, e)
		return true, false
	}
	x.giveUp()
	return false, false
}

// answerAgain says whether an answer is dropped because another backend may have a better one.
func (x *transfer) answerAgain(e *balance.Endpoint, u *upstream) bool {
	c, port := x.c, x.c.client.Port
	if !unavailable(x.ans.status) || !x.safe() || !x.mayRepeat() {
		return false
	}
	x.query.Tried = append(x.query.Tried, e)
	next, err := port.Pick(&x.query)
	if err != nil {
		return false // This is the best answer that there is.
	}
	x.next = next
	x.failed = nil
	c.arm(time.Time{}, boundTry)
	c.use(nil)
	u.close()
	e.End(balance.Failure)
	x.answer.release()
	x.answer = nil
	return true
}

// mayRepeat takes one more try from the port's budget.
func (x *transfer) mayRepeat() bool {
	if !x.c.client.Port.Retry(x.again + 1) {
		return false
	}
	x.again++
	return true
}

func unavailable(status int) bool {
	return status == http.StatusBadGateway || status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout
}
