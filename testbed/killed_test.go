package testbed

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"
)

// An up that is killed at any moment leaves nothing that the next command does not remove.
func TestKilledUp(t *testing.T) {
	needRoot(t)
	dir := bedDir(t)
	began := time.Now()
	if out, err := exec.Command(os.Args[0], "up", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	whole := time.Since(began)
	if err := Clean(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for range rounds {
		after := time.Duration(rand.Int64N(int64(whole)))
		cmd := exec.Command(os.Args[0], "up", dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
		if err := Clean(t.Context(), dir); err != nil {
			t.Errorf("killed after %v: %v", after, err)
		}
		wantNothing(t, dir)
	}
}

// A bed that was cut off in the middle is no obstacle for the next one.
func TestUpAfterKilledUp(t *testing.T) {
	needRoot(t)
	dir := bedDir(t)
	cmd := exec.Command(os.Args[0], "up", dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	l, err := newLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); !fileExists(netnsPath(l.nodeNS("west", "node1"))); {
		if time.Now().After(deadline) {
			t.Fatal("no node appeared")
		}
		time.Sleep(time.Millisecond)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	b := mustUp(t, Options{Dir: dir})
	if st, err := b.Status(t.Context()); err != nil || !st.OK {
		t.Errorf("status %+v, %v", st, err)
	}
}
