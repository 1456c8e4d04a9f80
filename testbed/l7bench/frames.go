package main

import (
	"bufio"
	"bytes"
	"fmt"
	"net"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// frames is one end of an HTTP/2 connection that does the least it may (RFC 9113). It keeps no send windows: the messages here are
// so short, and so few at a time, that a peer's are always open.
type frames struct {
	*http2.Framer
	r        *bufio.Reader
	w        *bufio.Writer
	encoder  *hpack.Encoder
	block    bytes.Buffer
	received uint32 // bytes of DATA that the peer has not been given back
}

func newFrames(c net.Conn) *frames {
	f := &frames{r: bufio.NewReaderSize(c, 32<<10), w: bufio.NewWriterSize(c, 32<<10)}
	f.Framer = http2.NewFramer(f.w, f.r)
	f.SetReuseFrames()
	f.encoder = hpack.NewEncoder(&f.block)
	return f
}

// headers writes a header block in one frame.
func (f *frames) headers(stream uint32, end bool, fields []hpack.HeaderField) error {
	f.block.Reset()
	for _, field := range fields {
		if err := f.encoder.WriteField(field); err != nil {
			return err
		}
	}
	return f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: f.block.Bytes(), EndStream: end, EndHeaders: true})
}

// next returns the next frame of a stream, and answers those of the connection. What was written is sent when there is nothing more to
// read, so that frames that came together are answered together. The frame is good until the next call.
func (f *frames) next() (http2.Frame, error) {
	for {
		if f.r.Buffered() == 0 {
			if err := f.w.Flush(); err != nil {
				return nil, err
			}
		}
		frame, err := f.ReadFrame()
		if err != nil {
			return nil, err
		}
		switch frame := frame.(type) {
		case *http2.DataFrame:
			return frame, f.give(frame.Length)
		case *http2.HeadersFrame:
			if !frame.HeadersEnded() {
				return nil, fmt.Errorf("the header block of stream %d is in several frames, which this client doesn't read", frame.StreamID)
			}
			return frame, nil
		case *http2.RSTStreamFrame:
			return frame, nil
		case *http2.SettingsFrame:
			err = f.settings(frame)
		case *http2.PingFrame:
			if !frame.IsAck() {
				err = f.WritePing(true, frame.Data)
			}
		case *http2.GoAwayFrame:
			err = fmt.Errorf("the other end goes away: %s %q", frame.ErrCode, frame.DebugData())
		}
		if err != nil {
			return nil, err
		}
	}
}

func (f *frames) settings(frame *http2.SettingsFrame) error {
	if frame.IsAck() {
		return nil
	}
	if size, ok := frame.Value(http2.SettingHeaderTableSize); ok {
		f.encoder.SetMaxDynamicTableSizeLimit(size)
	}
	return f.WriteSettingsAck()
}

// give opens the connection's receive window again, of 64 KiB, when a quarter is used.
func (f *frames) give(n uint32) error {
	if f.received += n; f.received < 16<<10 {
		return nil
	}
	n, f.received = f.received, 0
	return f.WriteWindowUpdate(0, n)
}
