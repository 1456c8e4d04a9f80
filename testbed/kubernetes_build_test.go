package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeGo puts a go command first in PATH that tells what it was asked for in the file it returns, and builds a program that says "built".
func fakeGo(t *testing.T, build string) (calls string) {
	t.Helper()
	dir := t.TempDir()
	calls = filepath.Join(dir, "calls")
	script := `#!/bin/sh
echo "$CGO_ENABLED $*" >>` + calls + `
case $1 in
env) echo go1.99 linux amd64 ;;
list) echo v1.34.10 ;;
build) ` + build + ` ;;
esac
`
	if err := os.WriteFile(filepath.Join(dir, "go"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return calls
}

// buildTo is a script that writes a program to the directory after -o.
const buildTo = `while [ "$1" != -o ]; do shift; done; echo built >"$2/kubernetes"`

func testBuild(t *testing.T) (*kubernetesBuild, *[]string) {
	t.Helper()
	k := &kubernetesBuild{source: t.TempDir(), cache: filepath.Join(t.TempDir(), "cache")}
	var mu sync.Mutex
	told := new([]string)
	k.tell = func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		*told = append(*told, fmt.Sprintf(format, args...))
	}
	writeTestFile(t, filepath.Join(k.source, "main.go"), "package main")
	return k, told
}

func writeTestFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestKubernetesIsBuiltOnce(t *testing.T) {
	calls := fakeGo(t, buildTo)
	k, told := testBuild(t)
	var both sync.WaitGroup
	programs := make([]string, 2)
	for i := range programs {
		both.Go(func() {
			var err error
			if programs[i], err = k.program(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	content, err := os.ReadFile(programs[0])
	if err != nil || string(content) != "built\n" || programs[0] != programs[1] {
		t.Errorf("programs %q with %q, %v", programs, content, err)
	}
	asked, _ := os.ReadFile(calls)
	if n := strings.Count(string(asked), "0 build "); n != 1 {
		t.Errorf("two who need it at once: built %d times:\n%s", n, asked)
	}
	if !strings.Contains(string(asked), "-X k8s.io/component-base/version.gitVersion=v1.34.10 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=34 ") {
		t.Errorf("the version that go.mod names is not stamped:\n%s", asked)
	}
	if len(*told) == 0 || !strings.Contains((*told)[0], "building Kubernetes v1.34.10 from source (once, takes some minutes)") {
		t.Errorf("progress %q", *told)
	}

	writeTestFile(t, filepath.Join(k.source, "kubelet", "kubelet.go"), "package kubelet")
	changed, err := k.program(t.Context())
	if err != nil || changed == programs[0] {
		t.Errorf("after a change of the source: %s, %v", changed, err)
	}
}

func TestKubernetesThatDoesNotBuild(t *testing.T) {
	fakeGo(t, "echo kubelet.go:1: syntax error >&2; exit 1")
	k, _ := testBuild(t)
	if _, err := k.program(t.Context()); err == nil || !strings.Contains(err.Error(), "kubelet.go:1: syntax error") {
		t.Errorf("error %v", err)
	}
	if entries, _ := os.ReadDir(k.cache); len(entries) != 1 { // the lock
		t.Errorf("left in the cache: %v", entries)
	}

	fakeGo(t, "sleep 60")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := k.program(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 10*time.Second {
		t.Errorf("an interrupted build: %v after %v", err, time.Since(began))
	}
	if entries, _ := os.ReadDir(k.cache); len(entries) != 1 {
		t.Errorf("left in the cache: %v", entries)
	}

	t.Setenv("PATH", t.TempDir())
	if _, err := k.program(t.Context()); err == nil || !strings.Contains(err.Error(), "--kubernetes-program") {
		t.Errorf("without Go: %v", err)
	}
}

func TestOldBuildsAreRemoved(t *testing.T) {
	cache := t.TempDir()
	writeTestFile(t, filepath.Join(cache, "lock"), "")
	for i, name := range []string{"oldest", "older", "newer", "newest"} {
		dir := filepath.Join(cache, name)
		writeTestFile(t, filepath.Join(dir, "kubernetes"), "")
		used := time.Unix(int64(i)*1000, 0)
		if err := os.Chtimes(dir, used, used); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeOldBuilds(cache, 2); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"oldest": false, "older": false, "newer": true, "newest": true, "lock": true} {
		if got := fileExists(filepath.Join(cache, name)); got != want {
			t.Errorf("%s is there: %v", name, got)
		}
	}
}

func TestKubernetesSourceIsFoundFromWithinACheckout(t *testing.T) {
	root := t.TempDir()
	writeTestFile(t, filepath.Join(root, "go.mod"), "module causeway\n\ngo 1.26\n")
	writeTestFile(t, filepath.Join(root, "testbed", "kubernetes", "go.mod"), "module causeway/testbed/kubernetes\n")
	for _, from := range []string{root, filepath.Join(root, "testbed"), filepath.Join(root, "testbed", "kubernetes")} {
		if got, err := findKubernetesSource(from); err != nil || got != filepath.Join(root, "testbed", "kubernetes") {
			t.Errorf("from %s: %s, %v", from, got, err)
		}
	}
	if _, err := findKubernetesSource(t.TempDir()); err == nil || !strings.Contains(err.Error(), "--kubernetes-program") {
		t.Errorf("outside of a checkout: %v", err)
	}
}
