package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"causeway/lb/l7/state"
)

const (
	// proxyAsk is the time between two questions how a proxy is; until it is ready they follow each other faster.
	proxyAsk, proxyAskFirst = 250 * time.Millisecond, 10 * time.Millisecond
	// largestProxyLog is where a log begins anew with the next process, in bytes.
	largestProxyLog = 16 << 20
)

// proxyProcess is a proxy that runs, or has run: this agent's child, or one that an earlier agent has started.
type proxyProcess struct {
	number  int
	pid     int
	started time.Time
	admin   proxyAdmin
	pidfd   *os.File
	logFrom int64         // where in the log its words begin
	exited  chan struct{} // closed at its end

	mu     sync.Mutex
	status state.ProxyStatus
	heard  time.Time // when it answered last
	spoken bool      // it has answered ever
}

// arguments that the process with a number has after its command.
func (p *proxies) arguments(n int, listeners int) []string {
	args := []string{"--agent", p.cfg.agent, "--admin", p.sockets.path(n), "--listeners", strconv.Itoa(listeners)}
	if p.cfg.accessLog > 0 {
		args = append(args, "--access-log", strconv.FormatFloat(p.cfg.accessLog, 'f', -1, 64))
	}
	if p.cfg.otlp != "" {
		args = append(args, "--otlp", p.cfg.otlp)
	}
	return args
}

// isOurs tells whether a process was started as the proxy with a number, by this agent or one before it.
func (p *proxies) isOurs(pid, n int) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	i := slices.Index(args, "--admin")
	return i > 0 && i+1 < len(args) && args[i+1] == p.sockets.path(n)
}

// start starts a process with copies of the listeners. It is a session of its own and outlives the agent.
func (p *proxies) start(ctx context.Context, listeners []*net.TCPListener) (*proxyProcess, error) {
	p.number++
	proc := &proxyProcess{number: p.number, started: time.Now(), heard: time.Now(), admin: proxyAdmin{p.sockets.path(p.number)}, exited: make(chan struct{})}
	p.sockets.remove(proc.number)
	log, err := openProxyLog(p.logPath())
	if err != nil {
		return nil, fmt.Errorf("opening the proxy's log: %w", err)
	}
	defer log.Close()
	if info, err := log.Stat(); err == nil {
		proc.logFrom = info.Size()
	}
	cmd := exec.Command(p.cfg.command[0], append(slices.Clone(p.cfg.command[1:]), p.arguments(proc.number, len(listeners))...)...)
	if _, err := os.Stat(cmd.Path); err != nil {
		cmd.Path, cmd.Err = "/proc/self/exe", nil // The program was removed; this one is still there.
	}
	cmd.Stdout, cmd.Stderr, cmd.Dir, cmd.Env = log, log, "/", append(os.Environ(), p.cfg.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	for _, l := range listeners {
		f, err := listenerFile(l)
		if err != nil {
			return nil, fmt.Errorf("copying a listener for the proxy: %w", err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	if p.cfg.cgroup != "" {
		if err := os.MkdirAll(p.cfg.cgroup, 0o755); err != nil {
			return nil, fmt.Errorf("making the cgroup %s for the proxy: %w", p.cfg.cgroup, err)
		}
		dir, err := os.Open(p.cfg.cgroup)
		if err != nil {
			return nil, fmt.Errorf("opening the cgroup for the proxy: %w", err)
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the proxy: %w", err)
	}
	proc.pid = cmd.Process.Pid
	defer cmd.Process.Release() //nolint:errcheck // Nothing waits for it but watch.
	return proc, p.watch(ctx, proc)
}

// watch asks a process how it is, and notes its end, until ctx ends.
func (p *proxies) watch(ctx context.Context, proc *proxyProcess) error {
	fd, err := unix.PidfdOpen(proc.pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watching the proxy, process %d: %w", proc.pid, err)
	}
	proc.pidfd = os.NewFile(uintptr(fd), "pidfd")
	end := context.AfterFunc(ctx, func() { proc.pidfd.Close() })
	p.watching.Go(func() {
		defer end()
		if proc.waitEnd() {
			_, _ = unix.Wait4(proc.pid, nil, unix.WNOHANG, nil) // If it is this one's child, nobody else reaps it.
			close(proc.exited)
			p.nudge()
		}
	})
	p.watching.Go(func() { p.ask(ctx, proc) })
	return nil
}

// waitEnd returns true when the process has ended, false if its pidfd was closed before.
func (proc *proxyProcess) waitEnd() bool {
	raw, err := proc.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n == 1
	}) == nil
}

// ask asks how the process is until it has ended.
func (p *proxies) ask(ctx context.Context, proc *proxyProcess) {
	for {
		s, err := proc.admin.status(ctx)
		proc.mu.Lock()
		news := err == nil && s.Synced != proc.status.Synced
		if err == nil {
			proc.status, proc.heard, proc.spoken = s, time.Now(), true
		}
		pause := proxyAsk
		if !proc.status.Synced && time.Since(proc.started) < proxyWithout {
			pause = proxyAskFirst
		}
		proc.mu.Unlock()
		if news {
			p.nudge()
		}
		select {
		case <-time.After(pause):
		case <-proc.exited:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (proc *proxyProcess) hasExited() bool {
	select {
	case <-proc.exited:
		return true
	default:
		return false
	}
}

// ready tells whether it can be given connections.
func (proc *proxyProcess) ready() bool {
	proc.mu.Lock()
	defer proc.mu.Unlock()
	return proc.status.Synced && !proc.hasExited()
}

// silence is how long it has not answered.
func (proc *proxyProcess) silence() time.Duration {
	proc.mu.Lock()
	defer proc.mu.Unlock()
	return time.Since(proc.heard)
}

func (proc *proxyProcess) snapshot() state.ProxyStatus {
	proc.mu.Lock()
	defer proc.mu.Unlock()
	s := proc.status
	s.PID = proc.pid
	return s
}

// kill ends a process at once, and waits for its end, which releases its listeners.
func (p *proxies) kill(proc *proxyProcess) error {
	if proc.hasExited() {
		return nil
	}
	if !p.isOurs(proc.pid, proc.number) {
		return nil // It has ended, and its number is another's.
	}
	raw, err := proc.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var killed error
	if err := raw.Control(func(fd uintptr) { killed = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	if killed != nil && !errors.Is(killed, unix.ESRCH) {
		return fmt.Errorf("killing the proxy, process %d: %w", proc.pid, killed)
	}
	select {
	case <-proc.exited:
	case <-time.After(2 * time.Second):
		return fmt.Errorf("the proxy, process %d, does not end although it was killed", proc.pid)
	}
	return nil
}

func openProxyLog(path string) (*os.File, error) {
	mode := os.O_CREATE | os.O_APPEND | os.O_WRONLY
	if info, err := os.Stat(path); err == nil && info.Size() > largestProxyLog {
		mode |= os.O_TRUNC
	}
	return os.OpenFile(path, mode, 0o600)
}

// lastWords returns the last line that a process wrote into the log.
func (p *proxies) lastWords(proc *proxyProcess) string {
	data, err := os.ReadFile(p.logPath())
	if err != nil || int64(len(data)) < proc.logFrom {
		return "see " + p.logPath()
	}
	lines := strings.Split(strings.TrimSpace(string(data[proc.logFrom:])), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return last
	}
	return "it said nothing"
}
