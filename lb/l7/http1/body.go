package http1

import (
	"io"
	"net/http"
	"time"

	"causeway/lb/l7/balance"
)

// maxInforming is how many answers of 1xx may precede one.
const maxInforming = 64

// passInforming passes on answers of 1xx, and waits for the real one.
func (x *transfer) passInforming(u *upstream) error {
	for n := 0; x.ans.status < 200 && x.ans.status != http.StatusSwitchingProtocols; n++ {
		if n == maxInforming {
			return badStatus
		}
		if x.req.minor == 1 {
			request := x.out
			x.out = nil // It may have to be sent again.
			x.writeAnswer(nil)
			_, err := x.c.conn.Write(x.out.bytes())
			x.out.release()
			x.out = request
			if err != nil {
				return errClientGone
			}
		}
		x.answer.r += len(x.ans.raw)
		if err := u.next(); err != nil {
			return err
		}
	}
	if x.ans.status == http.StatusSwitchingProtocols && (!x.asksUpgrade() || x.ans.upgrade == nil) {
		return badSwitch
	}
	return nil
}

// pass the answer on whose head is there, and say what it was.
func (x *transfer) pass(e *balance.Endpoint, u *upstream) balance.Outcome {
	if x.ans.status == http.StatusSwitchingProtocols {
		return x.tunnel(u)
	}
	c := x.c
	part, err := x.beginBody()
	if err != nil {
		c.arm(time.Time{}, boundTry)
		c.use(nil)
		u.close()
		x.local(malformed.status, malformed.text)
		return balance.Failure
	}
	x.settleUpload()
	if x.req.closing || x.req.minor == 0 && !x.req.keepAlive || x.toEnd || x.uploading() || c.leaving() {
		c.closing = true
	}
	x.record.Status = x.ans.status
	x.answering()
	x.armBody(boundBoth)
	x.writeAnswer(part)
	if _, err := c.conn.Write(x.out.bytes()); err != nil {
		return x.broken(u, errClientGone)
	}
	if !x.bodyDone() {
		u.phase = phaseBody
		x.answer.release()
		x.answer = nil
		if err := u.run(); err != nil {
			return x.broken(u, err)
		}
	}
	x.countOut()
	c.arm(time.Time{}, boundTry)
	c.use(nil)
	if x.surplus || x.toEnd || x.ans.closing || x.ans.minor == 0 || !x.uploaded() {
		u.close()
	} else {
		u.keep(e, time.Now(), c.env.Limits.UpstreamIdle)
	}
	if unavailable(x.ans.status) {
		return balance.Failure
	}
	return balance.Success
}

// broken ends an answer that has begun and can't be completed.
func (x *transfer) broken(u *upstream, err error) balance.Outcome {
	c := x.c
	x.countOut()
	late := c.timedOut()
	x.awaitUploadOf(err)
	c.cutOff()
	c.use(nil)
	u.close()
	switch p, gone := x.uploadFault(); {
	case c.ctx.Err() != nil:
		x.record.Local = "proxy ends"
		return balance.Neutral
	case late:
		x.record.Local = "body timeout"
		if err == errClientGone {
			return balance.Neutral
		}
		return balance.Failure
	case err == errClientGone, p != nil, gone:
		x.record.Local = "client gone"
		return balance.Neutral
	}
	x.record.Local = failureOf(err).text
	return balance.Failure
}

// beginBody finds how the answer's body is framed (RFC 9112, 6.3), and returns what is there of it.
func (x *transfer) beginBody() ([]byte, *problem) {
	h := &x.ans
	part := x.answer.bytes()[len(h.raw):]
	x.left, x.toEnd = 0, false
	switch {
	case string(x.req.method) == http.MethodHead, h.status == http.StatusNoContent, h.status == http.StatusNotModified:
		h.chunked = false
	case h.chunked && h.minor == 0:
		return nil, badEncoding
	case h.chunked:
		x.strip = x.req.minor == 0
		x.toEnd = x.strip // For the client it ends with the connection.
		x.down = chunked{strip: x.strip}
	case h.length >= 0:
		x.left = h.length
	default:
		x.toEnd = true
	}
	n, kept, p := x.take(part)
	x.surplus = n < len(part)
	return part[:kept], p
}

// take the next bytes of the answer's body: n are its, of which kept are passed on, from p's beginning.
func (x *transfer) take(p []byte) (n, kept int, err *problem) {
	switch {
	case x.ans.chunked:
		n, err = x.down.feed(p)
		if x.strip {
			return n, x.down.kept, err
		}
		return n, n, err
	case x.toEnd:
		x.record.Out += int64(len(p))
		return len(p), len(p), nil
	default:
		n = int(min(int64(len(p)), x.left))
		x.left -= int64(n)
		x.record.Out += int64(n)
		return n, n, nil
	}
}

func (x *transfer) bodyDone() bool {
	if x.ans.chunked {
		return x.down.done()
	}
	return !x.toEnd && x.left == 0
}

func (x *transfer) countOut() {
	if x.ans.chunked {
		x.record.Out = x.down.data
	}
}

// copyBody passes on what there is of the answer's body, and returns whether that was all.
func (u *upstream) copyBody(fd uintptr) bool {
	x := u.x
	c := x.c
	size := bodyBuffer
	if c.env.Limits.Buffer > 0 {
		size = c.env.Limits.Buffer
	}
	if !x.ans.chunked && !x.toEnd {
		size = int(min(int64(size), x.left))
	}
	b := takeBuffer(size)
	defer b.release()
	for {
		into := b.b[:min(size, len(b.b))]
		if !x.ans.chunked && !x.toEnd {
			into = into[:min(int64(len(into)), x.left)]
		}
		n, err := u.tryRead(fd, into)
		switch {
		case err == errAgain:
			return false
		case err == io.EOF && x.toEnd && !x.ans.chunked:
			return true
		case err == io.EOF:
			u.err = errEarly
			return true
		case err != nil:
			u.err = err
			return true
		}
		taken, kept, p := x.take(into[:n])
		if _, err := c.conn.Write(into[:kept]); err != nil {
			u.err = errClientGone
			return true
		}
		if p != nil {
			u.err = p
			return true
		}
		x.touch()
		if x.bodyDone() {
			x.surplus = taken < n
			return true
		}
	}
}

// armBody bounds the time in which nothing moves, and the request as a whole.
func (x *transfer) armBody(b bound) {
	x.c.arm(x.bodyLimit(), b)
}

func (x *transfer) bodyLimit() time.Time {
	if d := x.c.env.Limits.BodyTimeout; d > 0 {
		return sooner(x.limit, time.Now().Add(d))
	}
	return x.limit
}

// touch: something has moved. It does not bring back a deadline that has passed.
func (x *transfer) touch() {
	c := x.c
	d := c.deadline.Load()
	at := x.bodyLimit()
	if d != fired && !at.IsZero() {
		c.deadline.CompareAndSwap(d, at.UnixNano()&^3|int64(boundBoth))
	}
}
