package http1

import (
	"net/http"
	"strconv"
)

// writeRequest writes into out what a backend is sent: the head without what is for this hop only, with who the client is, and what is there of the body.
func (x *transfer) writeRequest() {
	h := &x.req
	body := x.in.bytes()[len(h.raw):x.taken]
	out := takeBuffer(len(h.raw) + len(body) + 256)
	if h.minor == 1 && h.authority == nil {
		out = out.add(h.raw[h.line:h.lineEnd])
	} else {
		out = out.add(h.method).addString(" ").add(h.target).addString(" HTTP/1.1\r\n")
	}
	switch {
	case h.authority != nil:
		out = out.addString("Host: ").add(h.authority).addString("\r\n")
	case h.hosts == 0:
		out = out.addString("Host: \r\n")
	}
	proto := false
	out = h.addFields(out, func(f *field) bool {
		proto = proto || f.kind == forwardedProto && !f.drop
		return f.drop || f.kind == forwardedFor || f.kind == hostField && h.authority != nil
	})
	out = out.addString("X-Forwarded-For: ")
	if h.forwarded {
		for i := range h.fields {
			if f := &h.fields[i]; f.kind == forwardedFor && !f.drop && f.value < f.valueEnd {
				out = out.add(h.raw[f.value:f.valueEnd]).addString(", ")
			}
		}
	}
	var address [64]byte
	out = out.add(x.c.client.Address.Addr().AppendTo(address[:0])).addString("\r\n")
	if !proto {
		out = out.addString("X-Forwarded-Proto: http\r\n")
	}
	if x.asksUpgrade() {
		out = out.addString("Connection: Upgrade\r\nUpgrade: ").add(h.upgrade).addString("\r\n")
	}
	x.out = out.addString("\r\n").add(body)
}

// asksUpgrade: to HTTP/2 nobody is let: what it would carry could not be seen.
func (x *transfer) asksUpgrade() bool {
	h := &x.req
	return h.upgradeAsked && len(h.upgrade) > 0 && h.minor == 1 && !hasOption(h.upgrade, []byte("h2c")) && x.whole
}

// addFields adds those that are not left out, as few times as they lie together.
func (h *head) addFields(out *buffer, leftOut func(*field) bool) *buffer {
	from, to := h.lineEnd, h.lineEnd
	for i := range h.fields {
		f := &h.fields[i]
		if !leftOut(f) {
			to = f.end
			continue
		}
		if from < to {
			out = out.add(h.raw[from:to])
		}
		from, to = f.end, f.end
	}
	if from < to {
		out = out.add(h.raw[from:to])
	}
	return out
}

// writeAnswer writes into out what the client is sent: the head and part of the body.
func (x *transfer) writeAnswer(part []byte) {
	h := &x.ans
	x.out.release()
	x.out = nil
	out := takeBuffer(len(h.raw) + len(part) + 64)
	out = out.addString("HTTP/1.1").add(h.raw[len("HTTP/1.1"):h.lineEnd])
	informs := h.status < 200
	unframed := informs || h.status == http.StatusNoContent
	out = h.addFields(out, func(f *field) bool {
		return f.drop || unframed && (f.kind == lengthField || f.kind == encodingField) || x.strip && f.kind == encodingField
	})
	switch {
	case h.status == http.StatusSwitchingProtocols:
		out = out.addString("Connection: Upgrade\r\nUpgrade: ").add(h.upgrade).addString("\r\n")
	case informs:
	case x.c.closing:
		out = out.addString("Connection: close\r\n")
	case x.req.minor == 0:
		out = out.addString("Connection: keep-alive\r\n")
	}
	x.out = out.addString("\r\n").add(part)
}

// local answers by the proxy itself. The reason is what the client is told, and a constant for the record.
func (x *transfer) local(status int, reason string) {
	c := x.c
	x.record.Status, x.record.Local = status, reason
	if !x.whole || x.req.closing || x.req.minor == 0 || c.leaving() {
		c.closing = true
	}
	x.out.release()
	x.out = nil
	out := takeBuffer(smallBuffer)
	out = out.addString("HTTP/1.1 ").addString(strconv.Itoa(status)).addString(" ").addString(http.StatusText(status))
	out = out.addString("\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: ").addString(strconv.Itoa(len(reason) + 1)).addString("\r\n")
	if status == http.StatusMethodNotAllowed {
		out = out.addString("Allow: GET, HEAD, POST, PUT, DELETE, OPTIONS\r\n")
	}
	if c.closing {
		out = out.addString("Connection: close\r\n")
	}
	out = out.addString("\r\n")
	if string(x.req.method) != http.MethodHead {
		out = out.addString(reason).addString("\n")
		x.record.Out = int64(len(reason) + 1)
	}
	x.out = out
	x.armBody(boundBoth)
	if _, err := c.conn.Write(out.bytes()); err != nil {
		x.record.Status = 0
		c.cutOff()
	}
}
