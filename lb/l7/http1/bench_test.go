package http1

import (
	"bytes"
	"io"
	"net"
	"testing"
)

// BenchmarkKeepAlive is a small GET over one kept connection, with a backend that allocates nothing.
func BenchmarkKeepAlive(b *testing.B) {
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello")
	backend := listen(b, func(c net.Conn) {
		buffer := make([]byte, 4096)
		for {
			if _, err := c.Read(buffer); err != nil {
				return
			}
			if _, err := c.Write(answer); err != nil {
				return
			}
		}
	})
	p := start(b, nil, backend)
	c := p.dial(b)
	request := []byte("GET /some/path?with=query HTTP/1.1\r\nHost: web.shop:8080\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n")
	buffer := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(request); err != nil {
			b.Fatal(err)
		}
		if n, err := io.ReadAtLeast(c, buffer, len(answer)); err != nil || !bytes.HasPrefix(buffer[:n], answer[:12]) {
			b.Fatal(err)
		}
	}
}
