//go:build kernels

package datapath_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// kernelsEnv names a directory with an unpacked kernel package in each of its folders.
const kernelsEnv = "CAUSEWAY_KERNELS"

// bootTimeout bounds how long a kernel may take for all tests, which takes a minute on an idle machine.
const bootTimeout = 15 * time.Minute

// guestModules are what Causeway needs of a distribution's kernel, with what they depend on.
var guestModules = []string{
	"llc", "stp", "bridge", "veth", "udp_tunnel", "ip6_udp_tunnel", "vxlan", "sch_ingress", "cls_bpf",
}

// TestKernels runs this package's tests on other kernels, each in a virtual machine whose only program
// is this test binary: see guest_test.go. "go tool task test:kernels" gets the kernels.
func TestKernels(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Fatalf("%v: apt-get install qemu-system-x86", err)
	}
	images, err := filepath.Glob(filepath.Join(os.Getenv(kernelsEnv), "*", "boot", "vmlinuz-*"))
	must(t, err)
	if len(images) == 0 {
		t.Fatalf("no kernel in %s=%q: run this as \"go tool task test:kernels\"", kernelsEnv, os.Getenv(kernelsEnv))
	}
	for _, image := range images {
		version := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
		t.Run(version, func(t *testing.T) {
			modules := filepath.Join(image, "../../lib/modules", version)
			boot(t, image, writeInitramfs(t, modules))
		})
	}
}

// boot runs the kernel until the guest has run its tests, and logs what they said.
func boot(t *testing.T, image, initramfs string) {
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048", // works inside of virtual machines too
		"-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", image, "-initrd", initramfs,
		"-append", "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off -- "+guestArgument)
	output, err := qemu.CombinedOutput()
	passed := bytes.Contains(output, []byte(guestPassed))
	tests := 0
	for lines := bufio.NewScanner(bytes.NewReader(output)); lines.Scan(); {
		line := strings.TrimRight(lines.Text(), "\r")
		if !passed {
			t.Log(line)
		}
		if strings.HasPrefix(line, "--- PASS") {
			tests++
		}
	}
	if passed {
		t.Logf("%d tests passed", tests)
	} else {
		t.Errorf("the tests failed on this kernel (qemu: %v, %v); what the machine said is above", err, ctx.Err())
	}
}

// writeInitramfs packs this binary as the machine's first program, and the kernel's modules.
func writeInitramfs(t *testing.T, modules string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "initramfs"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	archive := cpio{w: bufio.NewWriter(file)}
	for _, dir := range []string{"dev", "proc", "sys", "tmp", "modules"} {
		archive.add(dir, 0o040755, nil)
	}
	archive.addFile(self, "init")
	want := map[string]bool{}
	for _, name := range guestModules {
		want[name] = true
	}
	err = filepath.WalkDir(modules, func(path string, _ os.DirEntry, err error) error {
		name, _, isModule := strings.Cut(filepath.Base(path), ".ko")
		if err == nil && isModule && want[name] {
			archive.addFile(path, "modules/"+filepath.Base(path))
		}
		return err
	})
	archive.add("TRAILER!!!", 0, nil)
	if err := errors.Join(err, archive.err, archive.w.Flush()); err != nil {
		t.Fatalf("writing the initial file system: %v", err)
	}
	return file.Name()
}

// cpio writes an archive in the format that the kernel unpacks at boot: "newc" of cpio(5).
type cpio struct {
	w    *bufio.Writer
	node int
	err  error
}

func (c *cpio) addFile(path, name string) {
	content, err := os.ReadFile(path)
	c.err = errors.Join(c.err, err)
	c.add(name, 0o100755, content)
}

func (c *cpio) add(name string, mode uint32, content []byte) {
	c.node++
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.node, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	for _, part := range []string{header, string(content)} {
		padding := strings.Repeat("\x00", (4-len(part)%4)%4)
		_, err := io.WriteString(c.w, part+padding)
		c.err = errors.Join(c.err, err)
	}
}
