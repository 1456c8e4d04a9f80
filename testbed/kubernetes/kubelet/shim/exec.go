package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type execSpec struct {
	PID      int // a process whose namespaces are entered
	Args     []string
	Env      []string
	Dir      string
	Cgroup   string
	Terminal bool // whether the standard input is to be the controlling terminal
}

// Exec returns a command that runs args in the container which spec describes and whose first process is pid. Its exit status is that of args, 128+n after signal n;
// 127 if there is no such program and 126 if it cannot be run, with a word on the standard error. Both are killed when ctx ends.
func Exec(ctx context.Context, pid int, spec Spec, args []string, terminal bool) (*exec.Cmd, error) {
	b, err := json.Marshal(execSpec{PID: pid, Args: args, Env: spec.Env, Dir: spec.Dir, Cgroup: spec.Cgroup, Terminal: terminal})
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = time.Second
	cmd.Args = []string{execName, string(b)}
	cmd.Env = []string{}
	return cmd, nil
}

// ReadSpec returns what the container in dir was started with.
func ReadSpec(dir string) (Spec, error) { return read[Spec](dir + "/" + specFile) }

func execInContainer(arg string) int {
	var spec execSpec
	err := json.Unmarshal([]byte(arg), &spec)
	if err == nil {
		var code int
		if code, err = spec.run(); err == nil {
			return code
		}
	}
	fmt.Fprintln(os.Stderr, err)
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return 127
	}
	return 126
}

func (s execSpec) run() (int, error) {
	cg, err := os.Open(s.Cgroup)
	if err != nil {
		return 0, err
	}
	if err := enterNamespaces(s.PID); err != nil {
		return 0, err
	}
	argv0, err := enterDir(s.Args, s.Env, s.Dir)
	if err != nil {
		return 0, err
	}
	p, err := os.StartProcess(argv0, s.Args, &os.ProcAttr{
		Env: s.Env, Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: s.Terminal, Ctty: 0, UseCgroupFD: true, CgroupFD: int(cg.Fd())},
	})
	if err != nil {
		return 0, err
	}
	// Not by Pdeathsig: the child sees no parent in its PID namespace, and would take it for dead.
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGTERM)
	go func() {
		<-ended
		p.Kill()
	}()
	state, err := p.Wait()
	if err != nil {
		return 0, err
	}
	return exitCode(state.Sys().(syscall.WaitStatus)), nil
}

// enterNamespaces takes the calling thread into a process's namespaces, and its root with them; only what it starts is in the PID namespace.
func enterNamespaces(pid int) error {
	kinds := []struct {
		name string
		flag int
	}{{"net", unix.CLONE_NEWNET}, {"uts", unix.CLONE_NEWUTS}, {"ipc", unix.CLONE_NEWIPC}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS}}
	var open []*os.File
	for _, k := range kinds {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, k.name))
		if err != nil {
			return fmt.Errorf("the container has ended: %w", err)
		}
		defer f.Close()
		open = append(open, f)
	}
	// A root that threads share cannot be changed.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	for i, k := range kinds {
		if err := unix.Setns(int(open[i].Fd()), k.flag); err != nil {
			return fmt.Errorf("entering the container's %s namespace: %w", k.name, err)
		}
	}
	return nil
}
