package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"causeway/lb/l7/state"
)

// adminTimeout bounds a question to a proxy's admin socket.
const adminTimeout = time.Second

// maxListeners that a proxy hands on; it has one of each family.
const maxListeners = 16

// proxySockets are the admin sockets of this node's proxies: DIR/N.sock, a higher N for a later one. They are how proxies are found, also by the next agent.
type proxySockets struct{ dir string }

func (s proxySockets) path(n int) string { return filepath.Join(s.dir, strconv.Itoa(n)+".sock") }

// check refuses a directory that is too deep for the name of a socket.
func (s proxySockets) check() error {
	if longest := s.path(9999) + listenersSuffix; len(longest) > 107 {
		return fmt.Errorf("stateDir: the proxy's sockets would be called like %s, and a unix socket's path holds at most 107 bytes: choose a shorter directory", longest)
	}
	return nil
}

// listenersSuffix is what the path of a proxy's socket that hands on listeners ends with; see state/report.go.
const listenersSuffix = ".fds"

// list returns the numbers of the sockets that there are, in order.
func (s proxySockets) list() []int {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil
	}
	var all []int
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".sock"); ok {
			if n, err := strconv.Atoi(name); err == nil && n > 0 {
				all = append(all, n)
			}
		}
	}
	slices.Sort(all)
	return all
}

// remove removes what a proxy that is no more has left.
func (s proxySockets) remove(n int) {
	os.Remove(s.path(n))
	os.Remove(s.path(n) + listenersSuffix)
}

// owner returns the process that serves a socket, 0 if none does.
func (s proxySockets) owner(n int) (int, error) {
	conn, err := net.DialTimeout("unix", s.path(n), adminTimeout)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil || err != nil {
		return 0, errors.Join(e, err)
	}
	return int(cred.Pid), nil
}

// proxyAdmin asks one proxy. Each question has a connection of its own: there are few, and none is left behind.
type proxyAdmin struct{ socket string }

func (a proxyAdmin) client() *http.Client {
	dialer := net.Dialer{Timeout: adminTimeout}
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", a.socket)
		},
	}}
}

// open sends a request and returns the answer's body if it is 2xx; the caller closes it.
func (a proxyAdmin) open(ctx context.Context, method, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://proxy"+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := a.client().Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking the proxy at %s: %w", a.socket, err)
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, fmt.Errorf("the proxy at %s answers %s: %s", a.socket, resp.Status, bytes.TrimSpace(text))
	}
	return resp.Body, nil
}

func (a proxyAdmin) ask(ctx context.Context, method, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	body, err := a.open(ctx, method, path)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return fmt.Errorf("reading the answer of the proxy at %s to %s: %w", a.socket, path, err)
	}
	return nil
}

func (a proxyAdmin) status(ctx context.Context) (s state.ProxyStatus, err error) {
	return s, a.ask(ctx, http.MethodGet, "/v1/proxy", &s)
}

func (a proxyAdmin) ports(ctx context.Context) (ports []state.PortStatus, err error) {
	return ports, a.ask(ctx, http.MethodGet, "/v1/ports", &ports)
}

func (a proxyAdmin) drain(ctx context.Context) error {
	var s state.ProxyStatus
	return a.ask(ctx, http.MethodPost, "/v1/drain", &s)
}

// listeners takes the proxy's listeners over, which it keeps, too.
func (a proxyAdmin) listeners() (_ []*net.TCPListener, err error) {
	conn, err := net.DialTimeout("unix", a.socket+listenersSuffix, adminTimeout)
	if err != nil {
		return nil, fmt.Errorf("asking the proxy for its listeners: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(adminTimeout)); err != nil {
		return nil, err
	}
	data, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4*maxListeners))
	n, oobn, flags, _, err := conn.(*net.UnixConn).ReadMsgUnix(data, oob)
	if err != nil {
		return nil, fmt.Errorf("reading the proxy's listeners from %s: %w", conn.RemoteAddr(), err)
	}
	var fds []int
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	for _, m := range messages {
		if got, e := unix.ParseUnixRights(&m); e == nil {
			fds = append(fds, got...)
		}
	}
	var all []*net.TCPListener
	for _, fd := range fds {
		l, e := listenerOf(fd)
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		all = append(all, l)
	}
	if err == nil && (n != 1 || flags&unix.MSG_CTRUNC != 0 || int(data[0]) != len(all) || len(all) == 0) {
		err = fmt.Errorf("the proxy at %s hands on %d listeners, and says that there are %d", a.socket, len(all), data[0])
	}
	if err != nil {
		closeAll(all)
		return nil, err
	}
	// IPv4's first, as they were opened.
	slices.SortFunc(all, func(a, b *net.TCPListener) int {
		return a.Addr().(*net.TCPAddr).AddrPort().Compare(b.Addr().(*net.TCPAddr).AddrPort())
	})
	return all, nil
}

// listenerOf makes a listener of a descriptor, which it closes.
func listenerOf(fd int) (*net.TCPListener, error) {
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "listener") // A descriptor that does not block stays one that does not.
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("a listener was handed on that is none: %w", err)
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("a listener of %s was handed on, want one of TCP", l.Addr())
	}
	return tcp, nil
}

// listenerFile returns a file of a listener for another process. TCPListener.File would have the socket block, for all who have it, as soon as a process is
// started with it.
func listenerFile(l *net.TCPListener) (*os.File, error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	dup := -1
	if e := raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); e != nil || err != nil {
		return nil, errors.Join(e, err)
	}
	return os.NewFile(uintptr(dup), "listener"), nil
}

func closeAll(listeners []*net.TCPListener) {
	for _, l := range listeners {
		l.Close()
	}
}

// openProxyListeners opens a listener of each family that there is, on the loopback: connections get there by the data path alone.
func openProxyListeners(ctx context.Context) ([]*net.TCPListener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false) // The data path can hand connections to listeners of plain TCP alone.
	v4, err := config.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("opening the proxy's listener: %w", err)
	}
	all := []*net.TCPListener{v4.(*net.TCPListener)}
	switch v6, err := config.Listen(ctx, "tcp6", "[::1]:0"); {
	case err == nil:
		all = append(all, v6.(*net.TCPListener))
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EADDRNOTAVAIL): // This node has no IPv6.
	default:
		v4.Close()
		return nil, fmt.Errorf("opening the proxy's listener for IPv6: %w", err)
	}
	return all, nil
}
