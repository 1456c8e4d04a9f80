package standard

import (
	"errors"
	"io"
	"sync"
)

// errSuperseded ends the reading of a try that has been given up.
var errSuperseded = errors.New("the request is sent to another backend")

// source is a request's body, which may be sent more than once: what was read is kept until the answer begins, up to a bound.
type source struct {
	body  io.ReadCloser
	limit int

	mu    sync.Mutex
	moved *sync.Cond
	// kept begins at the body's byte number first.
	kept  []byte
	first int64
	// whole: nothing that was read has been dropped, and the answer has not begun.
	whole   bool
	reading bool
	err     error
	current *try
	read    int64
}

func newSource(body io.ReadCloser, limit int) *source {
	s := &source{body: body, limit: limit, whole: true}
	s.moved = sync.NewCond(&s.mu)
	return s
}

// try is one sending of the body.
type try struct {
	of *source
	at int64
}

// open begins a sending from the body's first byte; one before it is given up. It is only possible while repeatable.
func (s *source) open() *try {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = &try{of: s}
	s.moved.Broadcast()
	return s.current
}

// repeatable tells whether the body can be sent once more.
func (s *source) repeatable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.whole
}

// commit lets go of what was kept: the answer has begun.
func (s *source) commit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.whole = false
	s.drop()
}

// drop forgets what the current sending has passed on.
func (s *source) drop() {
	if s.whole || s.current == nil || s.current.at <= s.first {
		return
	}
	n := min(s.current.at-s.first, int64(len(s.kept)))
	s.kept = s.kept[n:]
	s.first += n
	if len(s.kept) == 0 {
		s.kept = nil
	}
}

// count is how much of the body was read from the client.
func (s *source) count() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.read
}

func (t *try) Read(p []byte) (int, error) {
	s := t.of
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.current != t {
			return 0, errSuperseded
		}
		if have := t.at - s.first; have < int64(len(s.kept)) {
			n := copy(p, s.kept[have:])
			t.at += int64(n)
			s.drop()
			return n, nil
		}
		if s.err != nil {
			return 0, s.err
		}
		if s.reading {
			s.moved.Wait() // A sending that was given up still reads; what it gets is kept.
			continue
		}
		if n, done := s.fill(t, p); done {
			return n, nil
		}
	}
}

// fill reads from the client: into p if nobody may need it again, and into what is kept otherwise.
func (s *source) fill(t *try, p []byte) (int, bool) {
	s.reading = true
	direct := !s.whole
	s.mu.Unlock()
	n, err := s.body.Read(p)
	s.mu.Lock()
	s.reading = false
	s.read += int64(n)
	s.err = err
	s.moved.Broadcast()
	if direct && s.current == t {
		t.at += int64(n)
		s.first = t.at
		return n, n > 0
	}
	s.kept = append(s.kept, p[:n]...)
	if len(s.kept) > s.limit {
		s.whole = false
	}
	return 0, false
}

// Close is called by the transport when the sending has ended, however. The body itself ends with its request.
func (t *try) Close() error { return nil }
