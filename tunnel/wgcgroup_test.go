package tunnel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoot returns where cgroup v2 is mounted; it mounts it if it is nowhere.
func cgroupRoot(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for _, line := range strings.Split(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1]
		}
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "cgroup2", 0, ""); errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) {
		t.Skipf("cgroup v2 can't be had: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// TestProcessInCgroup: the process in user space is put where it is configured to be, so that what ends the agent's processes spares it.
func TestProcessInCgroup(t *testing.T) {
	if !slices.Contains(kinds(t), KindUserspace) {
		t.Skip("no devices in user space here")
	}
	name := fmt.Sprint("causeway-test-", os.Getpid())
	dir := filepath.Join(cgroupRoot(t), name)
	t.Cleanup(func() {
		var err error
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) { // A process takes a moment to leave.
			if err = os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
				return
			}
		}
		t.Errorf("the cgroup is left behind: %v", err)
	})
	m := machines(t, KindUserspace, 1, families{})[0]
	m.cfg.Cgroup = dir
	m.open()
	status, err := m.wg.Status()
	must(t, err)
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", status.Devices[0].PID))
	must(t, err)
	if !strings.Contains("\n"+string(data), "\n0::") || !strings.Contains(string(data), "/"+name+"\n") || len(status.Problems) > 0 {
		t.Errorf("the process is in %q; problems are %q", data, status.Problems)
	}
}
