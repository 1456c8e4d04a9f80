package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// socketDir is where WireGuard in user space is driven from: wgctrl looks there for NAME.sock
// (https://www.wireguard.com/xplatform/).
const socketDir = "/var/run/wireguard"

func socketPath(device string) string { return filepath.Join(socketDir, device+".sock") }

// process is what is known of a slot's process in user space.
type process struct {
	pid      int // 0: none
	started  time.Time
	failures int       // in a row: it ended soon after its start, or did not start
	next     time.Time // when it may be started again
	silent   time.Time // since when it has not answered; zero: it does
}

// Supervision of the process.
const (
	startWithin  = 5 * time.Second // for the process to make its device and socket
	endWithin    = 2 * time.Second // for the process to end by itself before it is killed
	steadyAfter  = 3 * time.Second // a process that has lived so long has not failed to start
	firstBackoff = 200 * time.Millisecond
	longestPause = 10 * time.Second
	largestLog   = 1 << 20 // bytes; a larger one begins anew with the next process
)

// ensureProcess returns the device of a process in user space: of the one that lives, or of a new one.
func (w *WireGuard) ensureProcess(ctx context.Context, s *slot, link netlink.Link, now time.Time) (netlink.Link, error) {
	pid, err := w.findProcess(s)
	if err != nil {
		return nil, err
	}
	stuck := pid != 0 && s.stuck(now)
	if stuck {
		w.log.Warn("WireGuard's process does not answer, and is killed.", "device", s.name, "pid", pid)
	}
	if pid != 0 && link != nil && !stuck {
		s.process.pid = pid
		if now.Sub(s.process.started) > steadyAfter {
			s.process.failures = 0
		}
		return link, nil
	}
	if err := w.endProcess(ctx, s); err != nil { // One without a device is about to end anyway.
		return nil, err
	}
	if link != nil {
		if err := w.links.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, fmt.Errorf("removing device %s, which has no process: %w", s.name, err)
		}
	}
	return w.startProcess(ctx, s, now)
}

// findProcess returns the process that serves the slot's socket, 0 if there is none. It refuses a socket that somebody else serves.
func (w *WireGuard) findProcess(s *slot) (int, error) {
	path := socketPath(s.name)
	conn, err := net.DialTimeout("unix", path, time.Second)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return 0, nil // It is gone, or has just begun and does not listen yet.
	}
	if err != nil {
		return 0, fmt.Errorf("asking WireGuard's process of %s: %w", s.name, err)
	}
	defer conn.Close()
	pid, err := servedBy(conn.(*net.UnixConn))
	if err != nil {
		return 0, fmt.Errorf("asking who serves %s: %w", path, err)
	}
	if !w.space.hasProcess(pid) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); errors.Is(err, fs.ErrNotExist) {
			return 0, nil // It has ended just now.
		}
		return 0, hopeless{fmt.Errorf("the socket %s is served by process %d, in another network namespace: configure another encryption.deviceName, sockets of all namespaces are in one directory", path, pid)}
	}
	if !w.isOurs(s, pid) {
		return 0, hopeless{fmt.Errorf("the socket %s is served by process %d, which Causeway has not started: stop it, or configure another encryption.deviceName", path, pid)}
	}
	return pid, nil
}

func servedBy(conn *net.UnixConn) (pid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil || err != nil {
		return 0, errors.Join(e, err)
	}
	return int(cred.Pid), nil
}

// arguments of the process, after the command.
func (w *WireGuard) arguments(s *slot) []string {
	return []string{s.name, fmt.Sprint(w.cfg.MTU), fmt.Sprint(w.cfg.VXLANPort)}
}

// isOurs tells whether a process was started for the slot, by this agent or one before it: maybe of another version, from
// another path, with another MTU.
func (w *WireGuard) isOurs(s *slot, pid int) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	n := len(w.cfg.Command) + 1
	return len(w.cfg.Command) > 0 && len(args) >= n && args[n-1] == s.name && slices.Equal(args[1:n-1], w.cfg.Command[1:])
}

// startProcess starts a process and returns its device when it is there. It is a session of its own and outlives the agent.
func (w *WireGuard) startProcess(ctx context.Context, s *slot, now time.Time) (netlink.Link, error) {
	if now.Before(s.process.next) {
		return nil, fmt.Errorf("WireGuard's process in user space has ended %d times soon after its start, and waits for the next one: %s", s.process.failures, w.lastWords(s, 0))
	}
	if s.process.pid != 0 && now.Sub(s.process.started) > steadyAfter {
		s.process.failures = 0
	}
	s.process.started = now
	link, err := w.tryStart(ctx, s)
	// A process that ends soon after its start has failed, too: it is counted beforehand, and forgiven when it has lived for a while.
	pause := time.Duration(0)
	if s.process.failures > 0 {
		pause = min(firstBackoff<<min(s.process.failures-1, 10), longestPause)
	}
	s.process.failures++
	s.process.next = time.Now().Add(pause)
	return link, err
}

func (w *WireGuard) tryStart(ctx context.Context, s *slot) (netlink.Link, error) {
	if len(w.cfg.Command) == 0 {
		return nil, hopeless{errors.New("WireGuard in user space needs a command that runs it, and none is configured")}
	}
	log, err := openLog(w.logPath(s))
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", s.name, err)
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", s.name, err)
	}
	cmd := exec.Command(w.cfg.Command[0], append(slices.Clone(w.cfg.Command[1:]), w.arguments(s)...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if w.cfg.Cgroup != "" {
		dir, err := openCgroup(w.cfg.Cgroup)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if err := w.space.run(cmd.Start); err != nil {
		return nil, fmt.Errorf("starting WireGuard in user space: %w", err)
	}
	s.process.pid = cmd.Process.Pid
	defer cmd.Process.Release()
	return w.awaitProcess(ctx, s, from)
}

// awaitProcess returns the device of a process that was just started.
func (w *WireGuard) awaitProcess(ctx context.Context, s *slot, logFrom int64) (netlink.Link, error) {
	deadline := time.Now().Add(startWithin)
	for {
		if !alive(s.process.pid) {
			return nil, fmt.Errorf("WireGuard's process in user space ended at once: %s", w.lastWords(s, logFrom))
		}
		if pid, err := w.findProcess(s); err != nil {
			return nil, err
		} else if pid != 0 {
			if link, err := w.findDevice(s); err == nil && link != nil {
				return link, nil
			}
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("WireGuard's process in user space has no device %s after %s: see %s", s.name, startWithin, w.logPath(s)), w.endProcess(ctx, s))
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// endProcess ends the process that serves the slot's socket or was started last, if any, and removes what is left of its socket.
func (w *WireGuard) endProcess(ctx context.Context, s *slot) error {
	pid, err := w.findProcess(s)
	if err != nil {
		return err
	}
	if pid == 0 && s.process.pid != 0 && w.isOurs(s, s.process.pid) {
		pid = s.process.pid
	}
	s.process.pid = 0
	if pid == 0 {
		return removeSocket(s.name)
	}
	signals := []unix.Signal{unix.SIGTERM, unix.SIGKILL}
	if !s.process.silent.IsZero() {
		signals = signals[1:] // It would not hear the first.
	}
	s.process.silent = time.Time{}
	for _, signal := range signals {
		if err := unix.Kill(pid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("ending WireGuard's process %d: %w", pid, err)
		}
		for deadline := time.Now().Add(endWithin); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
			if !alive(pid) {
				return removeSocket(s.name)
			}
		}
	}
	return fmt.Errorf("WireGuard's process %d does not end", pid)
}

func removeSocket(device string) error {
	if err := os.Remove(socketPath(device)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the socket of WireGuard's process: %w", err)
	}
	return nil
}

// alive tells whether a process runs. One that has ended and is this one's child is reaped: nobody else would do it. Until it can be, some of its
// threads still run, though its state may be that of a zombie already.
func alive(pid int) bool {
	if got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); err == nil {
		return got != pid
	}
	state := processState(pid)
	return state != "" && state != "Z" && state != "X"
}

func (w *WireGuard) logPath(s *slot) string { return filepath.Join(w.cfg.StateDir, s.name+".log") }

func openLog(path string) (*os.File, error) {
	mode := os.O_CREATE | os.O_APPEND | os.O_WRONLY
	if info, err := os.Stat(path); err == nil && info.Size() > largestLog {
		mode |= os.O_TRUNC
	}
	return os.OpenFile(path, mode, 0o600)
}

// lastWords returns the last line that the process wrote into its log.
func (w *WireGuard) lastWords(s *slot, from int64) string {
	data, err := os.ReadFile(w.logPath(s))
	if err != nil || int64(len(data)) < from {
		return "see " + w.logPath(s)
	}
	lines := strings.Split(strings.TrimSpace(string(data[from:])), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return last
	}
	return "it said nothing"
}

// openCgroup opens a cgroup's directory, which is made if it is missing.
func openCgroup(path string) (*os.File, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, fmt.Errorf("making the cgroup %s for WireGuard's process: %w", path, err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the cgroup for WireGuard's process: %w", err)
	}
	return dir, nil
}
