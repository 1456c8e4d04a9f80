package http1

import "net/http"

// The chunked transfer coding (RFC 9112, 7.1) is checked byte by byte and passed on as it is.

const (
	maxExtension = 256     // bytes after a chunk's size
	maxTrailer   = 8 << 10 // bytes of all trailer fields
	maxDigits    = 15      // of a chunk's size, so that it can't overflow
)

var (
	badChunk   = &problem{http.StatusBadRequest, "malformed chunk"}
	badTrailer = &problem{http.StatusBadRequest, "malformed trailer"}
)

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkExtension
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	chunkTrailer
	chunkDone
)

// chunked is where one is in a chunked body. Its zero value is a body's beginning.
type chunked struct {
	state   chunkState
	digits  int
	extra   int
	left    int64 // of a chunk
	data    int64 // bytes of data so far, without the coding
	trailer []byte
	// strip has feed move the data to the beginning of what it is given; kept is how much that is.
	strip bool
	kept  int
}

func (c *chunked) done() bool { return c.state == chunkDone }

// feed checks the next bytes of a body, and returns how many of them belong to it: all, unless it ends before.
func (c *chunked) feed(p []byte) (n int, err *problem) {
	c.kept = 0
	for n < len(p) && c.state != chunkDone {
		if c.state == chunkData {
			part := int(min(c.left, int64(len(p)-n)))
			if c.strip {
				c.kept += copy(p[c.kept:], p[n:n+part])
			}
			n += part
			c.data += int64(part)
			if c.left -= int64(part); c.left == 0 {
				c.state = chunkDataCR
			}
			continue
		}
		if err := c.next(p[n]); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// next takes one byte of the coding.
func (c *chunked) next(b byte) *problem {
	switch c.state {
	case chunkSize:
		digit, ok := hex(b)
		switch {
		case ok && c.digits < maxDigits:
			c.left = c.left<<4 | digit
			c.digits++
		case b == '\r' && c.digits > 0:
			c.state = chunkSizeLF
		case b == ';' && c.digits > 0:
			c.state, c.extra = chunkExtension, 0
		default:
			return badChunk
		}
	case chunkExtension:
		c.extra++
		switch {
		case b == '\r':
			c.state = chunkSizeLF
		case !isValue[b] || c.extra > maxExtension:
			return badChunk
		}
	case chunkSizeLF:
		switch {
		case b != '\n':
			return badChunk
		case c.left == 0:
			c.state = chunkTrailer
		default:
			c.state = chunkData
		}
	case chunkDataCR:
		if b != '\r' {
			return badChunk
		}
		c.state = chunkDataLF
	case chunkDataLF:
		if b != '\n' {
			return badChunk
		}
		c.state, c.digits = chunkSize, 0
	case chunkTrailer:
		return c.nextOfTrailer(b)
	}
	return nil
}

func hex(b byte) (int64, bool) {
	switch {
	case digit(b):
		return int64(b - '0'), true
	case b >= 'a' && b <= 'f':
		return int64(b-'a') + 10, true
	case b >= 'A' && b <= 'F':
		return int64(b-'A') + 10, true
	}
	return 0, false
}

// nextOfTrailer collects the trailer's lines, and checks each when it is complete.
func (c *chunked) nextOfTrailer(b byte) *problem {
	c.trailer = append(c.trailer, b)
	t := c.trailer
	switch {
	case len(t) > maxTrailer:
		return largeHead
	case b != '\n':
		if len(t) >= 2 && t[len(t)-2] == '\r' {
			return badLineEnd
		}
		return nil
	case len(t) < 2 || t[len(t)-2] != '\r':
		return badLineEnd
	case len(t) == 2 || len(t) >= 4 && t[len(t)-4] == '\r' && t[len(t)-3] == '\n':
		if !validTrailer(t) {
			return badTrailer
		}
		c.state = chunkDone
	}
	return nil
}

// validTrailer: they are fields, and none that says how the message is framed or where it goes (RFC 9110, 6.5.1).
func validTrailer(t []byte) bool {
	var h head
	h.reset(t)
	if h.parseFields(0) != nil {
		return false
	}
	for i := range h.fields {
		switch h.fields[i].kind {
		case endToEnd, traceParent:
		default:
			return false
		}
	}
	return true
}
