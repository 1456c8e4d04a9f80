package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// execGrace is how long a command may take to end once its context has.
const execGrace = 2 * time.Second

// Stdio of a command; what is nil is /dev/null.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// Exec runs a command at a target until it ends, and returns its exit status, 128+n if signal n ended
// it. The bed's own program is found as "clustermesh". When ctx ends the command gets SIGTERM.
func (b *Bed) Exec(ctx context.Context, t Target, argv []string, io Stdio) (int, error) {
	cmd, err := b.startExec(ctx, t, argv, io)
	if err != nil {
		return -1, err
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return -1, ctx.Err()
	case errors.As(err, &exit):
		ws := exit.Sys().(syscall.WaitStatus)
		return exitCode(unix.WaitStatus(ws)), nil
	case err != nil:
		return -1, fmt.Errorf("running %s at %s: %w", argv[0], t, err)
	}
	return 0, nil
}

// startExec starts a command at a target; the caller waits for it. When ctx ends it gets SIGTERM, and SIGKILL soon after.
func (b *Bed) startExec(ctx context.Context, t Target, argv []string, io Stdio) (*exec.Cmd, error) {
	pl, path, err := b.prepareExec(t, argv)
	if err != nil {
		return nil, err
	}
	cg, err := os.Open(pl.cgroup)
	if err != nil {
		return nil, fmt.Errorf("opening the cgroup of %s: %w", t, err)
	}
	defer cg.Close()
	cmd := exec.CommandContext(ctx, path)
	cmd.Args, cmd.Env = argv, pl.environ(b.layout)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = io.In, io.Out, io.Err
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cg.Fd())}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = execGrace
	// Only the fork must happen inside: the threads that copy input and output are anywhere.
	if err := inNS(pl.netns, cmd.Start); err != nil {
		return nil, fmt.Errorf("running %s at %s: %w", argv[0], t, err)
	}
	return cmd, nil
}

// Become replaces this process by a command at a target, so that the command has this process's terminal, its
// signals and its exit status. It returns only if that fails.
func (b *Bed) Become(t Target, argv []string) error {
	pl, path, err := b.prepareExec(t, argv)
	if err != nil {
		return err
	}
	ns, err := netns.GetFromPath(netnsPath(pl.netns))
	if err != nil {
		return fmt.Errorf("opening the network namespace %s: %w", pl.netns, err)
	}
	// The new program keeps the namespace of the thread that makes the call.
	runtime.LockOSThread()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("entering the network namespace %s: %w", pl.netns, err)
	}
	if err := os.WriteFile(filepath.Join(pl.cgroup, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("entering the cgroup of %s: %w", t, err)
	}
	if err := syscall.Exec(path, argv, pl.environ(b.layout)); err != nil {
		return fmt.Errorf("%s %w at %s: %w", argv[0], ErrCannotRun, t, err)
	}
	return nil
}

// Errors of commands that cannot be run; test with errors.Is.
var (
	// ErrNoCommand says that there is no such program.
	ErrNoCommand = errors.New("no such command")
	// ErrCannotRun says that the program is there but cannot be run.
	ErrCannotRun = errors.New("cannot be run")
)

func (b *Bed) prepareExec(t Target, argv []string) (place, string, error) {
	if len(argv) == 0 {
		return place{}, "", errors.New("no command given; write it after --")
	}
	s, err := b.readState()
	if err != nil {
		return place{}, "", err
	}
	pl, err := b.find(s, t)
	if err != nil {
		return place{}, "", err
	}
	path, err := lookPath(argv[0], b.binDir())
	if err != nil {
		return place{}, "", err
	}
	return pl, path, makeCgroup(pl.cgroup)
}
