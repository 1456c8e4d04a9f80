package kvstore

import (
	"fmt"
	"log/slog"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// contact keeps what is known about the connection: whether it works, which store is at the
// other end and how far it has come. Every answer and every failure is told to it.
type contact struct {
	where string
	user  func() string // that of the certificate we show, for messages
	log   *slog.Logger
	// restored is called (without locks held) when contact was found again, or with another store.
	restored func()

	mu        sync.Mutex
	connected bool
	ever      bool
	lostAt    time.Time
	last      time.Time
	err       string
	denied    bool // err is that the store does not let us read
	// admitted is closed and made anew when that is over.
	admitted chan struct{}
	// watches are those that there is something to say of.
	watches    map[*watch]watchNote
	reconnects int
	position   position
	// generation is closed and made anew when the store turns out to be another one.
	generation chan struct{}
}

// watchNote is what Status has to say of a watch.
type watchNote struct {
	denied string // why the store does not let it read, empty if it does
	excess int    // keys that it leaves out
}

// position says which store answered, and how far it had come.
type position struct {
	clusterID uint64
	term      uint64
	revision  int64
	// generation tells a store from those that were there before it, when the cluster ID doesn't.
	generation int
}

func newContact(where string, user func() string, log *slog.Logger, restored func()) *contact {
	return &contact{
		where: where, user: user, log: log, restored: restored, lostAt: time.Now(), err: "not reached yet",
		generation: make(chan struct{}), admitted: make(chan struct{}), watches: make(map[*watch]watchNote),
	}
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
	c.note(positionOf(h), nil)
}

// linearized notes the answer of a linearizable read that was begun at position before. Such
// a read can't return less than what was known when it began, unless the store
// was wiped or restored from a copy: with the same cluster ID too, so comparing that isn't enough.
func (c *contact) linearized(before position, h *pb.ResponseHeader) {
	c.note(positionOf(h), &before)
}

func positionOf(h *pb.ResponseHeader) position {
	return position{clusterID: h.GetClusterId(), term: h.GetRaftTerm(), revision: h.GetRevision()}
}

// note notes an answer; before is nil if it isn't that of a linearizable read.
func (c *contact) note(now position, before *position) {
	c.mu.Lock()
	read := before != nil
	// An answer to a request that was begun when another store was there says nothing of the one that is known by now.
	wentBack := read && before.generation == c.position.generation && (now.revision < before.revision || now.term < before.term)
	now.generation = c.position.generation
	other := c.position.clusterID != 0 && (wentBack || now.clusterID != c.position.clusterID)
	if other {
		now.generation++
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
	// A store that no longer lets us read may answer other things all the same.
	found := !c.connected && !(c.denied && !read)
	if found {
		c.connected, c.err = true, ""
		c.logFound()
	}
	if c.denied && found {
		c.denied = false
		close(c.admitted)
		c.admitted = make(chan struct{})
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

// failed notes that the store could not be reached, did not answer, or does not let us read.
func (c *contact) failed(err error) {
	why := plainCause(err)
	if denied(err) {
		why = c.deniedWhy(Prefix, why)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = c.where + ": " + why
	wasDenied := c.denied
	c.denied = denied(err)
	if !c.connected && wasDenied == c.denied {
		return
	}
	if c.connected {
		c.lostAt = time.Now()
	}
	c.connected = false
	c.log.Warn("lost the store; going on with what is known", "endpoint", c.where, "err", why)
}

// deniedWhy says what it means that the store denies us to read: etcd does not tell a user that it doesn't know from one that lacks the right.
func (c *contact) deniedWhy(prefix, cause string) string {
	return fmt.Sprintf("the store knows no user for our certificate of %q, or does not let it read %s: if it is another cluster's store, this cluster was disconnected there (%s)",
		c.user(), prefix, cause)
}

// watchDenied notes whether err is that the store does not let a watch read.
func (c *contact) watchDenied(w *watch, err error) {
	why := ""
	if err != nil && denied(err) {
		why = c.where + ": " + c.deniedWhy(w.prefix, plainCause(err))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noteWatch(w, watchNote{why, c.watches[w].excess})
}

// leftOut notes how many keys a watch leaves out.
func (c *contact) leftOut(w *watch, excess int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noteWatch(w, watchNote{c.watches[w].denied, excess})
}

// forget drops a watch that has ended.
func (c *contact) forget(w *watch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.watches, w)
}

// noteWatch is called with the lock held.
func (c *contact) noteWatch(w *watch, note watchNote) {
	if note == (watchNote{}) {
		delete(c.watches, w)
	} else {
		c.watches[w] = note
	}
}

// admission returns a channel that is closed when the store lets us read after having denied it.
func (c *contact) admission() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.admitted
}

func (c *contact) isDenied() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.denied
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
	s.Denied = c.denied
	for _, note := range c.watches {
		s.Excess += note.excess
		if note.denied != "" && s.Connected {
			s.LastError, s.Denied = note.denied, true
		}
	}
	s.Revision = c.position.revision
	s.Reconnects = c.reconnects
}
