package http2

import (
	"strconv"
	"time"

	"golang.org/x/net/http2/hpack"
)

// nameByte tells which bytes a field's name may have: those of a token, but no upper case (RFC 9113, 8.2.1).
var nameByte = func() (t [256]bool) {
	for _, c := range "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz" {
		t[c] = true
	}
	return t
}()

func validField(f *hpack.HeaderField) bool {
	if f.Name == "" {
		return false
	}
	for i := range len(f.Name) {
		if !nameByte[f.Name[i]] {
			return false
		}
	}
	if !validValue(f.Value) {
		return false
	}
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return false
	case "te":
		return f.Value == "trailers"
	}
	return true
}

func validValue(v string) bool {
	for i := range len(v) {
		if c := v[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

func validTrailers(fields []hpack.HeaderField) bool {
	for i := range fields {
		if !validField(&fields[i]) {
			return false
		}
	}
	return true
}

// parse looks at a request's fields, and tells whether they are well-formed (RFC 9113, 8.3.1).
func (s *stream) parse() bool {
	s.length = -1
	s.forwarded, s.proto = -1, false
	pseudo := 0
	header, cookie := s.c.x.Port.HashKey()
	for i := range s.fields {
		f := &s.fields[i]
		if f.Name != "" && f.Name[0] == ':' {
			if pseudo != i || !validValue(f.Value) {
				return false
			}
			pseudo++
			var to *string
			switch f.Name {
			case ":method":
				to = &s.method
			case ":path":
				to = &s.path
			case ":scheme":
				to = &s.scheme
			case ":authority":
				to = &s.authority
			default:
				return false
			}
			if *to != "" {
				return false
			}
			*to = f.Value
			continue
		}
		if !validField(f) {
			return false
		}
		switch f.Name {
		case "content-length":
			n, err := strconv.ParseUint(f.Value, 10, 62)
			if err != nil || f.Value[0] == '+' || s.length >= 0 && s.length != int64(n) {
				return false
			}
			s.length = int64(n)
		case "content-type":
			s.grpc = isGRPC(f.Value)
		case "grpc-timeout":
			s.timeout = parseTimeout(f.Value)
		case "host":
			if s.authority == "" {
				s.host = f.Value
			}
		case "traceparent":
			s.trace = f.Value
		case "x-forwarded-for":
			s.forwarded = i
		case "x-forwarded-proto":
			s.proto = true
		}
		if header != "" && f.Name == header {
			s.hash(f.Value)
		}
		if cookie != "" && f.Name == "cookie" {
			if v, ok := cookieValue(f.Value, cookie); ok {
				s.hash(v)
			}
		}
	}
	if s.method == "CONNECT" {
		return s.path == "" && s.scheme == "" && s.authority != ""
	}
	return s.method != "" && s.scheme != "" && s.path != "" && (s.path[0] == '/' || s.path == "*" && s.method == "OPTIONS")
}

// forward adds what a proxy has to say.
func (s *stream) forward() {
	if i := s.forwarded; i >= 0 {
		s.fields[i].Value += ", " + s.c.address
	} else {
		s.fields = append(s.fields, hpack.HeaderField{Name: "x-forwarded-for", Value: s.c.address})
	}
	if !s.proto {
		s.fields = append(s.fields, hpack.HeaderField{Name: "x-forwarded-proto", Value: "http"})
	}
}

func isGRPC(t string) bool {
	const g = "application/grpc"
	return len(t) >= len(g) && t[:len(g)] == g && (len(t) == len(g) || t[len(g)] == '+' || t[len(g)] == ';')
}

// parseTimeout of gRPC over HTTP/2: up to 8 digits and a unit. 0: none.
func parseTimeout(v string) time.Duration {
	if len(v) < 2 || len(v) > 9 {
		return 0
	}
	n, err := strconv.ParseUint(v[:len(v)-1], 10, 32)
	if err != nil {
		return 0
	}
	unit := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': 1}[v[len(v)-1]]
	if unit == time.Hour && n > 1_000_000 {
		return 0
	}
	return max(time.Duration(n)*unit, 1)
}

func cookieValue(header, name string) (string, bool) {
	for len(header) > 0 {
		for len(header) > 0 && (header[0] == ' ' || header[0] == ';') {
			header = header[1:]
		}
		end := 0
		for end < len(header) && header[end] != ';' {
			end++
		}
		pair := header[:end]
		header = header[end:]
		if len(pair) > len(name) && pair[:len(name)] == name && pair[len(name)] == '=' {
			return pair[len(name)+1:], true
		}
	}
	return "", false
}

// parseAnswer returns the status of an answer's head; 0: it is not well-formed.
func parseAnswer(fields []hpack.HeaderField) (status int, length int64, grpc int) {
	length, grpc = -1, -1
	for i := range fields {
		f := &fields[i]
		if f.Name != "" && f.Name[0] == ':' {
			if i != 0 || f.Name != ":status" || len(f.Value) != 3 {
				return 0, 0, 0
			}
			n, err := strconv.Atoi(f.Value)
			if err != nil || n < 100 {
				return 0, 0, 0
			}
			status = n
			continue
		}
		if !validField(f) {
			return 0, 0, 0
		}
		switch f.Name {
		case "content-length":
			n, err := strconv.ParseUint(f.Value, 10, 62)
			if err != nil || length >= 0 && length != int64(n) {
				return 0, 0, 0
			}
			length = int64(n)
		case "grpc-status":
			grpc = grpcStatus(f.Value)
		}
	}
	return status, length, grpc
}

func grpcStatus(v string) int {
	if n, err := strconv.Atoi(v); err == nil && n >= 0 && n < 1000 {
		return n
	}
	return 2
}
