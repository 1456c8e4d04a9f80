package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"causeway/tunnel/tun"
)

// ServeWireGuard is what a process in user space does: it makes a TUN device of the name, in the network namespace that it runs in, and is WireGuard for
// it until ctx ends or the device is removed. vxlanPort is the UDP port of the packets that it carries. It is driven through the socket /var/run/wireguard/NAME.sock, which it removes at the end.
// What it has to say it writes to log, a line each.
func ServeWireGuard(ctx context.Context, name string, mtu int, vxlanPort uint16, log io.Writer) error {
	link, err := openTUN(name, mtu, vxlanPort)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("the kernel has no TUN devices: load the module tun, and see that /dev/net/tun is there: %w", err)
	}
	if err != nil {
		return fmt.Errorf("making the TUN device %s: %w", name, err)
	}
	socket, err := openSocket(name)
	if err != nil {
		return errors.Join(err, link.Close())
	}
	errorf := func(format string, args ...any) { fmt.Fprintf(log, format+"\n", args...) }
	wg := device.NewDevice(withoutState(link), conn.NewDefaultBind(), &device.Logger{Verbosef: device.DiscardLogf, Errorf: errorf})
	defer wg.Close()
	// It is up whether the link is or not, so that whoever sets the port is told if it is taken.
	if err := wg.Up(); err != nil {
		return errors.Join(fmt.Errorf("starting WireGuard for %s: %w", name, err), socket.Close())
	}
	ended := make(chan error, 1)
	go func() { ended <- accept(socket, wg) }()
	// The alias says that the device is ready, and whose it is.
	if err := mark(name); err != nil {
		return errors.Join(err, socket.Close(), <-ended)
	}
	select {
	case <-ctx.Done():
	case <-wg.Wait():
		err = fmt.Errorf("the device %s is gone", name)
	case err = <-ended:
		ended <- nil
	}
	err = errors.Join(err, socket.Close())
	<-ended
	return err
}

// openTUN makes the TUN device.
func openTUN(name string, mtu int, vxlanPort uint16) (wgtun.Device, error) {
	return tun.Open(name, mtu, vxlanPort)
}

// accept serves the socket until it is closed.
func accept(socket net.Listener, wg *device.Device) error {
	for {
		c, err := socket.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serving WireGuard's socket: %w", err)
		}
		go wg.IpcHandle(c)
	}
}

// openSocket listens at the device's socket, for root alone: the private key can be read there.
func openSocket(name string) (*net.UnixListener, error) {
	file, err := ipc.UAPIOpen(name)
	if err != nil {
		return nil, fmt.Errorf("listening at %s: %w", socketPath(name), err)
	}
	defer file.Close()
	listener, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("listening at %s: %w", socketPath(name), err)
	}
	socket, ok := listener.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("listening at %s: it is no unix socket", socketPath(name)), listener.Close())
	}
	socket.SetUnlinkOnClose(true)
	return socket, nil
}

func mark(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetAlias(link, wireGuardAlias)
	}
	if err != nil {
		return fmt.Errorf("setting the alias of %s: %w", name, err)
	}
	return nil
}

// stateless is a TUN device that does not tell when its link is set up or down.
type stateless struct {
	wgtun.Device
	events chan wgtun.Event
}

func withoutState(inner wgtun.Device) wgtun.Device {
	s := &stateless{inner, make(chan wgtun.Event)}
	go func() {
		defer close(s.events)
		for e := range inner.Events() {
			if e&wgtun.EventMTUUpdate != 0 {
				s.events <- wgtun.EventMTUUpdate
			}
		}
	}()
	return s
}

func (s *stateless) Events() <-chan wgtun.Event { return s.events }
