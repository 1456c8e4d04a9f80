package l7

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"causeway/lb"
)

// TestIdleConnectionsAreCheap: a client that has not spoken yet costs the proxy a goroutine, and no buffer.
func TestIdleConnectionsAreCheap(t *testing.T) {
	const clients, most = 2000, 8 << 10 // bytes each
	p, at := serve(t, lb.AppHTTP, nil)
	<-p.accepted
	to := addr(t, at)
	before := memory()
	for range clients {
		// Plain sockets, so that what is measured is the proxy's alone.
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); p.count.Load() < clients; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d are accepted", p.count.Load(), clients)
		}
	}
	each := (memory() - before) / clients
	t.Logf("%d bytes for each idle connection", each)
	if each > most {
		t.Errorf("an idle connection costs %d bytes, more than %d", each, most)
	}
}

func memory() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}
