package testbed

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Kubernetes for the test-bed is built from the module in testbed/kubernetes when it is first needed, and kept in the user's cache by what it
// was built from. The product's own module knows nothing of it.

const (
	// kubernetesProgram is the program that is all of Kubernetes, by the name that it is called by.
	kubernetesProgram = "kubernetes"
	// echoProgram answers HTTP and gRPC with what it was asked: Gateway API's, a program of its own that is built along.
	echoProgram = "echo-basic"
	// kubernetesModule is where its source is, from the root of this module.
	kubernetesModule = "testbed/kubernetes"
	// keepBuilds is how many programs stay in the cache: those of other checkouts are in use too.
	keepBuilds = 4
)

// kubernetesBuild says how the program is built.
type kubernetesBuild struct {
	source string // the directory of its module
	cache  string // the directory that has a subdirectory for each build
	tell   func(format string, args ...any)
}

// BuildKubernetes returns the program that is a test-bed's Kubernetes, built from the checkout that the working directory is in if it has not been
// yet. Whoever builds it meanwhile is waited for.
func BuildKubernetes(ctx context.Context, report func(Event)) (program string, err error) {
	k, err := newKubernetesBuild(progress(report))
	if err != nil {
		return "", err
	}
	return k.program(ctx)
}

// newKubernetesBuild finds the source, from the working directory upwards, and the user's cache.
func newKubernetesBuild(tell func(string, ...any)) (*kubernetesBuild, error) {
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	source, err := findKubernetesSource(wd)
	if err != nil {
		return nil, err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("finding a place for the built Kubernetes: %w; set XDG_CACHE_HOME or HOME", err)
	}
	return &kubernetesBuild{source: source, cache: filepath.Join(cache, "causeway", "kubernetes"), tell: tell}, nil
}

var moduleLine = regexp.MustCompile(`(?m)^module causeway$`)

// findKubernetesSource looks for a checkout of Causeway in dir and above.
func findKubernetesSource(dir string) (string, error) {
	for d := dir; ; d = filepath.Dir(d) {
		mod, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && moduleLine.Match(mod) {
			return filepath.Join(d, kubernetesModule), nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("building Kubernetes takes Causeway's source, and %s is in no checkout of it: run this in one, or name a program that was built already with --kubernetes-program", dir)
		}
	}
}

// program returns the built program; it builds it if it is not there yet.
func (k *kubernetesBuild) program(ctx context.Context) (string, error) {
	key, err := k.key(ctx)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(k.cache, 0o755); err != nil {
		return "", err
	}
	lock, err := lockFile(ctx, filepath.Join(k.cache, "lock"), unix.LOCK_EX)
	if err != nil {
		return "", err
	}
	defer lock.unlock()
	dir := filepath.Join(k.cache, key)
	now := time.Now()
	if err := os.Chtimes(dir, now, now); errors.Is(err, fs.ErrNotExist) {
		err = k.build(ctx, dir)
		if err != nil {
			return "", err
		}
	} else if err != nil {
		return "", err
	}
	return filepath.Join(dir, kubernetesProgram), removeOldBuilds(k.cache, keepBuilds)
}

// key is a hash of all that the program is built from: the module's own files, which name all others by hash, and the compiler.
func (k *kubernetesBuild) key(ctx context.Context) (string, error) {
	compiler, err := k.goOutput(ctx, "env", "GOVERSION", "GOOS", "GOARCH")
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	fmt.Fprintln(sum, compiler, k.flags(""))
	err = fs.WalkDir(os.DirFS(k.source), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(k.source, path))
		fmt.Fprintf(sum, "%s %d\n%s", path, len(content), content)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("reading the source of Kubernetes: %w", err)
	}
	return hex.EncodeToString(sum.Sum(nil)[:8]), nil
}

// flags of go build for a version of Kubernetes, which the programs say they are.
func (k *kubernetesBuild) flags(version string) []string {
	const stamped = "k8s.io/component-base/version"
	major, minor, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	ldflags := []string{"-s", "-w"}
	for _, stamp := range [][2]string{{"gitVersion", version}, {"gitMajor", major}, {"gitMinor", minor}, {"gitTreeState", "archive"}} {
		ldflags = append(ldflags, "-X", stamped+"."+stamp[0]+"="+stamp[1])
	}
	return []string{"-trimpath", "-buildvcs=false", "-ldflags", strings.Join(ldflags, " ")}
}

// build builds into a directory beside dir, and renames that once it is complete.
func (k *kubernetesBuild) build(ctx context.Context, dir string) error {
	version, err := k.goOutput(ctx, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	k.tell("building Kubernetes %s from source (once, takes some minutes)", version)
	part := dir + ".part"
	if err := os.RemoveAll(part); err != nil { // of a build that was cut off
		return err
	}
	defer os.RemoveAll(part)
	if err := os.Mkdir(part, 0o755); err != nil {
		return err
	}
	// The module's own program, and those of its dependencies that its go.mod names as tools.
	args := append([]string{"build"}, k.flags(version)...)
	if _, err := k.goOutput(ctx, append(args, "-o", part+"/", ".", "tool")...); err != nil {
		return fmt.Errorf("building Kubernetes: %w", err)
	}
	if err := os.Rename(part, dir); err != nil {
		return err
	}
	k.tell("Kubernetes %s is built", version)
	return nil
}

// goOutput runs the go command in the module and returns what it printed.
func (k *kubernetesBuild) goOutput(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = k.source
	// Without C the programs run on any machine and in any root; a workspace or a vendor directory of the caller's is not this module's.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly")
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	// Its compilers end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = execGrace
	err := cmd.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return "", errors.New("building Kubernetes takes Go, and there is no go command: install the version that go.mod names, or name a program that was built already with --kubernetes-program")
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case err != nil:
		return "", fmt.Errorf("go %s in %s: %w: %s", args[0], k.source, err, strings.TrimSpace(problems.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// removeOldBuilds removes all but the builds that were used last, and what was cut off.
func removeOldBuilds(cache string, keep int) error {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return err
	}
	type build struct {
		path string
		used time.Time
	}
	var builds []build
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !e.IsDir() {
			continue
		}
		builds = append(builds, build{filepath.Join(cache, e.Name()), info.ModTime()})
	}
	slices.SortFunc(builds, func(a, b build) int { return cmp.Compare(b.used.UnixNano(), a.used.UnixNano()) })
	var errs []error
	for _, b := range builds[min(keep, len(builds)):] {
		errs = append(errs, os.RemoveAll(b.path))
	}
	return errors.Join(errs...)
}

// installKubernetes copies the program into the bed, and gives it the names that it is called by. Programs for pods come along if they are beside it.
func (b *Bed) installKubernetes(program string) error {
	if err := copyProgram(program, filepath.Join(b.binDir(), kubernetesProgram)); err != nil {
		return err
	}
	for _, name := range kubernetesNames {
		if err := os.Symlink(kubernetesProgram, filepath.Join(b.binDir(), name)); err != nil {
			return err
		}
	}
	err := copyProgram(filepath.Join(filepath.Dir(program), echoProgram), filepath.Join(b.binDir(), echoProgram))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// copyProgram copies a file that is run from where it is copied to.
func copyProgram(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("opening the program to run: %w", err)
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return fmt.Errorf("copying the program to run: %w", err)
	}
	return dst.Close()
}
