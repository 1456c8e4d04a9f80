package http2

import "encoding/binary"

// Frame types, flags and settings (RFC 9113, sections 6 and 6.5.2). Frames are read and written here and not by a Framer, as that has a buffer
// and a reader of its own: here many frames are taken from one read and go into one write.
const (
	frameData byte = iota
	frameHeaders
	framePriority
	frameReset
	frameSettings
	framePush
	framePing
	frameGoAway
	frameWindow
	frameContinuation
)

const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

const (
	settingTableSize  = 1
	settingPush       = 2
	settingStreams    = 3
	settingWindow     = 4
	settingFrameSize  = 5
	settingHeaderList = 6
)

// code of an error (RFC 9113, section 7).
type code uint32

const (
	codeNone code = iota
	codeProtocol
	codeInternal
	codeFlow
	codeSettingsTimeout
	codeClosed
	codeFrameSize
	codeRefused
	codeCancel
	codeCompression
	codeConnect
	codeCalm
)

const (
	frameHead     = 9
	maxFrame      = 16 << 10 // what is read at most, and the least that a peer reads
	maxWindow     = 1<<31 - 1
	defaultWindow = 65535
	lastStreamID  = 1<<31 - 1
)

// fault ends a connection.
type fault struct {
	code code
	text string
}

func (f *fault) Error() string { return f.text }

func appendHead(b []byte, length int, kind, flags byte, id uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), kind, flags, byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func appendReset(b []byte, id uint32, c code) []byte {
	return binary.BigEndian.AppendUint32(appendHead(b, 4, frameReset, 0, id), uint32(c))
}

func appendWindow(b []byte, id uint32, n int) []byte {
	return binary.BigEndian.AppendUint32(appendHead(b, 4, frameWindow, 0, id), uint32(n))
}

func appendPing(b []byte, ack bool, data []byte) []byte {
	flags := byte(0)
	if ack {
		flags = flagAck
	}
	return append(appendHead(b, 8, framePing, flags, 0), data...)
}

func appendGoAway(b []byte, last uint32, c code, text string) []byte {
	b = appendHead(b, 8+len(text), frameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	b = binary.BigEndian.AppendUint32(b, uint32(c))
	return append(b, text...)
}

func appendSettings(b []byte, pairs ...uint32) []byte {
	b = appendHead(b, len(pairs)*3, frameSettings, 0, 0)
	for i := 0; i < len(pairs); i += 2 {
		b = binary.BigEndian.AppendUint16(b, uint16(pairs[i]))
		b = binary.BigEndian.AppendUint32(b, pairs[i+1])
	}
	return b
}

// unpad takes padding off a payload.
func unpad(flags byte, p []byte) ([]byte, *fault) {
	if flags&flagPadded == 0 {
		return p, nil
	}
	if len(p) == 0 || int(p[0]) >= len(p) {
		return nil, &fault{codeProtocol, "padding longer than its frame"}
	}
	return p[1 : len(p)-int(p[0])], nil
}
