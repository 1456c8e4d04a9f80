package datapath_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	stocktun "golang.zx2c4.com/wireguard/tun"
)

// bareArgument makes the test's program be a WireGuard device with nothing of Causeway.
const bareArgument = "serve-bare-wireguard"

// bareReady is what the process says when its device works.
const bareReady = "ready"

// serveBare is WireGuard on the TUN device that comes with it. Its configuration (https://www.wireguard.com/xplatform/) is read from standard input, at whose end
// it ends.
func serveBare(name string) error {
	tun, err := stocktun.CreateTUN(name, wireGuardMTU)
	if err != nil {
		return fmt.Errorf("making the TUN device %s: %w", name, err)
	}
	wireGuard := device.NewDevice(tun, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	defer wireGuard.Close()
	if err := wireGuard.IpcSetOperation(os.Stdin); err != nil {
		return fmt.Errorf("configuring %s: %w", name, err)
	}
	if err := wireGuard.Up(); err != nil {
		return fmt.Errorf("starting %s: %w", name, err)
	}
	fmt.Println(bareReady)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// startBare starts a process that is a WireGuard device in the namespace until the test ends.
func startBare(t testing.TB, in namespace, name, config string) {
	t.Helper()
	program, err := os.Executable()
	must(t, err)
	cmd := exec.Command(program, bareArgument, name)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // as Causeway's, since the scheduler may tell sessions apart
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	in.do(t, func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		must(t, stdin.Close())
		must(t, cmd.Wait())
	})
	_, err = io.WriteString(stdin, config+"\n") // An empty line ends it.
	line, e := bufio.NewReader(stdout).ReadString('\n')
	if err := errors.Join(err, e); err != nil || line != bareReady+"\n" {
		t.Fatalf("the bare WireGuard device %s said %q: %v", name, line, err)
	}
}
