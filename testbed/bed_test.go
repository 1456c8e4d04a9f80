package testbed

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// run executes a command at a target and returns what it printed.
func run(t *testing.T, b *Bed, target string, argv ...string) (string, int) {
	t.Helper()
	at, err := ParseTarget(target)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	code, err := b.Exec(t.Context(), at, argv, Stdio{Out: &out, Err: &out})
	if err != nil {
		t.Fatalf("%s: %v: %v\n%s", target, argv, err, out.String())
	}
	return out.String(), code
}

func TestBedComesUpAndGoes(t *testing.T) {
	needRoot(t)
	before := rootLinks(t)
	var steps []string
	b := mustUp(t, Options{Progress: func(e Event) { steps = append(steps, e.Text) }})
	if len(steps) != 3 || !strings.Contains(steps[2], "4 agents are well") {
		t.Errorf("progress %q", steps)
	}
	if after := rootLinks(t); after != before {
		t.Errorf("links of the machine itself changed:\n%s\n%s", before, after)
	}

	for _, at := range []string{"east/node1", "west/node2", "east/kvstore"} {
		for _, to := range []string{"172.29.1.11", "172.29.1.12", "172.29.2.11", "172.29.2.12", "172.29.1.2", "172.29.2.2"} {
			if !reaches(t, b, at, to, true) {
				t.Errorf("%s does not reach %s", at, to)
			}
		}
	}
	if out, _ := run(t, b, "underlay", "ip", "-br", "link", "show", "master", "br0"); strings.Count(out, "LOWER_UP") != 6 {
		t.Errorf("ports of the underlay:\n%s", out)
	}
	if _, err := Up(t.Context(), Options{Dir: b.Dir(), Clusters: []string{"x"}, Nodes: 1}); !errors.Is(err, ErrAlreadyUp) {
		t.Errorf("a second up: %v", err)
	}
	st, err := b.Status(t.Context())
	if err != nil || !st.OK || len(st.Clusters) != 2 || len(st.Clusters[1].Nodes) != 2 {
		t.Errorf("status %+v, %v", st, err)
	}

	if err := b.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantNothing(t, b.Dir())
	if err := b.Down(t.Context()); err != nil {
		t.Errorf("taking it down again: %v", err)
	}
	if _, err := Open(b.Dir()); !errors.Is(err, ErrNoBed) {
		t.Errorf("opening it: %v", err)
	}
}

// reaches tells whether a place gets answers from an address; a machine that refuses a connection is there. An answer that is expected
// may take its time on a busy machine.
func reaches(t *testing.T, b *Bed, from, to string, expected bool) bool {
	t.Helper()
	patience := "0.5"
	if expected {
		patience = "5"
	}
	out, code := run(t, b, from, "timeout", patience, "bash", "-c", "exec 3<>/dev/tcp/"+to+"/2379")
	return code == 0 || strings.Contains(out, "refused")
}

func rootLinks(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("ip", "-br", "link").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestExec(t *testing.T) {
	b := mustUp(t, Options{Clusters: []string{"east"}, Nodes: 1})
	if out, code := run(t, b, "east/node1", "sh", "-c", "cat; echo to stderr >&2; exit 3"); code != 3 || out != "to stderr\n" {
		t.Errorf("exit code %d, %q", code, out)
	}
	if _, code := run(t, b, "east/node1", "sh", "-c", "kill -TERM $$"); code != 128+15 {
		t.Errorf("killed by SIGTERM: exit code %d", code)
	}
	out, _ := run(t, b, "east/node1", "sh", "-c", "echo $CAUSEWAY_SOCKET; command -v clustermesh; cat /proc/self/cgroup")
	for _, want := range []string{b.socket("east", "node1"), b.binary(), "/" + b.ID() + "/east/node1/exec"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	if _, err := b.Exec(t.Context(), Target{Cluster: "east", Node: "node1"}, []string{"no-such-program"}, Stdio{}); !errors.Is(err, ErrNoCommand) {
		t.Errorf("an unknown program: %v", err)
	}
	if _, err := b.Exec(t.Context(), Target{Cluster: "east", Node: "node9"}, []string{"true"}, Stdio{}); err == nil || !strings.Contains(err.Error(), "node1 to node1") {
		t.Errorf("an unknown node: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.Exec(ctx, Target{}, []string{"sleep", "60"}, Stdio{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command beyond its time: %v", err)
	}
}

// What an earlier bed left is found by name when its records are gone.
func TestCleanWithoutRecords(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, b *Bed){
		"state missing":  func(t *testing.T, b *Bed) { os.Remove(b.stateFile()) },
		"state damaged":  func(t *testing.T, b *Bed) { os.WriteFile(b.stateFile(), []byte("{"), 0o600) },
		"marker missing": func(t *testing.T, b *Bed) { os.Remove(b.marker()) },
		"agents killed": func(t *testing.T, b *Bed) {
			if err := killCgroup(t.Context(), mustState(t, b).CgroupRoot); err != nil {
				t.Fatal(err)
			}
		},
		"namespaces gone": func(t *testing.T, b *Bed) {
			names, _ := b.listNS()
			for _, n := range names[:len(names)/2] {
				if err := exec.Command("ip", "netns", "delete", n).Run(); err != nil {
					t.Fatal(err)
				}
			}
		},
		"user inside": func(t *testing.T, b *Bed) {
			// A shell of the user in a namespace and on a mount holds both; the names go all the same.
			cmd := exec.Command("ip", "netns", "exec", b.nodeNS("east", "node1"), "sleep", "60")
			cmd.Dir = b.bpffs("east", "node1")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := mustUp(t, Options{})
			damage(t, b)
			if err := Clean(t.Context(), b.Dir()); err != nil {
				t.Fatal(err)
			}
			wantNothing(t, b.Dir())
		})
	}
}

func mustState(t *testing.T, b *Bed) *State {
	t.Helper()
	s, err := b.State()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Two beds at once know only what is theirs.
func TestTwoBeds(t *testing.T) {
	a := mustUp(t, Options{Clusters: []string{"east"}, Nodes: 1})
	b := mustUp(t, Options{Clusters: []string{"east"}, Nodes: 1})
	if err := a.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st, err := b.Status(t.Context()); err != nil || !st.OK {
		t.Errorf("the other bed after the first went: %+v, %v", st, err)
	}
}

func TestForeignDirectoryIsLeftAlone(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), Options{Dir: dir, Clusters: []string{"east"}, Nodes: 1}); err == nil || !strings.Contains(err.Error(), "--dir") {
		t.Errorf("up in a directory with somebody's files: %v", err)
	}
	if err := Clean(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if !fileExists(precious) {
		t.Error("the file is gone")
	}
}

func TestUpReportsAProcessThatDies(t *testing.T) {
	needRoot(t)
	dir := bedDir(t)
	_, err := Up(t.Context(), Options{Dir: dir, Clusters: []string{"east"}, Nodes: 1, Binary: "/bin/false"})
	var failed *ProcessError
	if !errors.As(err, &failed) || !strings.Contains(err.Error(), "store of cluster east") {
		t.Errorf("error %v", err)
	}
	wantNothing(t, dir)
}

func TestInterruptedUpLeavesNothing(t *testing.T) {
	needRoot(t)
	dir := bedDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// In the midst of it: the first thing that is told is there, and nothing after it.
	interrupt := func(Event) { cancel() }
	if _, err := Up(ctx, Options{Dir: dir, Clusters: []string{"east", "west"}, Nodes: 2, Progress: interrupt}); !errors.Is(err, context.Canceled) {
		t.Errorf("an interrupted up says %v", err)
	}
	wantNothing(t, dir)
}
