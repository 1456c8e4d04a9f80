package http1

import (
	"net"
	"sync/atomic"
	"time"

	"causeway/lb/l7/balance"
)

// tunnel passes on the switch of protocols, and then whatever both sides say, each until it closes.
func (x *transfer) tunnel(u *upstream) balance.Outcome {
	c := x.c
	c.closing, c.cutting = true, true // When it is over, both sides have closed or are to see a reset.
	x.record.Status = x.ans.status
	first := x.answer.bytes()[len(x.ans.raw):]
	x.limit = time.Time{} // It is not one request any more.
	x.armTunnel()
	x.writeAnswer(first)
	before := x.in.bytes()[x.taken:]
	var in, out atomic.Int64
	out.Add(int64(len(first)))
	if _, err := c.conn.Write(x.out.bytes()); err != nil {
		return x.broken(u, errClientGone)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if len(before) > 0 {
			n, err := u.conn.Write(before)
			in.Add(int64(n))
			if err != nil {
				x.cutTunnel(u)
				return
			}
		}
		x.copyTunnel(&u.link, &c.link, u, &in)
	}()
	x.copyTunnel(&c.link, &u.link, u, &out)
	<-done
	x.record.Out, x.tunnelled = out.Load(), in.Load()
	x.taken += len(before)
	c.use(nil)
	u.close()
	return balance.Success
}

func (x *transfer) armTunnel() { x.c.arm(after(time.Now(), x.c.env.Limits.IdleTimeout), boundBoth) }

// copyTunnel copies one direction, and passes its end on.
func (x *transfer) copyTunnel(to, from *link, u *upstream, count *atomic.Int64) {
	c := x.c
	err := from.loop(func(fd uintptr) bool {
		b := takeBuffer(answerBuffer)
		defer b.release()
		for {
			n, err := from.tryRead(fd, b.b)
			if err == errAgain {
				return false
			}
			if err != nil {
				half, ok := to.conn.(*net.TCPConn)
				if !ok || half.CloseWrite() != nil {
					x.cutTunnel(u)
				}
				return true
			}
			if _, err := to.conn.Write(b.b[:n]); err != nil {
				x.cutTunnel(u)
				return true
			}
			count.Add(int64(n))
			if d := c.deadline.Load(); d > 0 {
				c.deadline.CompareAndSwap(d, time.Now().Add(c.env.Limits.IdleTimeout).UnixNano()&^3|int64(boundBoth))
			}
		}
	})
	if err != nil {
		x.cutTunnel(u)
	}
}

// cutTunnel ends both directions.
func (x *transfer) cutTunnel(u *upstream) {
	x.c.hard()
	u.hard()
	x.c.conn.SetDeadline(longAgo)
	u.conn.SetDeadline(longAgo)
}
