package http1

import "sync"

// Buffers are of a few sizes, and shared by all connections: an idle one holds none.
const (
	smallBuffer   = 8 << 10
	answerBuffer  = 16 << 10
	bodyBuffer    = 64 << 10
	bufferClasses = 8
)

var bufferPools [bufferClasses]sync.Pool // class i holds those of smallBuffer << i

// buffer has bytes from r to w.
type buffer struct {
	b     []byte
	r, w  int
	class int
}

// takeBuffer of at least size bytes.
func takeBuffer(size int) *buffer {
	class := 0
	for smallBuffer<<class < size && class < bufferClasses {
		class++
	}
	if class == bufferClasses {
		return &buffer{b: make([]byte, size), class: class}
	}
	if b, ok := bufferPools[class].Get().(*buffer); ok {
		b.r, b.w = 0, 0
		return b
	}
	return &buffer{b: make([]byte, smallBuffer<<class), class: class}
}

func (b *buffer) release() {
	if b != nil && b.class < bufferClasses {
		bufferPools[b.class].Put(b)
	}
}

func (b *buffer) bytes() []byte { return b.b[b.r:b.w] }
func (b *buffer) space() []byte { return b.b[b.w:] }
func (b *buffer) len() int      { return b.w - b.r }

// grown returns a buffer with the same bytes and more space: at least to hold size in all. What was b is released.
func (b *buffer) grown(size int) *buffer {
	if b.r > 0 && len(b.b) >= size {
		b.w = copy(b.b, b.bytes())
		b.r = 0
		return b
	}
	bigger := takeBuffer(max(size, 2*len(b.b)))
	bigger.w = copy(bigger.b, b.bytes())
	b.release()
	return bigger
}

// add appends; the buffer may be replaced by a bigger one.
func (b *buffer) add(p []byte) *buffer {
	if len(b.space()) < len(p) {
		b = b.grown(b.len() + len(p))
	}
	b.w += copy(b.b[b.w:], p)
	return b
}

func (b *buffer) addString(s string) *buffer {
	if len(b.space()) < len(s) {
		b = b.grown(b.len() + len(s))
	}
	b.w += copy(b.b[b.w:], s)
	return b
}
