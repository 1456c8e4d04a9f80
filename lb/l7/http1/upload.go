package http1

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// upload copies the rest of a request's body to a backend while the answer is awaited or passed on.
type upload struct {
	done chan struct{}
	last atomic.Bool // the body's last bytes are being sent
	left int64       // of a body with a length

	// Of the time after done:
	complete bool
	problem  *problem // the client's body is malformed
	gone     bool     // the client has closed
	rest     []byte   // what the client sent behind the body

	answering bool // under conn.mu: an answer is passed on
}

// uploads: there is a body to copy that is not being copied yet.
func (x *transfer) uploads() bool { return !x.whole && x.up == nil }

func (x *transfer) startUpload(u *upstream) {
	x.up = &upload{done: make(chan struct{})}
	if !x.req.chunked {
		x.up.left = x.req.length - int64(x.taken-len(x.req.raw))
	}
	go x.upload(u)
}

func (x *transfer) upload(u *upstream) {
	up := x.up
	defer close(up.done)
	err := x.c.loop(func(fd uintptr) bool { return x.uploadMore(fd, u) })
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		up.gone = true
	}
	if up.problem != nil || up.gone {
		u.conn.Close() // The backend must not take what it has got for the whole, and an answer is of no use any more.
	}
	if up.complete {
		x.uploadedAll()
	}
}

// uploadMore copies what there is, and returns whether that was all.
func (x *transfer) uploadMore(fd uintptr, u *upstream) bool {
	up, c := x.up, x.c
	b := takeBuffer(bodyBuffer)
	defer b.release()
	for {
		into := b.b
		if !x.req.chunked {
			into = into[:min(int64(len(into)), up.left)]
		}
		n, err := c.tryRead(fd, into)
		switch {
		case err == errAgain:
			return false
		case err != nil:
			up.gone = true
			return true
		}
		taken := n
		if x.req.chunked {
			if taken, up.problem = x.coding.feed(into[:n]); up.problem != nil {
				return true
			}
			up.complete = x.coding.done()
		} else {
			up.left -= int64(n)
			up.complete = up.left == 0
		}
		if up.complete && taken < n {
			up.rest = append([]byte(nil), into[taken:n]...)
		}
		if up.complete {
			up.last.Store(true)
		}
		if _, err := u.conn.Write(into[:taken]); err != nil {
			up.complete = false
			return true // The backend wants no more; it may have answered.
		}
		x.touch()
		if up.complete {
			return true
		}
	}
}

// uploadedAll: from now on it is the backend that is waited for.
func (x *transfer) uploadedAll() {
	c := x.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if x.up.answering {
		return
	}
	at := x.limit
	if try := c.client.Port.Route().Options.TryTimeout; try > 0 {
		at = sooner(at, time.Now().Add(try))
	}
	d, to := c.deadline.Load(), unbounded
	if !at.IsZero() {
		to = at.UnixNano()&^3 | int64(boundTry)
	}
	if d != fired {
		c.deadline.CompareAndSwap(d, to)
	}
}

// answering: an answer is passed on from now on.
func (x *transfer) answering() {
	if x.up != nil {
		x.c.mu.Lock()
		x.up.answering = true
		x.c.mu.Unlock()
	}
}

// lastWait is how long an answer waits for the end of sending what it may be the answer to.
const lastWait = 10 * time.Millisecond

// settleUpload gives the upload time to see that it is over, as an answer may come before that does.
func (x *transfer) settleUpload() {
	if x.up == nil || !x.up.last.Load() {
		return
	}
	timer := time.NewTimer(lastWait)
	defer timer.Stop()
	select {
	case <-x.up.done:
	case <-timer.C:
	}
}

// uploading: the request's body is not yet sent.
func (x *transfer) uploading() bool { return !x.uploaded() }

// uploaded: the backend has got the whole request.
func (x *transfer) uploaded() bool {
	if x.up == nil {
		return x.whole
	}
	select {
	case <-x.up.done:
		return x.up.complete
	default:
		return false
	}
}

// uploadFault says whether the client's body is why a request failed.
func (x *transfer) uploadFault() (malformed *problem, gone bool) {
	if x.up == nil {
		return nil, false
	}
	select {
	case <-x.up.done:
		return x.up.problem, x.up.gone
	default:
		return nil, false
	}
}

// awaitUploadOf waits for the upload's end if that is what has closed the connection to the backend.
func (x *transfer) awaitUploadOf(err error) {
	if x.up != nil && errors.Is(err, net.ErrClosed) {
		<-x.up.done
	}
}

// stopUpload ends what is not ended yet, and returns what the client has sent behind the body.
func (x *transfer) stopUpload() []byte {
	if x.up == nil {
		return nil
	}
	select {
	case <-x.up.done:
	default:
		x.c.closing = true
		x.c.conn.SetReadDeadline(longAgo)
		<-x.up.done
	}
	return x.up.rest
}

func (x *transfer) countIn() {
	switch {
	case x.tunnelled > 0:
		x.record.In = x.tunnelled
	case x.req.chunked:
		x.record.In = x.coding.data
	case x.up != nil:
		x.record.In = x.req.length - x.up.left
	default:
		x.record.In = int64(x.taken - len(x.req.raw))
	}
}
