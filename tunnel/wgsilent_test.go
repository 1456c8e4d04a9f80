package tunnel

import (
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func stopProcess(t *testing.T, pid int) {
	t.Helper()
	must(t, unix.Kill(pid, unix.SIGSTOP))
	for deadline := time.Now().Add(5 * time.Second); !stopped(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not stop", pid)
		}
	}
}

// TestProcessStopped stops WireGuard's process. Nobody waits for it for ever, it is named as the problem, and another one takes its place.
func TestProcessStopped(t *testing.T) {
	if !slices.Contains(kinds(t), KindUserspace) {
		t.Skip("no devices in user space here")
	}
	a, b := two(t, KindUserspace)
	status, err := a.wg.Status()
	must(t, err)
	pid := status.Devices[0].PID
	stopProcess(t, pid)
	moved := b.row
	moved.MTU-- // nothing that the device has
	moved.Keys = slices.Clone(moved.Keys)
	moved.Keys[0].Port++
	start := time.Now()
	if err := a.wg.Update(t.Context(), moved); err == nil || !strings.Contains(err.Error(), "it is stopped") {
		t.Errorf("a change of a peer is answered with %v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("a change of a peer takes %s", took)
	}
	start = time.Now()
	status, err = a.wg.Status()
	if took := time.Since(start); err != nil || took > 5*time.Second || !slices.ContainsFunc(status.Problems, func(p string) bool { return strings.Contains(p, "it is stopped") }) {
		t.Errorf("after %s the problems are %q, %v", took, status.Problems, err)
	}
	awaitStatus(t, a, "a new process", 15*time.Second, func(now WireGuardStatus) bool {
		return now.Devices[0].PID != 0 && now.Devices[0].PID != pid && len(now.Problems) == 0
	})
	must(t, a.wg.Update(t.Context(), b.row))
	awaitPacket(t, a, b, 0, 0, 5*time.Second)
	if alive(pid) {
		t.Errorf("process %d is still there", pid)
	}
}

// TestProcessGoesOn continues a stopped process in time: it stays, with its sessions.
func TestProcessGoesOn(t *testing.T) {
	if !slices.Contains(kinds(t), KindUserspace) {
		t.Skip("no devices in user space here")
	}
	a, b := two(t, KindUserspace)
	status, err := a.wg.Status()
	must(t, err)
	stopProcess(t, status.Devices[0].PID)
	timer := time.AfterFunc(time.Second, func() { must(t, unix.Kill(status.Devices[0].PID, unix.SIGCONT)) })
	defer timer.Stop()
	now, err := a.wg.Status()
	if err != nil || now.Devices[0].PID != status.Devices[0].PID || len(now.Problems) > 0 || len(now.Peers) != 1 {
		t.Errorf("status is %+v, %v", now, err)
	}
	awaitPacket(t, a, b, 0, 0, time.Second)
}
