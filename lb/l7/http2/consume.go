package http2

import (
	"encoding/binary"
	"time"
)

// consume handles all whole frames that were read.
func (l *link) consume(b *batch) *fault {
	for l.w-l.r >= frameHead {
		h := l.buf[l.r:l.w]
		length := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
		if length > maxFrame {
			return &fault{codeFrameSize, "a frame longer than was allowed"}
		}
		if len(h) < frameHead+length {
			return nil
		}
		l.r += frameHead + length
		if f := l.frame(b, h[3], h[4], binary.BigEndian.Uint32(h[5:])&lastStreamID, h[frameHead:frameHead+length]); f != nil {
			return f
		}
	}
	return nil
}

func (l *link) frame(b *batch, kind, flags byte, id uint32, p []byte) *fault {
	if !l.settled && kind != frameSettings {
		return &fault{codeProtocol, "the first frame is not SETTINGS"}
	}
	if l.blockID != 0 && (kind != frameContinuation || id != l.blockID) {
		return &fault{codeProtocol, "a header block is interrupted"}
	}
	switch kind {
	case frameData:
		return l.onData(b, flags, id, p)
	case frameHeaders:
		return l.onHeaders(b, flags, id, p)
	case frameContinuation:
		if l.blockID == 0 {
			return &fault{codeProtocol, "CONTINUATION of nothing"}
		}
		return l.addBlock(b, p, flags&flagEndHeaders != 0)
	case framePriority:
		switch {
		case id == 0:
			return &fault{codeProtocol, "PRIORITY of stream 0"}
		case len(p) != 5:
			l.say(b, func(o []byte) []byte { return appendReset(o, id, codeFrameSize) })
		case binary.BigEndian.Uint32(p)&lastStreamID == id:
			l.say(b, func(o []byte) []byte { return appendReset(o, id, codeProtocol) })
		}
		return l.chat()
	case frameReset:
		switch {
		case len(p) != 4:
			return &fault{codeFrameSize, "RST_STREAM of a wrong length"}
		case id == 0 || l.end.unknown(id):
			return &fault{codeProtocol, "RST_STREAM of an idle stream"}
		}
		return l.end.reset(b, id, code(binary.BigEndian.Uint32(p)))
	case frameSettings:
		return l.onSettings(b, flags, id, p)
	case framePush:
		return &fault{codeProtocol, "PUSH_PROMISE is not allowed"}
	case framePing:
		switch {
		case id != 0:
			return &fault{codeProtocol, "PING on a stream"}
		case len(p) != 8:
			return &fault{codeFrameSize, "PING of a wrong length"}
		case flags&flagAck != 0:
			l.end.pong(b, p)
		default:
			l.say(b, func(o []byte) []byte { return appendPing(o, true, p) })
		}
		return l.chat()
	case frameGoAway:
		switch {
		case id != 0:
			return &fault{codeProtocol, "GOAWAY on a stream"}
		case len(p) < 8:
			return &fault{codeFrameSize, "GOAWAY of a wrong length"}
		}
		l.end.goAway(b, binary.BigEndian.Uint32(p)&lastStreamID, code(binary.BigEndian.Uint32(p[4:])))
		return l.chat()
	case frameWindow:
		return l.onWindow(b, id, p)
	}
	return l.chat()
}

const (
	// chatterMost frames that bring nothing on are taken in chatterTime.
	chatterMost = 10_000
	chatterTime = 10 * time.Second
)

// chat counts frames that cost us something and bring nothing on.
func (l *link) chat() *fault {
	if l.chatter++; l.chatter > chatterMost {
		if now := time.Now(); now.Sub(l.since) > chatterTime {
			l.since, l.chatter = now, 0
		} else {
			return &fault{codeCalm, "too many frames that bring nothing on"}
		}
	}
	l.mu.Lock()
	full := len(l.out.buf) > outMost
	l.mu.Unlock()
	if full {
		return &fault{codeCalm, "what is answered is not read"}
	}
	return nil
}

func (l *link) onData(b *batch, flags byte, id uint32, p []byte) *fault {
	if id == 0 || l.end.unknown(id) {
		return &fault{codeProtocol, "DATA on an idle stream"}
	}
	if l.available -= len(p); l.available < 0 {
		return &fault{codeFlow, "more DATA than the connection's window"}
	}
	if l.unreturned += len(p); l.unreturned >= connWindow/4 {
		n := l.unreturned
		l.say(b, func(o []byte) []byte { return appendWindow(o, 0, n) })
		l.available, l.unreturned = l.available+n, 0
	}
	data, f := unpad(flags, p)
	if f != nil {
		return f
	}
	last := flags&flagEndStream != 0
	if len(data) == 0 && !last {
		if f := l.chat(); f != nil {
			return f
		}
	}
	return l.end.data(b, id, last, data, len(p)-len(data))
}

func (l *link) onHeaders(b *batch, flags byte, id uint32, p []byte) *fault {
	if id == 0 {
		return &fault{codeProtocol, "HEADERS on stream 0"}
	}
	p, f := unpad(flags, p)
	if f != nil {
		return f
	}
	if flags&flagPriority != 0 {
		if len(p) < 5 {
			return &fault{codeFrameSize, "HEADERS too short for their priority"}
		}
		if binary.BigEndian.Uint32(p)&lastStreamID == id {
			return &fault{codeProtocol, "a stream that depends on itself"}
		}
		p = p[5:]
	}
	l.blockID, l.blockLast, l.frames, l.block = id, flags&flagEndStream != 0, 0, l.block[:0]
	return l.addBlock(b, p, flags&flagEndHeaders != 0)
}

// blockFrames is how many frames a header block may be in, so that empty ones cost nothing for long.
const blockFrames = 64

// addBlock takes a part of a header block, and when it is whole, what it says.
func (l *link) addBlock(b *batch, p []byte, whole bool) *fault {
	if l.frames++; l.frames > blockFrames || l.limits.HeaderBytes > 0 && len(l.block)+len(p) > l.limits.HeaderBytes+maxFrame {
		return &fault{codeCalm, "a header block that is too long"}
	}
	if !whole {
		if l.frames == 1 {
			l.headBegan.Store(time.Now().UnixNano())
		}
		l.block = append(l.block, p...)
		return nil
	}
	if l.frames > 1 {
		l.block = append(l.block, p...)
		p = l.block
		l.headBegan.Store(0)
	}
	id := l.blockID
	l.blockID = 0
	l.fields, l.listSize, l.tooLarge = l.fields[:0], 0, false
	_, err := l.dec.Write(p)
	if err == nil {
		err = l.dec.Close()
	}
	if err != nil {
		return &fault{codeCompression, "a header block that can't be decoded"}
	}
	f := l.end.headers(b, id, l.blockLast, l.fields, l.tooLarge)
	clear(l.fields)
	if cap(l.block) > 4096 {
		l.block = nil
	}
	return f
}

func (l *link) onSettings(b *batch, flags byte, id uint32, p []byte) *fault {
	switch {
	case id != 0:
		return &fault{codeProtocol, "SETTINGS on a stream"}
	case flags&flagAck != 0 && len(p) != 0 || len(p)%6 != 0:
		return &fault{codeFrameSize, "SETTINGS of a wrong length"}
	case flags&flagAck != 0 && !l.settled:
		return &fault{codeProtocol, "the first frame is not SETTINGS"}
	case flags&flagAck != 0:
		return l.chat()
	}
	first := !l.settled
	l.settled = true
	for ; len(p) > 0; p = p[6:] {
		if f := l.set(b, binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:]), first); f != nil {
			return f
		}
	}
	l.say(b, func(o []byte) []byte { return appendHead(o, 0, frameSettings, flagAck, 0) })
	return l.chat()
}

func (l *link) set(b *batch, name uint16, v uint32, first bool) *fault {
	l.mu.Lock()
	switch name {
	case settingTableSize:
		l.enc.SetMaxDynamicTableSizeLimit(min(v, 4096))
	case settingPush:
		if v > 1 {
			l.mu.Unlock()
			return &fault{codeProtocol, "ENABLE_PUSH is neither 0 nor 1"}
		}
	case settingStreams:
		l.most = int(min(v, 1<<20))
	case settingFrameSize:
		if v < maxFrame || v > 1<<24-1 {
			l.mu.Unlock()
			return &fault{codeProtocol, "MAX_FRAME_SIZE out of its range"}
		}
	case settingWindow:
		if v > maxWindow {
			l.mu.Unlock()
			return &fault{codeFlow, "INITIAL_WINDOW_SIZE out of its range"}
		}
		more := int64(v) - l.initial
		l.initial = int64(v)
		all := make([]*stream, 0, len(l.streams))
		for _, s := range l.streams {
			all = append(all, s)
		}
		l.mu.Unlock()
		for _, s := range all {
			if f := l.widen(b, s, more, nil); f != nil {
				return f
			}
		}
		return nil
	}
	l.mu.Unlock()
	return nil
}

func (l *link) onWindow(b *batch, id uint32, p []byte) *fault {
	if len(p) != 4 {
		return &fault{codeFrameSize, "WINDOW_UPDATE of a wrong length"}
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	if id != 0 {
		if l.end.unknown(id) {
			return &fault{codeProtocol, "WINDOW_UPDATE of an idle stream"}
		}
		l.mu.Lock()
		s := l.streams[id]
		l.mu.Unlock()
		if s == nil {
			return l.chat()
		}
		if n == 0 {
			return l.end.faulty(b, s, id, codeProtocol)
		}
		bad := codeFlow
		return l.widen(b, s, n, &bad)
	}
	if n == 0 {
		return &fault{codeProtocol, "WINDOW_UPDATE of nothing"}
	}
	l.mu.Lock()
	l.window += n
	over, resume := l.window > maxWindow, len(l.blocked) > 0
	l.mu.Unlock()
	if over {
		return &fault{codeFlow, "the connection's window overflows"}
	}
	if resume {
		l.resume(b)
	}
	return nil
}

// widen changes a stream's window. What overflows is the stream's fault if stream is given, otherwise the connection's.
func (l *link) widen(b *batch, s *stream, n int64, stream *code) *fault {
	s.mu.Lock()
	id := l.end.number(s)
	if id == 0 {
		s.mu.Unlock()
		return nil
	}
	w := l.end.window(s)
	*w += n
	over := *w > maxWindow
	if !over {
		l.end.pump(b, s)
	}
	s.mu.Unlock()
	if !over {
		return nil
	}
	if stream == nil {
		return &fault{codeFlow, "a stream's window overflows"}
	}
	return l.end.faulty(b, s, id, *stream)
}
