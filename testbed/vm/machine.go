package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// machine is a virtual machine for one run of a test binary.
type machine struct {
	kernel    string // directory of an unpacked kernel package
	timeout   time.Duration
	memory    int // MiB
	env       []string
	binary    string
	arguments []string
}

// job is what the guest finds in jobFile.
type job struct {
	Arguments []string `json:"arguments"`
	Env       []string `json:"env"`
}

const (
	jobFile    = "job.json"
	testBinary = "test"
	modulesDir = "modules"
	// exitMark begins the guest's last line, which ends with the test's exit code.
	exitMark = "causeway-vm: exit code "
)

// modules are what Causeway needs of a distribution's kernel, with what they depend on in some version or other.
var modules = []string{
	"llc", "stp", "bridge", "veth", "dummy", "tun", "udp_tunnel", "ip6_udp_tunnel", "vxlan", "sch_ingress", "cls_bpf", "tcp_bbr",
	"wireguard", "libchacha20poly1305", "libchacha", "chacha-x86_64", "libpoly1305", "poly1305-x86_64", "libcurve25519", "libcurve25519-generic",
	"curve25519-x86_64", "libblake2s", "libblake2s-generic", "blake2s-x86_64",
	"nf_tables", "nfnetlink", "libcrc32c", "crc32c_generic", "nf_conntrack", "nf_defrag_ipv4", "nf_defrag_ipv6", "nf_nat", "nft_chain_nat", "nft_masq",
}

// run boots the machine, copies what the test prints to out, and returns its exit code.
func (m *machine) run(ctx context.Context, out io.Writer) (int, error) {
	image, err := m.image()
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "causeway-vm.")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	initramfs := filepath.Join(dir, "initramfs")
	version := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
	if err := m.writeInitramfs(initramfs, filepath.Join(m.kernel, "lib/modules", version)); err != nil {
		return 0, fmt.Errorf("writing the machine's file system: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		// One processor: Linux changes its own code while it runs, and emulated ones that run side by side do not notice in time, which
		// newer kernels end in a panic ("int3") with.
		"-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", strconv.Itoa(m.memory),
		"-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-kernel", image, "-initrd", initramfs,
		"-append", "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off")
	pipe, err := qemu.StdoutPipe()
	if err != nil {
		return 0, err
	}
	qemu.Stderr = os.Stderr
	if err := qemu.Start(); err != nil {
		return 0, fmt.Errorf("%w: apt-get install --no-install-recommends qemu-system-x86", err)
	}
	code, said := copyOutput(out, pipe)
	err = qemu.Wait()
	if !said {
		return 0, errors.Join(fmt.Errorf("the machine with Linux %s was gone before the test had ended", version), ctx.Err(), err)
	}
	return code, nil
}

// copyOutput copies lines until the last one, and returns the exit code that it says.
func copyOutput(out io.Writer, in io.Reader) (code int, said bool) {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		line = strings.TrimRight(line, "\r\n")
		if text, found := strings.CutPrefix(line, exitMark); found {
			code, atoi := strconv.Atoi(text)
			_, _ = io.Copy(io.Discard, lines)
			return code, atoi == nil
		}
		if line != "" || err == nil {
			fmt.Fprintln(out, line)
		}
		if err != nil {
			return 0, false
		}
	}
}

// image returns the kernel's.
func (m *machine) image() (string, error) {
	images, err := filepath.Glob(filepath.Join(m.kernel, "boot", "vmlinuz-*"))
	if err != nil {
		return "", err
	}
	if len(images) != 1 {
		return "", fmt.Errorf("%s has %d kernels (boot/vmlinuz-VERSION), want one", m.kernel, len(images))
	}
	return images[0], nil
}

// writeInitramfs packs this program as the machine's first one, the test, and the kernel's modules.
func (m *machine) writeInitramfs(path, modulesFrom string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	a := newArchive(file)
	for _, dir := range []string{"dev", "proc", "sys", "tmp", "run", modulesDir} {
		a.addDir(dir)
	}
	a.addFile(self, "init")
	a.addFile(m.binary, testBinary)
	text, err := json.Marshal(job{Arguments: m.arguments, Env: m.env})
	if err != nil {
		return err
	}
	a.add(jobFile, 0o100644, text)
	want := map[string]bool{}
	for _, name := range modules {
		want[name] = true
	}
	err = filepath.WalkDir(modulesFrom, func(path string, _ os.DirEntry, err error) error {
		name, _, isModule := strings.Cut(filepath.Base(path), ".ko")
		if err == nil && isModule && want[name] {
			a.addFile(path, modulesDir+"/"+filepath.Base(path))
		}
		return err
	})
	return errors.Join(err, a.close())
}
