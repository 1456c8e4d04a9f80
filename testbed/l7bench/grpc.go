package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	grpcConns   = 8
	grpcStreams = 8
	grpcMethod  = "/bench.Echo/Say"
)

// grpcMessage is a message of 13 bytes behind gRPC's prefix: not compressed, and its length.
var grpcMessage = append([]byte{0, 0, 0, 0, 13}, "xxxxxxxxxxxxx"...)

var (
	grpcHeaders  = []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}}
	grpcTrailers = []hpack.HeaderField{{Name: "grpc-status", Value: "0"}, {Name: "grpc-message", Value: ""}}
)

// grpcRequest has the fields that grpc-go sends.
func grpcRequest(path string) []hpack.HeaderField {
	return []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path}, {Name: ":authority", Value: "bench"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "user-agent", Value: "grpc-go/1.83.2"}, {Name: "te", Value: "trailers"},
	}
}

// serveGRPC answers each call with the same message when the client's is whole. It doesn't look at what is called.
func serveGRPC(c net.Conn) error {
	f := newFrames(c)
	if _, err := io.ReadFull(f.r, make([]byte, len(http2.ClientPreface))); err != nil {
		return err
	}
	if err := f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1000}); err != nil {
		return err
	}
	for {
		frame, err := f.next()
		if err != nil {
			return err
		}
		if h := frame.Header(); !h.Flags.Has(http2.FlagDataEndStream) || h.Type == http2.FrameRSTStream { // the flag of HEADERS is the same bit
			continue
		}
		stream := frame.Header().StreamID
		if err := errors.Join(f.headers(stream, false, grpcHeaders), f.WriteData(stream, false, grpcMessage), f.headers(stream, true, grpcTrailers)); err != nil {
			return err
		}
	}
}

// grpcClient calls as fast as answers come, on each of grpcConns connections with grpcStreams calls at a time.
func grpcClient(target, path string, length time.Duration) error {
	until := time.Now().Add(length)
	return together(target+path, grpcConns, func() ([]time.Duration, error) { return calls(target, path, grpcStreams, until) })
}

// probeGRPC makes one call on a connection of its own.
func probeGRPC(target, path string) error {
	_, err := calls(target, path, 1, time.Now())
	return err
}

// calls makes calls on one connection, some at a time, until the time is over, and at least one on each stream.
func calls(target, path string, streams int, until time.Time) (took []time.Duration, err error) {
	c, err := net.Dial("tcp", target)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(until.Add(patience)); err != nil {
		return nil, err
	}
	f := newFrames(c)
	if _, err := io.WriteString(f.w, http2.ClientPreface); err != nil {
		return nil, err
	}
	if err := f.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 0}); err != nil {
		return nil, err
	}
	var status, grpcStatus string
	decoder := hpack.NewDecoder(4096, func(field hpack.HeaderField) {
		switch field.Name {
		case ":status":
			status = field.Value
		case "grpc-status":
			grpcStatus = field.Value
		}
	})
	request, stream, sent := grpcRequest(path), uint32(1), map[uint32]time.Time{}
	begin := func(now time.Time) error {
		sent[stream] = now
		err := errors.Join(f.headers(stream, false, request), f.WriteData(stream, true, grpcMessage))
		stream += 2
		return err
	}
	for range streams {
		if err := begin(time.Now()); err != nil {
			return nil, err
		}
	}
	for len(sent) > 0 {
		frame, err := f.next()
		if err != nil {
			return took, err
		}
		id := frame.Header().StreamID
		switch frame := frame.(type) {
		case *http2.RSTStreamFrame:
			return took, fmt.Errorf("stream %d was reset: %s", id, frame.ErrCode)
		case *http2.DataFrame:
			if frame.StreamEnded() {
				return took, fmt.Errorf("stream %d ended without trailers", id)
			}
		case *http2.HeadersFrame:
			status, grpcStatus = "200", ""
			if _, err := decoder.Write(frame.HeaderBlockFragment()); err != nil {
				return took, fmt.Errorf("the header block of stream %d: %w", id, err)
			}
			if status != "200" || frame.StreamEnded() && grpcStatus != "0" {
				return took, fmt.Errorf("stream %d was answered with status %s and grpc-status %q", id, status, grpcStatus)
			}
			if !frame.StreamEnded() {
				continue
			}
			now := time.Now()
			took = append(took, now.Sub(sent[id]))
			if delete(sent, id); now.Before(until) {
				if err := begin(now); err != nil {
					return took, err
				}
			}
		}
	}
	return took, nil
}
