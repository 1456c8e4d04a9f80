package http1

import (
	"errors"
	"io"
)

// phase of a request on a connection to a backend.
type phase uint8

const (
	phaseSend   phase = iota // the request is to be sent
	phaseAnswer              // a head of an answer is awaited
	phaseBody                // the rest of a body is copied
)

var (
	// errStale: a kept connection was closed, or had said something unasked, before anything was sent on it.
	errStale = errors.New("the kept connection was closed")
	// errEarly: the backend has closed before its answer was complete.
	errEarly = errors.New("the backend closed early")
	// errClientGone: the client can't be written to.
	errClientGone = errors.New("the client is gone")
)

// ask sends a request, or as much of it as there is, and waits for an answer's head, which x.answer has then.
func (u *upstream) ask(x *transfer, request []byte) error {
	u.x, u.request, u.sent, u.err = x, request, 0, nil
	u.phase = phaseSend
	return u.run()
}

// next waits for the next head of an answer.
func (u *upstream) next() error {
	u.phase = phaseAnswer
	if done, err := u.parse(0); done || err != nil {
		return err
	}
	return u.run()
}

func (u *upstream) run() error {
	if err := u.loop(u.step); err != nil && u.err == nil {
		u.err = err
	}
	return u.err
}

// readable is called when there may be something to read, and returns whether the phase is over.
func (u *upstream) readable(fd uintptr) bool {
	switch u.phase {
	case phaseSend:
		if u.used && !quiet(fd) {
			u.err = errStale
			return true
		}
		// What comes from here on is noticed by the poller, so that there is no need to look before it says so.
		if err := u.send(); err != nil {
			if u.sent == 0 {
				u.err = err
				return true
			}
			// It may have answered before it closed.
		} else if u.x.uploads() {
			u.x.startUpload(u)
		}
		u.phase = phaseAnswer
		return u.sent < len(u.request) && u.readAnswer(fd)
	case phaseAnswer:
		return u.readAnswer(fd)
	default:
		return u.copyBody(fd)
	}
}

func (u *upstream) send() error {
	n, err := u.conn.Write(u.request)
	u.sent = n
	return err
}

// readAnswer reads what there is, until it is a whole head.
func (u *upstream) readAnswer(fd uintptr) bool {
	x := u.x
	for {
		if x.answer == nil {
			x.answer = takeBuffer(answerBuffer)
		}
		n, err := u.tryRead(fd, x.answer.space())
		if err == errAgain {
			if x.answer.len() == 0 {
				x.answer.release()
				x.answer = nil
			}
			return false
		}
		if err != nil {
			u.err = err
			if err == io.EOF {
				u.err = errEarly
			}
			return true
		}
		seen := x.answer.len()
		x.answer.w += n
		done, err := u.parse(seen)
		if err != nil {
			u.err = err
		}
		if done || err != nil {
			return true
		}
	}
}

// parse the head that the answer begins with, if it is there as a whole; seen bytes were looked at before.
func (u *upstream) parse(seen int) (bool, error) {
	x := u.x
	if x.answer == nil || x.answer.len() == 0 {
		return false, nil
	}
	limits := &x.c.env.Limits
	end, p := findHead(x.answer.bytes(), seen)
	switch {
	case p != nil:
		return false, p
	case end == 0:
		if limits.HeaderBytes > 0 && x.answer.len() >= limits.HeaderBytes {
			return false, largeHead
		}
		if len(x.answer.space()) == 0 {
			x.answer = x.answer.grown(x.answer.len() + answerBuffer)
		}
		return false, nil
	case limits.HeaderBytes > 0 && end > limits.HeaderBytes:
		return false, largeHead
	}
	if p := x.ans.parseAnswer(x.answer.bytes()[:end], limits.HeaderFields); p != nil {
		return false, p
	}
	return true, nil
}
