package http1

import (
	"bytes"
	"net/http"
)

// problem is why a message is refused: with which status a request is, and what its client is told. An answer's is 502 always.
type problem struct {
	status int
	text   string
}

func (p *problem) Error() string { return p.text }

var (
	badLine        = &problem{http.StatusBadRequest, "malformed start line"}
	badMethod      = &problem{http.StatusBadRequest, "malformed method"}
	badTarget      = &problem{http.StatusBadRequest, "malformed request target"}
	badVersion     = &problem{http.StatusHTTPVersionNotSupported, "only HTTP/1.0 and HTTP/1.1 are spoken here"}
	badLineEnd     = &problem{http.StatusBadRequest, "CR and LF go together only"}
	badField       = &problem{http.StatusBadRequest, "malformed field"}
	badHost        = &problem{http.StatusBadRequest, "one valid Host is needed"}
	badLength      = &problem{http.StatusBadRequest, "malformed or repeated Content-Length"}
	badFraming     = &problem{http.StatusBadRequest, "Content-Length and Transfer-Encoding exclude each other"}
	badEncoding    = &problem{http.StatusBadRequest, "malformed or misplaced Transfer-Encoding"}
	unknownCoding  = &problem{http.StatusNotImplemented, "the only Transfer-Encoding here is chunked"}
	badStatus      = &problem{http.StatusBadGateway, "malformed status"}
	badSwitch      = &problem{http.StatusBadGateway, "a protocol was switched to that nobody asked for"}
	refusedConnect = &problem{http.StatusMethodNotAllowed, "CONNECT is not for services"}
	largeHead      = &problem{http.StatusRequestHeaderFieldsTooLarge, "the head is too large"}
	manyFields     = &problem{http.StatusRequestHeaderFieldsTooLarge, "too many fields"}
	longTarget     = &problem{http.StatusRequestURITooLong, "the request target is too long"}
)

// kind of a field, as far as a proxy has to do with it.
type kind uint8

const (
	endToEnd kind = iota
	hopByHop      // never passed on (RFC 9110, 7.6.1)
	connectionField
	upgradeField
	lengthField
	encodingField
	hostField
	forwardedFor
	forwardedProto
	traceParent
	expectField
)

var kinds = []struct {
	name string
	kind kind
}{
	{"te", hopByHop}, {"keep-alive", hopByHop}, {"proxy-connection", hopByHop}, {"proxy-authenticate", hopByHop}, {"proxy-authorization", hopByHop},
	{"connection", connectionField}, {"upgrade", upgradeField}, {"content-length", lengthField}, {"transfer-encoding", encodingField},
	{"host", hostField}, {"x-forwarded-for", forwardedFor}, {"x-forwarded-proto", forwardedProto}, {"traceparent", traceParent}, {"expect", expectField},
}

// kindsByLength spares most fields all comparisons.
var kindsByLength [24][]struct {
	name string
	kind kind
}

// Tables of the bytes that may be in a token (RFC 9110, 5.6.2), in a field's value (5.5), in a request target and in a host (RFC 3986, 2.2 and 3.2.2).
var isToken, isValue, isTarget, isHost [256]bool

func init() {
	for _, k := range kinds {
		kindsByLength[len(k.name)] = append(kindsByLength[len(k.name)], k)
	}
	for c := range 256 {
		alphanumeric := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		in := func(set string) bool { return bytes.IndexByte([]byte(set), byte(c)) >= 0 }
		isToken[c] = alphanumeric || in("!#$%&'*+-.^_`|~")
		isValue[c] = c >= ' ' && c != 0x7f || c == '\t'
		isTarget[c] = c > ' ' && c < 0x7f && c != '#'
		isHost[c] = alphanumeric || in("-._~%!$&'()*+,;=:[]")
	}
}

func kindOf(name []byte) kind {
	if len(name) < len(kindsByLength) {
		for i := range kindsByLength[len(name)] {
			if k := &kindsByLength[len(name)][i]; equalFold(name, k.name) {
				return k.kind
			}
		}
	}
	return endToEnd
}

// equalFold compares with a word in lower case, of ASCII only.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// field is where a field lies in a head.
type field struct {
	start, nameEnd, value, valueEnd, end int
	kind                                 kind
	drop                                 bool // it is not passed on
}

// head is a message's start line and fields, parsed where they lie.
type head struct {
	raw     []byte // with the empty line at its end
	line    int    // where the start line begins
	lineEnd int    // where the first field begins
	minor   int    // of the version: HTTP/1.minor
	fields  []field

	method, target []byte // of a request
	authority      []byte // of a target in absolute form; nil: it has none
	host           []byte
	status         int // of an answer

	length  int64 // Content-Length; -1: none
	chunked bool

	closing, keepAlive bool // Connection says close, keep-alive
	upgrade            []byte
	trace              []byte
	expects            bool
	named              bool // Connection names other fields
	forwarded          bool // there is X-Forwarded-For
	hosts              int
	upgradeAsked       bool // Connection says upgrade
}

var headEnd = []byte("\r\n\r\n")

// findHead returns where the head ends that b begins with, or 0 while it is not complete; seen bytes were looked at before. A head that can never end well is found early.
func findHead(b []byte, seen int) (int, *problem) {
	if i := bytes.Index(b[max(seen-3, 0):], headEnd); i >= 0 {
		return max(seen-3, 0) + i + len(headEnd), nil
	}
	for at := seen; at < len(b); at++ {
		i := bytes.IndexByte(b[at:], '\n')
		if i < 0 {
			break
		}
		if at += i; at == 0 || b[at-1] != '\r' {
			return 0, badLineEnd
		}
	}
	return 0, nil
}

func (h *head) reset(raw []byte) {
	fields := h.fields[:0]
	*h = head{raw: raw, fields: fields, length: -1}
}

// parseRequest parses a whole request head.
func (h *head) parseRequest(raw []byte, maxFields int) *problem {
	h.reset(raw)
	if raw[0] == '\r' && raw[1] == '\n' && len(raw) > 4 {
		h.line = 2 // One empty line before a request is forgiven (RFC 9112, 2.2).
	}
	at := h.line
	for isToken[raw[at]] {
		at++
	}
	if at == h.line || raw[at] != ' ' {
		return badMethod
	}
	h.method = raw[h.line:at]
	at++
	start := at
	for isTarget[raw[at]] {
		at++
	}
	if at == start || raw[at] != ' ' {
		return badTarget
	}
	h.target = raw[start:at]
	at++
	if p := h.parseVersion(at); p != nil {
		return p
	}
	at += len("HTTP/1.1")
	if raw[at] != '\r' || raw[at+1] != '\n' {
		return badLine
	}
	h.lineEnd = at + 2
	if p := h.parseFields(maxFields); p != nil {
		return p
	}
	if p := h.checkTarget(); p != nil {
		return p
	}
	if h.chunked && h.minor == 0 {
		return badEncoding
	}
	return nil
}

func (h *head) parseVersion(at int) *problem {
	v := h.raw[at:]
	if len(v) < len("HTTP/1.1") || string(v[:5]) != "HTTP/" || v[6] != '.' || !digit(v[5]) || !digit(v[7]) {
		return badLine
	}
	if v[5] != '1' || v[7] > '1' {
		return badVersion
	}
	h.minor = int(v[7] - '0')
	return nil
}

func digit(c byte) bool { return c >= '0' && c <= '9' }

// parseAnswer parses a whole head of an answer.
func (h *head) parseAnswer(raw []byte, maxFields int) *problem {
	h.reset(raw)
	if p := h.parseVersion(0); p != nil {
		return badStatus
	}
	at := len("HTTP/1.1")
	if len(raw) < at+6 || raw[at] != ' ' || !digit(raw[at+1]) || !digit(raw[at+2]) || !digit(raw[at+3]) || raw[at+1] == '0' {
		return badStatus
	}
	h.status = int(raw[at+1]-'0')*100 + int(raw[at+2]-'0')*10 + int(raw[at+3]-'0')
	at += 4
	if raw[at] == ' ' {
		for isValue[raw[at]] {
			at++
		}
	}
	if raw[at] != '\r' || raw[at+1] != '\n' {
		return badStatus
	}
	h.lineEnd = at + 2
	return h.parseFields(maxFields)
}

// parseFields parses from lineEnd on. The head ends with an empty line, so that every loop ends at a CR.
func (h *head) parseFields(maxFields int) *problem {
	b, at := h.raw, h.lineEnd
	for b[at] != '\r' {
		f := field{start: at}
		for isToken[b[at]] {
			at++
		}
		if at == f.start || b[at] != ':' {
			return badField // Also a folded line, and a blank before the colon.
		}
		f.nameEnd = at
		at++
		for b[at] == ' ' || b[at] == '\t' {
			at++
		}
		f.value = at
		for isValue[b[at]] {
			at++
		}
		if b[at] != '\r' || b[at+1] != '\n' {
			return badLineEnd
		}
		f.valueEnd = at
		for f.valueEnd > f.value && (b[f.valueEnd-1] == ' ' || b[f.valueEnd-1] == '\t') {
			f.valueEnd--
		}
		at += 2
		f.end = at
		if maxFields > 0 && len(h.fields) >= maxFields {
			return manyFields
		}
		f.kind = kindOf(b[f.start:f.nameEnd])
		if f.kind != endToEnd {
			if p := h.know(&f); p != nil {
				return p
			}
		}
		h.fields = append(h.fields, f)
	}
	if at+2 != len(b) || b[at+1] != '\n' {
		return badLineEnd
	}
	if h.chunked && h.length >= 0 {
		return badFraming
	}
	if h.named {
		h.dropNamed()
	}
	return nil
}

// know takes what a proxy needs of a field.
func (h *head) know(f *field) *problem {
	value := h.raw[f.value:f.valueEnd]
	switch f.kind {
	case hopByHop:
		f.drop = true
	case connectionField:
		f.drop = true
		return h.connection(value)
	case upgradeField:
		f.drop = true
		if h.upgrade != nil {
			return badField
		}
		h.upgrade = value
	case lengthField:
		if h.length >= 0 {
			return badLength
		}
		return h.parseLength(value)
	case encodingField:
		if h.chunked {
			return badEncoding
		}
		if !equalFold(value, "chunked") {
			return unknownCoding
		}
		h.chunked = true
	case hostField:
		h.hosts++
		h.host = value
	case forwardedFor:
		h.forwarded = true
	case traceParent:
		h.trace = value
	case expectField:
		h.expects = true
	}
	return nil
}

func (h *head) parseLength(value []byte) *problem {
	if len(value) == 0 || len(value) > 18 {
		return badLength
	}
	var n int64
	for _, c := range value {
		if !digit(c) {
			return badLength
		}
		n = n*10 + int64(c-'0')
	}
	h.length = n
	return nil
}

// connection reads the options of a Connection field.
func (h *head) connection(value []byte) *problem {
	for len(value) > 0 {
		option := value
		if i := bytes.IndexByte(value, ','); i >= 0 {
			option, value = value[:i], value[i+1:]
		} else {
			value = nil
		}
		option = bytes.Trim(option, " \t")
		for _, c := range option {
			if !isToken[c] {
				return badField
			}
		}
		switch {
		case len(option) == 0:
		case equalFold(option, "close"):
			h.closing = true
		case equalFold(option, "keep-alive"):
			h.keepAlive = true
		case equalFold(option, "upgrade"):
			h.upgradeAsked = true
		default:
			h.named = true
		}
	}
	return nil
}

// dropNamed drops the fields that Connection names, but for those which say where a message goes and ends: nobody may have those taken away.
func (h *head) dropNamed() {
	for i := range h.fields {
		f := &h.fields[i]
		if f.drop || f.kind == hostField || f.kind == lengthField || f.kind == encodingField {
			continue
		}
		name := h.raw[f.start:f.nameEnd]
		for j := range h.fields {
			c := &h.fields[j]
			if c.kind == connectionField && hasOption(h.raw[c.value:c.valueEnd], name) {
				f.drop = true
			}
		}
	}
}

// hasOption: list has the option, in whatever case.
func hasOption(list, option []byte) bool {
	for len(list) > 0 {
		o := list
		if i := bytes.IndexByte(list, ','); i >= 0 {
			o, list = list[:i], list[i+1:]
		} else {
			list = nil
		}
		if bytes.EqualFold(bytes.Trim(o, " \t"), option) {
			return true
		}
	}
	return false
}

// checkTarget checks the target's form (RFC 9112, 3.2) and the host.
func (h *head) checkTarget() *problem {
	switch {
	case string(h.method) == "CONNECT":
		return refusedConnect
	case h.target[0] == '/', len(h.target) == 1 && h.target[0] == '*' && string(h.method) == "OPTIONS":
	default:
		if p := h.splitAbsolute(); p != nil {
			return p
		}
	}
	if h.hosts > 1 || h.hosts == 0 && h.minor == 1 || !validHost(h.host) {
		return badHost
	}
	if h.authority != nil {
		if len(h.authority) == 0 || !validHost(h.authority) {
			return badHost
		}
		h.host = h.authority // What the Host field says is of no account then (RFC 9112, 3.2.2).
	}
	return nil
}

func validHost(host []byte) bool {
	for _, c := range host {
		if !isHost[c] {
			return false
		}
	}
	return true
}

var rootTarget = []byte("/")
var starTarget = []byte("*")

// splitAbsolute splits a target in absolute form, so that the backend is sent one in origin form.
func (h *head) splitAbsolute() *problem {
	const scheme = "http://"
	if len(h.target) < len(scheme) || !equalFold(h.target[:len(scheme)], scheme) {
		return badTarget
	}
	rest := h.target[len(scheme):]
	end := bytes.IndexAny(rest, "/?")
	switch {
	case end < 0 && string(h.method) == "OPTIONS":
		h.authority, h.target = rest, starTarget
	case end < 0:
		h.authority, h.target = rest, rootTarget
	case rest[end] == '?':
		return badTarget // A path can't be put before the query without copying it, and nobody sends this.
	default:
		h.authority, h.target = rest[:end], rest[end:]
	}
	return nil
}

// find returns the first value of a field, or nil. The name is in lower case.
func (h *head) find(name string) []byte {
	for i := range h.fields {
		f := &h.fields[i]
		if equalFold(h.raw[f.start:f.nameEnd], name) {
			return h.raw[f.value:f.valueEnd]
		}
	}
	return nil
}

// cookie returns the value of the first cookie of that name, or nil (RFC 6265, 4.2).
func (h *head) cookie(name string) []byte {
	for i := range h.fields {
		f := &h.fields[i]
		if !equalFold(h.raw[f.start:f.nameEnd], "cookie") {
			continue
		}
		for pairs := h.raw[f.value:f.valueEnd]; len(pairs) > 0; {
			pair := pairs
			if j := bytes.IndexByte(pairs, ';'); j >= 0 {
				pair, pairs = pairs[:j], pairs[j+1:]
			} else {
				pairs = nil
			}
			pair = bytes.Trim(pair, " \t")
			if len(pair) > len(name) && pair[len(name)] == '=' && string(pair[:len(name)]) == name {
				return pair[len(name)+1:]
			}
		}
	}
	return nil
}
