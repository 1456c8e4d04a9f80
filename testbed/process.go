package testbed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process names a process for good: the kernel may give its number to another one, but not with the same start.
type Process struct {
	PID int `json:"pid"`
	// Start is the process's start in clock ticks since boot (/proc/PID/stat, field 22).
	Start uint64 `json:"start"`
}

// processOf returns the process that has pid now.
func processOf(pid int) (*Process, error) {
	_, start, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	return &Process{PID: pid, Start: start}, nil
}

// readStat returns the state letter and the start of a process; see proc(5).
func readStat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The command's name may hold anything, even ")"; the fields begin after its last one.
	_, rest, ok := cutLast(string(b), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat: unexpected form", pid)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0][0], start, err
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// alive tells whether the process runs; one that waits to be reaped does not.
func (p *Process) alive() bool {
	if p == nil || p.PID <= 0 {
		return false
	}
	state, start, err := readStat(p.PID)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// signal reaches this very process or nobody; a process that is gone is no error.
func (p *Process) signal(sig unix.Signal) error {
	if p == nil || p.PID <= 1 || p.PID == os.Getpid() {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("sending %v to process %d: %w", sig, p.PID, err)
	}
	return nil
}

// waitGone waits until the process has ended or ctx has; it tells which.
func (p *Process) waitGone(ctx context.Context) bool {
	for p.alive() {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	return true
}

// spec of a process that outlives us.
type spec struct {
	argv   []string
	env    []string
	netns  string     // name of its network namespace; empty: this process's own
	cgroup string     // directory of its cgroup
	log    string     // file that gets its output, appended
	binDir string     // searched for argv[0] before PATH
	files  []*os.File // inherited, from descriptor 3 on
}

// spawn starts a process in a session of its own. The caller should reap it if it stays around; otherwise init does.
func spawn(s spec) (*Process, error) {
	path, err := lookPath(s.argv[0], s.binDir)
	if err != nil {
		return nil, err
	}
	logFile, err := os.OpenFile(s.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", s.argv[0], err)
	}
	defer logFile.Close()
	cg, err := os.Open(s.cgroup)
	if err != nil {
		return nil, fmt.Errorf("opening the cgroup of %s: %w", s.argv[0], err)
	}
	defer cg.Close()

	cmd := exec.Command(path)
	cmd.Args, cmd.Env, cmd.Dir = s.argv, s.env, "/"
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = logFile, logFile, s.files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(cg.Fd())}
	start := cmd.Start
	if s.netns != "" {
		// The child inherits the namespace of the thread that forks it.
		start = func() error { return inNS(s.netns, cmd.Start) }
	}
	if err := start(); err != nil {
		return nil, fmt.Errorf("starting %s in %s: %w", s.argv[0], cmp.Or(s.netns, "this network namespace"), err)
	}
	defer cmd.Process.Release()
	return processOf(cmd.Process.Pid)
}

// lookPath finds a program in binDir first, then in PATH.
func lookPath(name, binDir string) (string, error) {
	if !strings.Contains(name, "/") && binDir != "" {
		if p, err := exec.LookPath(filepath.Join(binDir, name)); err == nil {
			return p, nil
		}
	}
	path, err := exec.LookPath(name)
	if errors.Is(err, fs.ErrPermission) {
		return "", fmt.Errorf("%s %w: %w", name, ErrCannotRun, err)
	}
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoCommand, err)
	}
	return filepath.Abs(path)
}

// reap collects p's exit code if p is a child of ours that has ended.
func (p *Process) reap() (code int, ok bool) {
	var ws unix.WaitStatus
	if pid, err := unix.Wait4(p.PID, &ws, unix.WNOHANG, nil); err != nil || pid != p.PID {
		return 0, false
	}
	return exitCode(ws), true
}

// exitCode follows the shell: 128+n for signal n.
func exitCode(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
