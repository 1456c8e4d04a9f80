package kvstore

import (
	"log/slog"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// contact keeps what is known about the connection: whether it works, which store is at the
// other end and how far it has come. Every answer and every failure is told to it.
type contact struct {
	where string
	log   *slog.Logger
	// restored is called (without locks held) when contact was found again, or with another store.
	restored func()

	mu         sync.Mutex
	connected  bool
	ever       bool
	lostAt     time.Time
	last       time.Time
	err        string
	reconnects int
	position   position
	// generation is closed and made anew when the store turns out to be another one.
	generation chan struct{}
}

// position says which store answered, and how far it had come.
type position struct {
	clusterID uint64
	term      uint64
	revision  int64
}

func newContact(where string, log *slog.Logger, restored func()) *contact {
	return &contact{where: where, log: log, restored: restored, lostAt: time.Now(), generation: make(chan struct{}), err: "not reached yet"}
}

// before returns the position to hand to linearized after a request that starts now.
func (c *contact) before() position {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.position
}

// current returns a channel that is closed once the store is found to be another one.
func (c *contact) current() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation
}

// answered notes an answer of the store, of a request or a watch.
func (c *contact) answered(h *pb.ResponseHeader) {
	c.note(position{h.GetClusterId(), h.GetRaftTerm(), h.GetRevision()}, false)
}

// linearized notes the answer of a linearizable read that was begun at position before. Such
// a read can't return less than what was known when it began, unless the store
// was wiped or restored from a copy: with the same cluster ID too, so comparing that isn't enough.
func (c *contact) linearized(before position, h *pb.ResponseHeader) {
	now := position{h.GetClusterId(), h.GetRaftTerm(), h.GetRevision()}
	c.note(now, now.revision < before.revision || now.term < before.term)
}

func (c *contact) note(now position, wentBack bool) {
	c.mu.Lock()
	other := c.position.clusterID != 0 && (wentBack || now.clusterID != c.position.clusterID)
	if other {
		close(c.generation)
		c.generation = make(chan struct{})
		c.log.Warn("the store was wiped, restored or replaced; listing everything anew",
			"endpoint", c.where, "revision", now.revision, "revisionBefore", c.position.revision)
	}
	if other || c.position.clusterID == 0 {
		c.position = now
	} else {
		c.position.revision = max(c.position.revision, now.revision)
		c.position.term = max(c.position.term, now.term)
	}
	found := !c.connected
	if found {
		c.connected, c.err = true, ""
		c.logFound()
	}
	c.ever = true
	c.last = time.Now()
	c.mu.Unlock()
	if found || other {
		c.restored()
	}
}

func (c *contact) logFound() {
	if !c.ever {
		c.log.Info("connected to the store", "endpoint", c.where)
		return
	}
	c.reconnects++
	c.log.Info("the store is back", "endpoint", c.where, "away", time.Since(c.lostAt).Round(time.Millisecond))
}

// failed notes that the store could not be reached or did not answer.
func (c *contact) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = c.where + ": " + plainCause(err)
	if !c.connected {
		return
	}
	c.connected = false
	c.lostAt = time.Now()
	c.log.Warn("lost the store; going on with what is known", "endpoint", c.where, "err", plainCause(err))
}

func (c *contact) lastError() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fill sets the fields of s that contact knows.
func (c *contact) fill(s *Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Connected = c.connected
	s.LastContact = c.last
	s.LastError = c.err
	s.Revision = c.position.revision
	s.Reconnects = c.reconnects
}
