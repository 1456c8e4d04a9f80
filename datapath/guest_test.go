//go:build kernels

package datapath_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// guestArgument tells the virtual machine's first program what it is.
	guestArgument = "guest-of-test-kernels"
	// guestPassed is what it says last if all tests passed.
	guestPassed = "ALL TESTS PASSED"
)

// Linux starts this binary as the machine's first program, see TestKernels. It prepares the machine, runs itself
// as an ordinary program for the tests, and switches the machine off.
func init() {
	if os.Getpid() != 1 || os.Args[len(os.Args)-1] != guestArgument {
		return
	}
	if err := guest(); err != nil {
		fmt.Println("guest:", err)
	} else {
		fmt.Println(guestPassed)
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // The kernel panics if its first program ends.
}

func guest() error {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"cgroup2", "/sys/fs/cgroup"},
	} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.dir, err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	tests := exec.Command("/proc/self/exe", "-test.v", "-test.skip", "^TestKernels$", "-test.timeout", "14m")
	tests.Env = []string{"TMPDIR=/tmp"}
	tests.Stdout, tests.Stderr = os.Stdout, os.Stdout
	return tests.Run()
}

// loadModules loads all modules there are, in rounds: one that needs another can be loaded after it.
func loadModules() error {
	left, err := filepath.Glob("/modules/*")
	if err != nil {
		return err
	}
	for len(left) > 0 {
		var again []string
		var errs []error
		for _, path := range left {
			if err := loadModule(path); err != nil {
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
