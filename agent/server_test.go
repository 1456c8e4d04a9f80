package agent

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestServeEndsAfterItsRequests(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(socket); err == nil || !strings.Contains(err.Error(), "another agent answers") {
		t.Errorf("a second agent took over the socket of a live one: %v", err)
	}
	begun, ended := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
		time.Sleep(50 * time.Millisecond) // takes a moment to let go
		close(ended)
	})
	full := strings.Repeat("x", 1<<20)
	n := 0
	list(mux, "/watched", func() (string, []<-chan struct{}, error) { // always something new, for one who does not read
		n++
		return full + string(rune('a'+n%26)), nil, nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, listener, mux) }()

	request := func(path string) net.Conn {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: agent\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	defer request("/slow").Close()
	stuck := request("/watched?watch=true")
	defer stuck.Close()
	if _, err := bufio.NewReader(stuck).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	<-begun
	start := time.Now()
	cancel()
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
	select {
	case <-ended:
	default:
		t.Error("it ended before a request that was under way")
	}
	if took := time.Since(start); took > shutdownGrace {
		t.Errorf("a watcher who does not read held it up for %s", took)
	}
}
