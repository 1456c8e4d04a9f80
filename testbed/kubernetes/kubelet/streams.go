package kubelet

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/fsnotify/fsnotify"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	utilexec "k8s.io/utils/exec"

	"causeway/testbed/kubernetes/kubelet/shim"
)

// Exec implements CRI: it returns where to go for the streams.
func (r *Runtime) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if _, _, err := r.running(req.ContainerId); err != nil {
		return nil, err
	}
	return r.streaming.GetExec(req)
}

// Attach implements CRI, as Exec.
func (r *Runtime) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if _, _, err := r.running(req.ContainerId); err != nil {
		return nil, err
	}
	return r.streaming.GetAttach(req)
}

// PortForward implements CRI, as Exec.
func (r *Runtime) PortForward(_ context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	if _, err := r.sandbox(req.PodSandboxId); err != nil {
		return nil, err
	}
	return r.streaming.GetPortForward(req)
}

// ExecSync implements CRI.
func (r *Runtime) ExecSync(ctx context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	limited := ctx
	if req.Timeout > 0 {
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeout(ctx, time.Duration(req.Timeout)*time.Second)
		defer cancel()
	}
	var stdout, stderr bytes.Buffer
	code, err := r.exec(limited, req.ContainerId, req.Cmd, nil, &stdout, &stderr)
	if limited.Err() != nil {
		return nil, status.Errorf(codes.DeadlineExceeded, "%v did not end within %d s", req.Cmd, req.Timeout)
	}
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ExecSyncResponse{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), ExitCode: int32(code)}, nil
}

func (r *Runtime) command(ctx context.Context, id string, argv []string, terminal bool) (*exec.Cmd, error) {
	c, start, err := r.running(id)
	if err != nil {
		return nil, err
	}
	spec, err := shim.ReadSpec(c.dir)
	if err != nil {
		return nil, err
	}
	if terminal {
		spec.Env = append(spec.Env, "TERM=xterm")
	}
	return shim.Exec(ctx, start.PID, spec, argv, terminal)
}

// exec runs a command without a terminal in a container and returns its exit status.
func (r *Runtime) exec(ctx context.Context, id string, argv []string, in io.Reader, stdout, stderr io.Writer) (int, error) {
	cmd, err := r.command(ctx, id, argv, false)
	if err != nil {
		return 0, err
	}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if in != nil {
		// Not cmd.Stdin: the end of the command does not end the input.
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return 0, err
		}
		go func() {
			io.Copy(stdin, in)
			stdin.Close()
		}()
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	return waitFor(cmd)
}

func waitFor(cmd *exec.Cmd) (int, error) {
	err := cmd.Wait()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode(), nil
	case errors.Is(err, exec.ErrWaitDelay): // something that it started still has its output
		return 0, nil
	}
	return 0, err
}

func (r *Runtime) execTerminal(ctx context.Context, id string, argv []string, in io.Reader, out io.Writer, sizes <-chan remotecommand.TerminalSize) (int, error) {
	cmd, err := r.command(ctx, id, argv, true)
	if err != nil {
		return 0, err
	}
	master, slave, err := shim.OpenTerminal()
	if err != nil {
		return 0, err
	}
	defer master.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	err = cmd.Start()
	slave.Close()
	if err != nil {
		return 0, err
	}
	if in != nil {
		go io.Copy(master, in)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(out, master) // until nobody has the other end
	}()
	go func() {
		for {
			select {
			case s, ok := <-sizes:
				if !ok {
					return
				}
				shim.Size{Rows: s.Height, Columns: s.Width}.Set(master)
			case <-done:
				return
			}
		}
	}()
	code, err := waitFor(cmd)
	select {
	case <-done:
	case <-time.After(cmd.WaitDelay): // something that it started still has the terminal
	}
	return code, err
}

// streams is what the streaming server calls once a client is there.
type streams struct{ *Runtime }

func (s streams) Exec(ctx context.Context, id string, argv []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	var code int
	var err error
	if tty {
		code, err = s.execTerminal(ctx, id, argv, in, out, resize)
	} else {
		code, err = s.exec(ctx, id, argv, in, writer(out), writer(errOut))
	}
	if err == nil && code != 0 {
		err = utilexec.CodeExitError{Code: code, Err: fmt.Errorf("command terminated with exit code %d", code)}
	}
	return err
}

// writer is nil, not a nil in an interface, without one.
func writer(w io.WriteCloser) io.Writer {
	if w == nil {
		return nil
	}
	return w
}

// Attach shows what the container writes from now on, and gives it input.
func (s streams) Attach(ctx context.Context, id string, in io.Reader, out, errOut io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	c, start, err := s.running(id)
	if err != nil {
		return err
	}
	spec, err := shim.ReadSpec(c.dir)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if in != nil {
		// For reading and writing, which does not wait for the shim to open its end.
		fifo, err := os.OpenFile(filepath.Join(c.dir, shim.Stdin), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		go func() {
			io.Copy(fifo, in)
			fifo.Close()
		}()
	}
	if resize != nil {
		go func() {
			fifo, err := os.OpenFile(filepath.Join(c.dir, shim.Resize), os.O_RDWR, 0)
			if err != nil {
				return
			}
			defer fifo.Close()
			for {
				select {
				case <-ctx.Done():
					return
				case size, ok := <-resize:
					if !ok {
						return
					}
					json.NewEncoder(fifo).Encode(shim.Size{Rows: size.Height, Columns: size.Width})
				}
			}
		}()
	}
	return follow(ctx, spec.Log, start.Alive, func(stream string, text []byte) error {
		w := writer(out)
		if stream == "stderr" {
			w = writer(errOut)
		}
		if w == nil {
			return nil
		}
		_, err := w.Write(text)
		return err
	})
}

// follow gives what is written to a log from now on, until its writer is gone.
func follow(ctx context.Context, path string, alive func() bool, emit func(stream string, text []byte) error) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watcher.Close()
	if err := watcher.Add(path); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	lines := bufio.NewReader(f)
	var part []byte
	for {
		last := !alive() // before reading: what is there then is all
		for {
			b, err := lines.ReadBytes('\n')
			part = append(part, b...)
			if err != nil {
				break
			}
			stream, text, err := parseLog(part)
			if err == nil {
				err = emit(stream, text)
			}
			if err != nil {
				return err
			}
			part = nil
		}
		if last {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-watcher.Events:
		case err := <-watcher.Errors:
			return err
		case <-time.After(time.Second): // the end of the shim is no event
		}
	}
}

// parseLog takes a line of a CRI log apart; see package shim for the format.
func parseLog(line []byte) (stream string, text []byte, err error) {
	f := bytes.SplitN(line, []byte(" "), 4)
	if len(f) < 4 {
		return "", nil, fmt.Errorf("a log has the line %q, which is none of time, stream, tag and text", line)
	}
	if string(f[2]) == "P" {
		return string(f[1]), f[3][:len(f[3])-1], nil
	}
	return string(f[1]), f[3], nil
}

// PortForward connects a client to a port of the pod's loopback.
func (s streams) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	sb, err := s.sandbox(id)
	if err != nil {
		return err
	}
	var conn net.Conn
	err = inNetNS(sb.NetNS, func() error {
		var errs error
		for _, host := range []string{"127.0.0.1", "::1"} {
			// Alone on this thread: the standard dialer starts goroutines for names, not for addresses.
			c, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
			if err == nil {
				conn = c
				return nil
			}
			errs = errors.Join(errs, err)
		}
		return errs
	})
	if err != nil {
		return fmt.Errorf("forwarding to port %d of %s: %w", port, sb.name(), err)
	}
	defer conn.Close()
	go func() {
		io.Copy(conn, stream)
		conn.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(stream, conn)
	return err
}
