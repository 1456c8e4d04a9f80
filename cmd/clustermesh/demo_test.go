package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"causeway/testbed"
)

// needRoot skips a test that brings up a test-bed, loudly; where CI is set leaving out is a failure.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("needs root: it brings up a test-bed")
}

// demoDir returns a directory for a demo, of which nothing may be left at the end of the test.
func demoDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir() + "/demo"
	t.Cleanup(func() {
		if err := testbed.Clean(context.Background(), dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func checkNothingLeft(t *testing.T, dir string) {
	t.Helper()
	left, err := testbed.Leftovers(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// startDemo starts a demo as a process of its own and returns when it has printed what is waited for, with
// what more it prints.
func startDemo(t *testing.T, dir, until string) (*exec.Cmd, io.ReadCloser) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "demo", "--dir", dir)
	cmd.Args[0] = "clustermesh"
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line := ""
	for b := make([]byte, 1); !strings.Contains(line, until); line += string(b) {
		if _, err := io.ReadFull(out, b); err != nil {
			t.Fatalf("the demo ended after printing %q, without %q", line, until)
		}
	}
	return cmd, out
}

func TestDemoAfterAKilledOneIsWhole(t *testing.T) {
	needRoot(t)
	dir := demoDir(t)
	cmd, _ := startDemo(t, dir, "delete east's servers")
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if left, _ := testbed.Leftovers(dir); len(left) == 0 {
		t.Fatal("the killed demo left nothing, so there is nothing to test")
	}

	got := cli(t, nil, "demo", "-o", "json", "--dir", dir, "--requests", "60", "--samples", "10")
	if got.code != exitOK || got.err != "" || strings.Count(got.out, "\n") != 1 {
		t.Fatalf("got %+v", got)
	}
	var r testbed.DemoResult
	if err := json.Unmarshal([]byte(got.out), &r); err != nil {
		t.Fatal(err)
	}
	if !r.OK || !r.CleanedUp || r.Clusters != 2 || r.Nodes != 4 || r.Pods != 6 || r.SetupMS <= 0 || r.Propagation.Samples != 10 || r.Propagation.P99 <= 0 {
		t.Errorf("got %+v", r)
	}
	checkDemoTraffic(t, r.Traffic)
	checkNothingLeft(t, dir)
}

func checkDemoTraffic(t *testing.T, traffic []testbed.DemoTraffic) {
	t.Helper()
	var phases []string
	for _, row := range traffic {
		phases = append(phases, row.Phase+" "+row.Client)
		eastServes := row.Phase != "east-down"
		if row.Requests != 60 || row.Failed != 0 || row.By["east"]+row.By["west"] != 60 || (row.By["east"] > 0) != eastServes {
			t.Errorf("got %+v", row)
		}
	}
	if got, want := strings.Join(phases, ", "), "both east, both west, east-down east, east-down west, restored east, restored west"; got != want {
		t.Errorf("got phases %s", got)
	}
}

func TestDemoStoppedLeavesNothing(t *testing.T) {
	needRoot(t)
	for name, stop := range map[string]func(*exec.Cmd, io.Closer){
		"Ctrl-C": func(cmd *exec.Cmd, _ io.Closer) { _ = cmd.Process.Signal(syscall.SIGINT) },
		"Ctrl-C twice": func(cmd *exec.Cmd, _ io.Closer) {
			_ = cmd.Process.Signal(syscall.SIGINT)
			_ = cmd.Process.Signal(syscall.SIGINT)
		},
		"terminal closed": func(cmd *exec.Cmd, _ io.Closer) { _ = cmd.Process.Signal(syscall.SIGHUP) },
		"nobody reads on": func(_ *exec.Cmd, out io.Closer) { _ = out.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			dir := demoDir(t)
			cmd, out := startDemo(t, dir, "start servers")
			stop(cmd, out)
			_, _ = io.Copy(io.Discard, out) // until the demo ends, or is closed
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != exitInterrupted {
				t.Errorf("got exit code %d, want %d", code, exitInterrupted)
			}
			checkNothingLeft(t, dir)
		})
	}
}

func TestDemoAccount(t *testing.T) {
	var out bytes.Buffer
	a := &account{p: &printer{w: &out}}
	a.step(testbed.DemoEvent{Step: "bring up"})
	a.step(testbed.DemoEvent{Step: "bring up", Done: true, Took: 1234 * time.Millisecond, Detail: "four nodes"})
	a.step(testbed.DemoEvent{Step: "ask", Done: true, Took: time.Second, Err: os.ErrDeadlineExceeded})
	if want := "    1.2s  bring up\n          four nodes\n    1.0s  failed: ask\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	out.Reset()
	a.live = true
	a.step(testbed.DemoEvent{Step: "measure"})
	a.step(testbed.DemoEvent{Step: "measure", Detail: "20 of 200"})
	a.step(testbed.DemoEvent{Step: "measure", Done: true, Took: time.Second})
	if want := "          measure …\r\x1b[K          measure … 20 of 200\r\x1b[K    1.0s  measure\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}
