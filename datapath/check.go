package datapath

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Check tells whether this machine can run the data path. The error joins
// everything that is missing, each with what to do about it.
func Check() error {
	if err := checkCapabilities(); err != nil {
		return err // The other checks need them.
	}
	_, cgroupErr := CgroupRoot()
	return errors.Join(checkBTF(), cgroupErr, checkHelpers(), checkDevices())
}

// CgroupRoot returns where the cgroup v2 hierarchy is mounted.
func CgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("finding the cgroup v2 mount: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// "36 35 98:0 /root /mount/point options… - type source options", see proc_pid_mountinfo(5).
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if ok && len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.New("no cgroup v2 hierarchy is mounted: mount one with \"mount -t cgroup2 none /sys/fs/cgroup/unified\"")
}

func checkCapabilities() error {
	const need = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_ADMIN
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return fmt.Errorf("reading this process's capabilities: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err == nil && caps&need == need {
				return nil
			}
		}
	}
	return errors.New("not enough privileges: run as root (CAP_SYS_ADMIN and CAP_NET_ADMIN are needed for namespaces, eBPF and network devices)")
}

func checkBTF() error {
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		return fmt.Errorf("the kernel has no type information: use one built with CONFIG_DEBUG_INFO_BTF=y, as distributions' are: %w", err)
	}
	return nil
}

func checkHelpers() error {
	var errs []error
	for _, h := range []struct {
		program ebpf.ProgramType
		helper  asm.BuiltinFunc
	}{
		{ebpf.SchedCLS, asm.FnRedirectPeer},
		{ebpf.SchedCLS, asm.FnSkbSetTunnelKey},
		{ebpf.CGroupSockAddr, asm.FnSetRetval},
		{ebpf.CGroupSockAddr, asm.FnSkRelease},
		{ebpf.SkLookup, asm.FnSkAssign},
	} {
		if err := features.HaveProgramHelper(h.program, h.helper); err != nil {
			errs = append(errs, fmt.Errorf("the kernel lacks %s for %s programs: use Linux 6.1 or later: %w", h.helper, h.program, err))
		}
	}
	return errors.Join(errs...)
}
