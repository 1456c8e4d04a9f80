package shim

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// initContainer makes the container's root, enters it and becomes its command.
func initContainer(dir string) int {
	unix.CloseOnExec(report)
	err := becomeContainer(dir)
	fmt.Fprint(os.NewFile(report, "report"), err)
	return 1
}

func becomeContainer(dir string) error {
	// A container without its shim would end unnoticed.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	spec, err := read[Spec](filepath.Join(dir, specFile))
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("setting the hostname: %w", err)
	}
	if err := enterRoot(dir, spec); err != nil {
		return err
	}
	argv0, err := enterDir(spec.Args, spec.Env, spec.Dir)
	if err != nil {
		return err
	}
	return fmt.Errorf("running %s: %w", argv0, unix.Exec(argv0, spec.Args, spec.Env))
}

// enterDir goes to the working directory and looks the command up as it is seen from there.
func enterDir(args, env []string, dir string) (string, error) {
	if len(args) == 0 {
		return "", errors.New("there is no command to run: neither the image nor the container names one")
	}
	if dir == "" {
		dir = "/"
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("making the working directory: %w", err)
	}
	if err := os.Chdir(dir); err != nil {
		return "", fmt.Errorf("entering the working directory: %w", err)
	}
	os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	for _, v := range env {
		if path, ok := strings.CutPrefix(v, "PATH="); ok {
			os.Setenv("PATH", path)
		}
	}
	argv0, err := exec.LookPath(args[0])
	if errors.Is(err, exec.ErrDot) {
		err = nil
	}
	return argv0, err
}

// enterRoot makes the root and the mounts in it, and leaves the machine's.
func enterRoot(dir string, spec Spec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keeping the container's mounts to itself: %w", err)
	}
	// What comes from the machine is taken while its paths mean what they mean there.
	mounts, err := takeMounts(spec)
	if err != nil {
		return err
	}
	// A tmpfs, because an overlay may not write into what it shows.
	scratch := filepath.Join(dir, "scratch")
	upper, work, root := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work"), filepath.Join(scratch, "root")
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("container", scratch, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mounting a tmpfs for what the container writes: %w", err)
	}
	for _, d := range []string{upper, work, root} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("container", root, "overlay", 0, "lowerdir=/,upperdir="+upper+",workdir="+work); err != nil {
		return fmt.Errorf("mounting the container's root, an overlay over /: %w", err)
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	// The old root comes to lie on the new one, and is taken away.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("entering the container's root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leaving the machine's root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := systemMounts(); err != nil {
		return err
	}
	for path, content := range spec.Files {
		os.Remove(path) // it may be a link to somewhere else
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	for _, m := range mounts {
		if err := m.put(); err != nil {
			return fmt.Errorf("mounting %s at %s: %w", m.Source, m.Target, err)
		}
	}
	return nil
}

// systemMounts mounts what every Linux program expects.
func systemMounts() error {
	for _, m := range []struct {
		kind, target, options string
		flags                 uintptr
	}{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
		{"sysfs", "/sys", "", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
		{"tmpfs", "/dev", "mode=755", unix.MS_NOSUID | unix.MS_STRICTATIME},
		{"devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"tmpfs", "/dev/shm", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"mqueue", "/dev/mqueue", "", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.options)
		if errors.Is(err, unix.ENODEV) && m.kind == "mqueue" { // not every kernel has it, and hardly a program
			continue
		}
		if err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	if err := os.Mkdir("/dev/net", 0o755); err != nil {
		return err
	}
	for name, number := range map[string]uint64{
		"null": unix.Mkdev(1, 3), "zero": unix.Mkdev(1, 5), "full": unix.Mkdev(1, 7), "random": unix.Mkdev(1, 8), "urandom": unix.Mkdev(1, 9),
		"tty": unix.Mkdev(5, 0), "net/tun": unix.Mkdev(10, 200),
	} {
		path := "/dev/" + name
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(number)); err != nil {
			return fmt.Errorf("making %s: %w", path, err)
		}
		if err := os.Chmod(path, 0o666); err != nil {
			return err
		}
	}
	for name, to := range map[string]string{"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, "/dev/"+name); err != nil {
			return err
		}
	}
	return nil
}

// taken is a mount that hangs nowhere yet.
type taken struct {
	Mount
	tree int // descriptor
	file bool
	// only if there is nothing at Target
	fallback bool
}

func takeMounts(spec Spec) ([]taken, error) {
	var all []taken
	for _, m := range spec.Mounts {
		t, err := take(m)
		if err != nil {
			return nil, fmt.Errorf("opening %s for %s: %w", m.Source, m.Target, err)
		}
		all = append(all, t)
	}
	// The overlay shows one file system. A command that lies in another is taken along.
	if len(spec.Args) > 0 && filepath.IsAbs(spec.Args[0]) && exists(spec.Args[0]) {
		t, err := take(Mount{Source: spec.Args[0], Target: spec.Args[0], ReadOnly: true})
		if err != nil {
			return nil, fmt.Errorf("opening %s: %w", spec.Args[0], err)
		}
		t.fallback = true
		all = append(all, t)
	}
	return all, nil
}

func take(m Mount) (taken, error) {
	st, err := os.Stat(m.Source)
	if err != nil {
		return taken{}, err
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return taken{}, err
	}
	if m.ReadOnly {
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return taken{}, err
		}
	}
	return taken{Mount: m, tree: tree, file: !st.IsDir()}, nil
}

func (t taken) put() error {
	defer unix.Close(t.tree)
	if t.fallback && exists(t.Target) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(t.Target), 0o755); err != nil {
		return err
	}
	if t.file {
		f, err := os.OpenFile(t.Target, os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		f.Close()
	} else if err := os.MkdirAll(t.Target, 0o755); err != nil {
		return err
	}
	return unix.MoveMount(t.tree, "", unix.AT_FDCWD, t.Target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
}

// setNS enters the namespace at path with the calling thread.
func setNS(path string, kind int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), kind); err != nil {
		return fmt.Errorf("entering %s: %w", path, err)
	}
	return nil
}
