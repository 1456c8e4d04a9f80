package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// link follows whether the interface is up, and its MTU.
type link struct {
	name   string
	index  uint32
	socket int // for requests in the interface's namespace, whichever thread asks
	news   *os.File
	setMTU func(int)
	up     bool
	mtu    int
	events chan tun.Event
	quit   chan struct{}
	done   chan struct{}
}

// watchLink sets the interface's MTU and follows it from then on; setMTU is told of the MTU, before the event of it.
func watchLink(name string, mtu int, setMTU func(int)) (*link, error) {
	l := &link{name: name, setMTU: setMTU, events: make(chan tun.Event, 4), quit: make(chan struct{}), done: make(chan struct{})}
	if err := l.open(mtu); err != nil {
		return nil, errors.Join(err, l.release())
	}
	go l.follow()
	return l, nil
}

func (l *link) open(mtu int) (err error) {
	l.socket = -1
	if l.socket, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("opening a socket for TUN device %s: %w", l.name, err)
	}
	if err := l.subscribe(); err != nil {
		return fmt.Errorf("following TUN device %s: %w", l.name, err)
	}
	request, err := unix.NewIfreq(l.name)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(l.socket, unix.SIOCGIFINDEX, request); err != nil {
		return fmt.Errorf("finding TUN device %s: %w", l.name, err)
	}
	l.index = request.Uint32()
	if mtu < 0 || mtu > maxPacket {
		return fmt.Errorf("the MTU of TUN device %s cannot be %d: give one of 68 to %d bytes", l.name, mtu, maxPacket)
	}
	request.SetUint32(uint32(mtu))
	if err := unix.IoctlIfreq(l.socket, unix.SIOCSIFMTU, request); err != nil {
		return fmt.Errorf("setting the MTU of TUN device %s to %d: %w", l.name, mtu, err)
	}
	l.mtu = mtu
	l.setMTU(mtu)
	return nil
}

// subscribe opens the socket on which the kernel tells of changes of interfaces.
func (l *link) subscribe() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		unix.Close(fd)
		return err
	}
	l.news = os.NewFile(uintptr(fd), "netlink")
	return nil
}

// follow reads the news until close, or until the interface is gone.
func (l *link) follow() {
	defer close(l.done)
	defer close(l.events)
	buffer := make([]byte, 1<<16)
	for l.look() && l.await(buffer) {
	}
}

// await waits for news of the interface. It returns false after close.
func (l *link) await(buffer []byte) bool {
	for {
		n, err := l.news.Read(buffer)
		if errors.Is(err, unix.ENOBUFS) { // Some news were lost.
			return true
		}
		if err != nil {
			return false
		}
		if l.concerns(buffer[:n]) {
			return true
		}
	}
}

// concerns tells whether a message of the kernel's is about the interface. One that cannot be read may be.
func (l *link) concerns(b []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return true
	}
	for _, m := range messages {
		if len(m.Data) >= unix.SizeofIfInfomsg && binary.NativeEndian.Uint32(m.Data[4:]) == l.index {
			return true
		}
	}
	return false
}

// look asks for the interface's state, and tells what has changed. It returns false after close.
func (l *link) look() bool {
	flags, err1 := unix.NewIfreq(l.name)
	mtu, err2 := unix.NewIfreq(l.name)
	if errors.Join(err1, err2) != nil || unix.IoctlIfreq(l.socket, unix.SIOCGIFFLAGS, flags) != nil || unix.IoctlIfreq(l.socket, unix.SIOCGIFMTU, mtu) != nil {
		return true // It is gone, or called otherwise. Who reads packets will notice.
	}
	if now := int(mtu.Uint32()); now != l.mtu {
		l.mtu = now
		l.setMTU(now)
		if !l.tell(tun.EventMTUUpdate) {
			return false
		}
	}
	if now := flags.Uint16()&unix.IFF_UP != 0; now != l.up {
		l.up = now
		if now {
			return l.tell(tun.EventUp)
		}
		return l.tell(tun.EventDown)
	}
	return true
}

func (l *link) tell(e tun.Event) bool {
	select {
	case l.events <- e:
		return true
	case <-l.quit:
		return false
	}
}

// close ends the events.
func (l *link) close() error {
	close(l.quit)
	err := l.news.Close()
	<-l.done
	l.news = nil
	return errors.Join(err, l.release())
}

// release closes what is open.
func (l *link) release() (err error) {
	if l.news != nil {
		err = l.news.Close()
	}
	if l.socket >= 0 {
		err = errors.Join(err, unix.Close(l.socket))
	}
	return err
}
