package l7

import (
	"context"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"causeway/lb"
	"causeway/lb/l7/exchange"
	"causeway/lb/l7/state"
)

func TestDialFromTheNodesAddressWithTheClientsIdentity(t *testing.T) {
	from := make(chan string, 1)
	back := backend(t, func(c *net.TCPConn) { from <- c.RemoteAddr().(*net.TCPAddr).IP.String() })
	p, err := newProxy(Config{Limits: exchange.DefaultLimits()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.observer.Close()
	p.table.Apply(updates(addr(t, "10.0.0.1:80"), lb.AppTCP, back))
	self := state.Self{Sources: []netip.Addr{netip.MustParseAddr("fd00::1"), netip.MustParseAddr("127.0.0.9")}}
	if os.Geteuid() == 0 {
		self.Mark = 0xcb000000
	}
	p.table.Apply([]state.Update{{Self: &self}})
	conn, err := p.dial(context.Background(), p.table.Ports()[0].Endpoints()[0], state.Client{Identity: 0x10102})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := <-from; got != "127.0.0.9" {
		t.Errorf("the backend is spoken to from %s", got)
	}
	if self.Mark == 0 {
		t.Skip("marks need root")
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var mark int
	if controlErr := raw.Control(func(fd uintptr) { mark, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK) }); controlErr != nil || err != nil {
		t.Fatal(controlErr, err)
	}
	if uint32(mark) != 0xcb010102 {
		t.Errorf("the connection's mark is %x", uint32(mark))
	}
}
