// Package shim holds a container's process: it gives it a root, namespaces, a cgroup, a log, and remembers how it ended, so that containers outlive the kubelet.
//
// It runs in processes of its own, which are this program called by the names below. They do their work while packages are initialized, before Kubernetes' packages, and
// then exit: so a shim costs milliseconds to start and few megabytes to keep, though the program is a hundred. That rests on the order of the Go specification (a package
// is initialized once those that it imports are; among the ready, by import path) and on importing little: nothing from outside but golang.org/x/sys.
//
// A container's root is the machine's /, copied on write into a tmpfs that ends with the container. PID, mount, UTS and IPC namespaces are its own; users, capabilities,
// seccomp and resource limits are not restricted: this is for trying things out, and isolates nobody.
package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What this program is called (argv[0]) when it is one of the processes of a container.
const (
	shimName = "container-shim" // waits for a container; its argument is the container's directory
	initName = "container-init" // becomes the container's first process; the same argument
	execName = "container-exec" // runs a command in a container; its argument is an execSpec in JSON
)

func init() {
	if len(os.Args) != 2 {
		return
	}
	var role func(string) int
	switch os.Args[0] {
	case shimName:
		role = shim
	case initName:
		role = initContainer
	case execName:
		role = execInContainer
	default:
		return
	}
	// Namespaces are a thread's: this one enters them and starts what must be in them.
	runtime.LockOSThread()
	os.Exit(role(os.Args[1]))
}

// Spec is a container to run, written as spec.json into its directory.
type Spec struct {
	Args     []string // the command, looked up in PATH of Env inside
	Env      []string
	Dir      string // working directory; made if missing
	Hostname string
	NetNS    string // path of the network namespace, "" for that of the kubelet
	Cgroup   string // directory in a cgroup v2 hierarchy, made if missing
	Terminal bool
	Stdin    bool // whether what is written to [Stdin] reaches the process
	Once     bool // whether its input ends when the first writer is done
	Log      string
	Files    map[string]string // contents by path, put into the root before Mounts
	Mounts   []Mount
}

// Mount shows a file or directory of the machine in a container.
type Mount struct {
	Source, Target string
	ReadOnly       bool
}

// Names in a container's directory.
const (
	specFile  = "spec.json"
	startFile = "start.json"
	exitFile  = "exit.json"

	// Stdin is a FIFO for the process's input.
	Stdin = "stdin"
	// Resize is a FIFO for the size of its terminal, a [Size] in JSON at a time.
	Resize = "resize"
)

// Size of a terminal in characters.
type Size struct{ Rows, Columns uint16 }

// Start tells of a container that was started.
type Start struct {
	At       time.Time
	PID      int // of the container's first process, as the machine sees it
	Shim     int
	ShimTime string // when the shim started, in the kernel's ticks: tells it from a later process of the same number
}

// Exit tells how a container ended.
type Exit struct {
	At      time.Time
	Code    int // the exit status, 128+n after signal n
	Reason  string
	Message string `json:",omitempty"`
}

// Reasons of an [Exit], those of other runtimes.
const (
	Completed  = "Completed"
	Failed     = "Error"
	StartError = "StartError"
	Unknown    = "ContainerStatusUnknown"
)

// startFailed is the exit status of what could not be started, that of other runtimes.
const startFailed = 128

// ReadStart and ReadExit return what the shim of the container in dir has written; fs.ErrNotExist if it has not.
func ReadStart(dir string) (Start, error) { return read[Start](filepath.Join(dir, startFile)) }

// ReadExit is described at [ReadStart].
func ReadExit(dir string) (Exit, error) { return read[Exit](filepath.Join(dir, exitFile)) }

// Alive tells whether the shim runs.
func (s Start) Alive() bool { return startTime(s.Shim) == s.ShimTime }

func read[T any](path string) (T, error) {
	var v T
	b, err := os.ReadFile(path)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return v, fmt.Errorf("reading %s: %w", path, err)
	}
	return v, nil
}

// write replaces the file at once, so that a reader sees all of it or nothing.
func write(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// startTime returns when a process started (field 22 of /proc/PID/stat), "" if there is none.
func startTime(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:]) // the name before may hold anything
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}

// OpenTerminal returns both ends of a new terminal.
func OpenTerminal() (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fd := int(master.Fd())
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, slave, nil
}

// Set gives a terminal that size.
func (s Size) Set(terminal *os.File) error {
	return unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Columns})
}

func openCgroup(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the cgroup %s: %w", dir, err)
	}
	return os.Open(dir)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
