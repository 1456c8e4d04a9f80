package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// guest is what this program does as the machine's first one: it prepares the machine, runs the test, says its exit code and
// switches the machine off.
func guest() {
	code, err := runJob()
	if err != nil {
		fmt.Println("vm: in the machine:", err)
		code = 1
	}
	fmt.Printf("\n%s%d\n", exitMark, code)
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // The kernel panics if its first program ends.
}

func runJob() (code int, err error) {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
		{"cgroup2", "/sys/fs/cgroup"}, {"bpf", "/sys/fs/bpf"},
	} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			return 0, fmt.Errorf("mounting %s: %w", m.dir, err)
		}
	}
	if err := os.Mkdir("/var", 0o755); err != nil {
		return 0, err
	}
	if err := os.Symlink("/run", "/var/run"); err != nil {
		return 0, err
	}
	if err := loadModules(); err != nil {
		return 0, err
	}
	var j job
	text, err := os.ReadFile("/" + jobFile)
	if err != nil {
		return 0, err
	}
	if err := json.Unmarshal(text, &j); err != nil {
		return 0, err
	}
	test := exec.Command("/"+testBinary, j.Arguments...)
	test.Env = append(j.Env, "TMPDIR=/tmp", "HOME=/tmp", "PATH=/")
	test.Stdout, test.Stderr, test.Dir = os.Stdout, os.Stdout, "/tmp"
	err = test.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// loadModules loads all modules there are, in rounds: one that needs another can be loaded after it. What the processor lacks is
// left out, as a variant of an algorithm for it.
func loadModules() error {
	left, err := filepath.Glob("/" + modulesDir + "/*")
	if err != nil {
		return err
	}
	for len(left) > 0 {
		var again []string
		var errs []error
		for _, path := range left {
			err := loadModule(path)
			if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EEXIST) {
				continue
			}
			if err != nil {
				again = append(again, path)
				errs = append(errs, fmt.Errorf("loading %s: %w", path, err))
			}
		}
		if len(again) == len(left) {
			return errors.Join(errs...)
		}
		left = again
	}
	return nil
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	return unix.FinitModule(int(file.Fd()), "", flags)
}
